"""Schedules against their closed forms, AdamW against a plain float64 one, and the parameter groups."""

import functools
import importlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import linen as nn

from seqmodels.config import validate
from seqmodels.configs import mamba
from seqmodels.errors import UserError
from seqmodels.layers.parameter import Parameter
from seqmodels.model import build
from seqmodels.training.optimizer import averaged_params, decay_mask, make_optimizer, make_schedule, rate_factors
from seqmodels.training.sharding import RULES, make_mesh, put_batch
from seqmodels.training.state import abstract_params, abstract_state, init_state
from seqmodels.training.step import lower_train_step, make_train_step
from tests.training_model import LeakyModel, small_config


def schedule_of(steps, **overrides):
    config = small_config(**{f"optimizer__{name}": value for name, value in overrides.items()})
    schedule = make_schedule(config.optimizer, steps)
    return [float(schedule(t)) for t in range(steps)]


def test_cosine_with_warmup_as_a_share():
    rates = schedule_of(100, schedule="cosine", learning_rate=2.0, warmup=0.1, floor=0.25)
    for t, rate in enumerate(rates):
        wanted = 2.0 * (t + 1) / 10 if t < 10 else 2.0 * (0.25 + 0.75 * (1 + math.cos(math.pi * (t - 10) / 89)) / 2)
        assert rate == pytest.approx(wanted, rel=1e-5)
    assert rates[9] == rates[10] == 2.0 and rates[-1] == pytest.approx(0.5)


def test_wsd_holds_then_falls_linearly():
    rates = schedule_of(50, schedule="wsd", learning_rate=1.0, warmup=5.0, decay=0.2, floor=0.0)
    np.testing.assert_allclose(rates[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    np.testing.assert_allclose(rates[5:40], 1.0)
    np.testing.assert_allclose(rates[39:], np.linspace(1, 0, 11), atol=1e-6)


def test_constant_and_no_warmup():
    assert schedule_of(4, schedule="constant", learning_rate=0.5, warmup=0.0) == [0.5] * 4


def test_one_step_has_a_finite_rate():
    assert all(
        math.isfinite(r) and r > 0 for name in ("cosine", "wsd", "constant") for r in schedule_of(1, schedule=name)
    )


def adamw64(params, grads, steps, config, decay):
    """AdamW with bias correction and global clipping, as in Loshchilov and Hutter (2019), algorithm 2."""
    m = {k: np.zeros_like(p) for k, p in params.items()}
    v = {k: np.zeros_like(p) for k, p in params.items()}
    for t in range(1, steps + 1):
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        factor = min(1.0, config.clip / norm)
        for k, p in params.items():
            g = grads[k] * factor
            m[k] = config.b1 * m[k] + (1 - config.b1) * g
            v[k] = config.b2 * v[k] + (1 - config.b2) * g**2
            step = m[k] / (1 - config.b1**t) / (np.sqrt(v[k] / (1 - config.b2**t)) + config.eps)
            params[k] = p - config.learning_rate * (step + config.weight_decay * decay[k] * p)
    return params


@pytest.mark.parametrize("clip", [0.5, 1e6])
def test_adamw_equals_a_float64_one(clip):
    config = small_config(optimizer__clip=clip).optimizer
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 4)), "scale": rng.normal(size=4), "A_log": rng.normal(size=(4, 2))}
    declared = {
        "kernel": Parameter(params["kernel"], ("embed", "inner")),
        "scale": Parameter(params["scale"], ("inner",)),
        "A_log": Parameter(params["A_log"], ("inner", "state"), decay=False),
    }
    grads = {name: rng.normal(size=p.shape) for name, p in params.items()}
    now = {name: jnp.asarray(p, jnp.float32) for name, p in params.items()}
    optimizer = make_optimizer(config, declared)
    state = optimizer.init(now)
    for _ in range(5):
        direction, state = optimizer.update({k: jnp.asarray(g, jnp.float32) for k, g in grads.items()}, state, now)
        now = jax.tree.map(lambda p, d: p - config.learning_rate * d, now, direction)
    wanted = adamw64(params, grads, 5, config, {"kernel": 1.0, "scale": 0.0, "A_log": 0.0})
    for name in now:
        np.testing.assert_allclose(now[name], wanted[name], rtol=2e-5, atol=2e-6)


def test_weight_decay_is_for_matrices_unless_declared_otherwise():
    """Also under a scan over blocks, which stacks the layers' parameters, and in modules that know Flax alone."""
    boxed = lambda *axes, **options: Parameter(jnp.zeros((2,) * len(axes)), axes, **options)  # noqa: E731
    mask = decay_mask(
        {
            "in": {"kernel": boxed("embed", "inner"), "plain": nn.LogicallyPartitioned(jnp.zeros((2, 2)), ("a", "b"))},
            "norm": {"scale": boxed("embed"), "gain": boxed("embed", decay=True)},
            "stacked": {"bias": boxed("layers", "inner"), "kernel": boxed("layers", "embed", "inner")},
            "mixer": {"A_log": boxed("inner", "state", decay=False), "D": boxed("layers", "inner")},
        }
    )
    assert mask == {
        "in": {"kernel": True, "plain": True},
        "norm": {"scale": False, "gain": True},
        "stacked": {"bias": False, "kernel": True},
        "mixer": {"A_log": False, "D": False},
    }


UNDECAYED = ("A_log", "D", "dt_bias", "scale")  # what the first wave left out by name, beside all vectors


@pytest.mark.parametrize("name", ["densemamba", "denseretnet", "mamba3", "gla", "performer", "transformer"])
def test_weight_decay_is_that_of_the_first_wave(name):
    config = importlib.import_module(f"seqmodels.configs.{name}").get_config()
    boxed = abstract_params(build(config.model, 257), config)
    for path, decayed in jax.tree.leaves_with_path(decay_mask(boxed)):
        leaf = functools.reduce(lambda tree, key: tree[key.key], path, boxed)
        axes = sum(axis != "layers" for axis in leaf.names)
        assert decayed == (axes >= 2 and path[-1].key not in UNDECAYED), path


def test_learning_rate_groups():
    config = mamba.get_config()
    boxed = abstract_params(build(config.model, 257), config)
    factors = rate_factors("ssm=0.1, embedding=0", boxed)
    assert factors["embedding"] == 0 and factors["final_norm"]["scale"] == 1
    mixer = factors["block_0"]["mixer"]
    assert {name for name, factor in mixer.items() if factor == 0.1} == {"A_log", "D", "dt_bias"}
    assert set(jax.tree.leaves(rate_factors("", boxed))) == {1.0}


@pytest.mark.parametrize(
    "groups, words",
    [
        ("ssm", "GROUP=FACTOR"),
        ("ssm=-1", "each factor at least 0"),
        ("ssm=nan", "each factor at least 0"),
        ("smm=0.1", "embedding, ssm; did you mean ssm?"),
    ],
)
def test_wrong_learning_rate_groups(groups, words):
    config = mamba.get_config()
    with pytest.raises(UserError) as error:
        rate_factors(groups, abstract_params(build(config.model, 257), config))
    assert str(error.value).startswith(f"config.optimizer.groups={groups!r}: must be ") and words in str(error.value)


def test_groups_of_a_model():
    assert decay_mask(abstract_params(LeakyModel(), small_config())) == {
        "table": True, "kernel": True, "out": True, "scale": False,
    }  # fmt: skip


def toy():
    """Declared parameters of each kind, and gradients of a few steps."""
    draw = np.random.default_rng(0)
    declared = {
        "kernel": Parameter(draw.normal(size=(3, 4)), ("embed", "inner")),
        "heads": Parameter(draw.normal(size=(2, 2, 3)), ("heads", "head_dim", "embed")),
        "halves": Parameter(draw.normal(size=(2, 3, 2, 4)), ("layers", "embed", None, "inner")),
        "embedding": Parameter(draw.normal(size=(5, 3)), ("vocab", "embed"), group="embedding"),
        "scale": Parameter(draw.normal(size=4), ("inner",)),
        "A_log": Parameter(draw.normal(size=(4, 2)), ("inner", "state"), decay=False),
    }
    params = {name: jnp.asarray(leaf.value, jnp.float32) for name, leaf in declared.items()}
    grads = [jax.tree.map(lambda p: jnp.asarray(draw.normal(size=p.shape), jnp.float32), params) for _ in range(5)]
    return declared, params, grads


def descended(config, declared, params, grads):
    """The parameters and the optimizer's state after the steps of `make_train_step`, and the rates."""
    schedule = make_schedule(config, len(grads))
    optimizer = make_optimizer(config, declared, schedule)
    state = optimizer.init(params)
    for n, g in enumerate(grads):
        (direction, state), rate = optimizer.update(g, state, params), schedule(n)
        params = jax.tree.map(lambda p, d: p - rate * d, params, direction)  # noqa: B023
    return params, state


@pytest.mark.slow
def test_muon_equals_optax():
    """Each matrix by itself, as one of two axes, with optax's own scale; the others as AdamW has them."""
    declared, params, grads = toy()
    fields = dict(name="muon", clip=0.0, schedule="constant", warmup=0.0, learning_rate=0.1, weight_decay=0.1)
    config = small_config(**{f"optimizer__{k}": v for k, v in fields.items()}).optimizer
    got, _ = descended(config, declared, params, grads)
    with config.unlocked():
        config.name = "adamw"
    adam, _ = descended(config, declared, params, grads)
    for name in ("embedding", "scale", "A_log"):
        np.testing.assert_allclose(got[name], adam[name], rtol=1e-6)
    shapes = {"kernel": (1, 3, 4), "heads": (1, 4, 3)}
    apart = lambda name, x: np.moveaxis(x, 2, 1).reshape(-1, 3, 4) if name == "halves" else x.reshape(shapes[name])  # noqa: E731
    for name in ("kernel", "heads", "halves"):
        for i, p in enumerate(apart(name, np.asarray(params[name]))):
            rule = optax.contrib.muon(0.1, weight_decay=0.1, consistent_rms=0.2)
            state, p = rule.init(p), jnp.asarray(p)
            for g in grads:
                move, state = rule.update(jnp.asarray(apart(name, np.asarray(g[name]))[i]), state, p)
                p = p + move
            np.testing.assert_allclose(apart(name, np.asarray(got[name]))[i], p, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_schedule_free_equals_optax():
    declared, params, grads = toy()
    fields = dict(name="schedule_free", clip=0.0, schedule="constant", warmup=2.0, learning_rate=0.1)
    config = small_config(**{f"optimizer__{k}": v for k, v in fields.items()}).optimizer
    got, state = descended(config, declared, params, grads)
    schedule = lambda step: 0.1 * jnp.minimum((step + 1) / 2, 1)  # noqa: E731
    decays = dict(weight_decay=config.weight_decay, mask=decay_mask(declared))
    adam = optax.adamw(schedule, 0.0, config.b2, config.eps, **decays)
    rule = optax.contrib.schedule_free(adam, lambda count: schedule(count - 1), config.b1)
    free, p = rule.init(params), params
    for g in grads:
        moves, free = rule.update(g, free, p)
        p = optax.apply_updates(p, moves)
    average = averaged_params(config, None, got, state)
    for name in p:
        np.testing.assert_allclose(got[name], p[name], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            average[name], optax.contrib.schedule_free_eval_params(free, p)[name], rtol=1e-4, atol=1e-5
        )
    assert np.abs(average["kernel"] - got["kernel"]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("name", ["muon", "schedule_free"])
def test_on_a_mesh_as_on_one_device(name):
    """Two whole steps; the state of the optimizer is placed as the parameters are."""
    results = []
    for sizes in (dict(data=1), dict(fsdp=2, tensor=2)):
        fields = {f"mesh__{axis}": size for axis, size in sizes.items()}
        config = small_config(optimizer__name=name, optimizer__schedule="constant", batch_size=4, **fields)
        mesh = make_mesh(config, jax.devices()[: math.prod(sizes.values())])
        model = LeakyModel()
        boxed, schedule = abstract_params(model, config), make_schedule(config.optimizer, config.steps)
        optimizer = make_optimizer(config.optimizer, boxed, schedule)
        with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
            abstract = abstract_state(model, optimizer, config, mesh, boxed)
            state = init_state(model, optimizer, config, abstract)
            step = make_train_step(model, optimizer, schedule, config, boxed)
            step = lower_train_step(step, abstract, config, mesh).compile()
            tokens = np.random.default_rng(0).integers(0, 16, (4, config.seq_len), np.int32)
            rows = dict(tokens=tokens, targets=np.roll(tokens, -1, 1), segment_ids=np.zeros_like(tokens))
            for _ in range(2):
                state, metrics = step(state, put_batch(rows, mesh))
        results.append((float(metrics["loss"]), jax.tree.map(np.asarray, state.params)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), results[0][1], results[1][1])


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(name="sgd"), "config.optimizer.name='sgd': must be one of 'adamw', 'muon', 'schedule_free'"),
        (dict(name="schedule_free"), "config.optimizer.schedule='cosine': must be 'constant' with optimizer.name="),
        (dict(name="schedule_free", schedule="constant", ema=0.9), "config.optimizer.ema=0.9: must be 0.0 with"),
        (
            dict(name="schedule_free", schedule="constant", groups="a=1"),
            "config.optimizer.groups='a=1': must be ''",
        ),
    ],
)
def test_optimizers_that_do_not_fit_are_refused(fields, words):
    with pytest.raises(UserError, match=re.escape(words)):
        validate(small_config(**{f"optimizer__{name}": value for name, value in fields.items()}))
