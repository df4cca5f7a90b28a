"""Experts on a mesh equal experts on one device, in value and gradient; the exchange of rows equals its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from seqmodels.channels.experts import run_experts
from seqmodels.configs.base import base
from seqmodels.errors import UserError
from seqmodels.fields.moe import MOE
from seqmodels.layers import exchange, routing
from seqmodels.model import build
from seqmodels.training import sharding
from seqmodels.training.optimizer import make_optimizer, make_schedule
from seqmodels.training.state import abstract_params, abstract_state, init_state
from seqmodels.training.step import lower_train_step, make_train_step
from tests.training_model import random_batch

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")

B, T, D, F, X, K = 8, 6, 6, 4, 8, 3


def make_mesh(**sizes):
    shape = tuple(sizes.get(axis, 1) for axis in sharding.AXES)
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, sharding.AXES, axis_types=(AxisType.Auto,) * len(shape), devices=devices)


# The exchange


def test_padded_exchange_is_its_definition_there_and_back():
    """Uneven counts, some zero; the gradient is the exchange back; what is behind the rows has no effect."""
    devices, width = 4, 3
    draw = np.random.default_rng(0)
    counts = draw.integers(0, 4, (devices, devices)).astype(np.int32)
    counts[1], counts[:, 2] = 0, [3, 0, 0, 3]
    sent = counts.sum(1)
    sizes = exchange.Sizes(int(sent.max()) + 2, int(counts.sum(0).max()) + 1, 3)
    rows = draw.normal(size=(devices, sizes.sent, width)).astype(np.float32)
    for device in range(devices):
        rows[device, sent[device] :] = np.nan
    wanted = np.zeros((devices, sizes.received, width), np.float32)
    for target in range(devices):
        parts = [rows[s, counts[s, :target].sum() :][: counts[s, target]] for s in range(devices)]
        got = np.concatenate(parts)
        wanted[target, : len(got)] = got

    mesh = jax.make_mesh((devices,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    function = functools.partial(exchange.exchange, counts=jnp.asarray(counts), sizes=sizes, axis="expert")
    flat = P("expert", None)
    move = jax.shard_map(function, mesh=mesh, in_specs=flat, out_specs=flat, check_vma=False)

    @jax.jit
    def both(rows, target):
        y, pull = jax.vjp(move, rows)
        return y, pull(target)[0]

    y, back = both(rows.reshape(-1, width), wanted.reshape(-1, width))
    np.testing.assert_array_equal(y.reshape(wanted.shape), wanted)
    real = np.arange(sizes.sent) < sent[:, None]
    np.testing.assert_array_equal(back.reshape(rows.shape), np.where(real[..., None], rows, 0))


# The experts


def arrays():
    draw = np.random.default_rng(0)
    x, target = (draw.normal(size=(B, T, D)).astype(np.float32) for _ in range(2))
    logits = 2 * draw.normal(size=(B, T, X)).astype(np.float32)
    logits[..., 5] -= 20  # an expert without tokens
    gate_up = draw.normal(size=(X, D, 2, F)).astype(np.float32)
    down = draw.normal(size=(X, F, D)).astype(np.float32)
    return x, logits, gate_up, down, target


@functools.partial(jax.jit, static_argnames="limit")
def step(x, logits, gate_up, down, target, limit=0):
    """Output, and the gradients of everything, with padding of which the rows hold NaN."""
    mask = jnp.asarray(np.random.default_rng(1).random((B, T)) < 0.8)

    def loss(x, logits, gate_up, down):
        route = routing.send_nowhere(routing.softmax_route(logits, K), mask[..., None], X)
        if limit:
            route = routing.send_nowhere(route, routing.within_capacity(route.experts, X, limit), X)
        y = run_experts(x, route, gate_up, down, limit=limit)
        return jnp.sum(jnp.where(mask[..., None], y * target, 0)), y

    padded = jnp.where(mask[..., None], x, jnp.nan)
    gradients, y = jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(padded, logits, gate_up, down)
    return y, jnp.where(mask[..., None], gradients[0], 0), *gradients[1:]


MESHES = [  # and how many tokens of a row an expert takes
    (dict(data=2, tensor=2, expert=2), 0),
    (dict(fsdp=2, expert=4), 2),
    (dict(expert=8), 0),
    (dict(expert=8), 2),
    (dict(sequence=2, expert=4), 2),
    (dict(data=4, sequence=2), 0),
    (dict(fsdp=4, tensor=2), 0),
    (dict(data=8), 2),
    (dict(tensor=4), 0),
]


def name(sizes):
    return " ".join(f"{axis}={size}" for axis, size in sizes.items())


def marked(cases):
    """The first is quick, the others are slow."""
    return [pytest.param(*case, id=name(case[0]), marks=pytest.mark.slow if i else ()) for i, case in enumerate(cases)]


@pytest.mark.parametrize("sizes, limit", marked(MESHES))
def test_experts_on_a_mesh(sizes, limit):
    given = arrays()
    wanted = step(*given, limit=limit)
    mesh = make_mesh(**sizes)
    axes = (
        ("batch", "length", None),
        ("batch", "length", None),
        ("expert", "embed", None, "mlp"),
        ("expert", "mlp", "embed"),
    )
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        placed = [
            jax.device_put(v, NamedSharding(mesh, sharding.spec_of(names, v.shape, mesh)))
            for v, names in zip(given, (*axes, axes[0]), strict=True)
        ]
        got = step(*placed, limit=limit)
        if sizes.get("fsdp") == 2:  # it divides D: a device adds up its part of the weights' gradients, not the whole
            assert "reduce_scatter" in str(jax.make_jaxpr(functools.partial(step, limit=limit))(*placed))
    for ours, one in zip(got, wanted, strict=True):
        np.testing.assert_allclose(ours, one, rtol=1e-5, atol=1e-5 * np.abs(one).max())


def test_rows_that_do_not_divide_meet_all_experts():
    """One row, as in decoding: every device has it, runs the experts that it holds, and the results are added."""
    x, logits, gate_up, down, _ = arrays()
    route = routing.softmax_route(logits[:1, :1], K)
    run = jax.jit(lambda x, route, *weights: run_experts(x, route, *weights))
    wanted = run(x[:1, :1], route, gate_up, down)
    with jax.set_mesh(make_mesh(expert=4, tensor=2)), nn.logical_axis_rules(sharding.RULES):
        got = run(x[:1, :1], route, gate_up, down)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


# A step of training


def one_step(options, **overrides):
    """Metrics and parameters after a step, the same batch and the same first parameters on every mesh."""
    config = base().unlock()
    config.model.pattern, config.model.width, config.model.repeats, config.model.scan_blocks = "moe", 8, 2, 1
    config.model.moe = MOE.defaults(experts=4, hidden=8, **options)
    config.batch_size, config.seq_len, config.mesh.data = 8, 8, 1
    config.optimizer.warmup, config.steps = 0, 2
    for dotted, value in overrides.items():
        config[dotted.split("__")[0]][dotted.split("__")[1]] = value
    model, mesh = build(config.model, 16), sharding.make_mesh(config)
    boxed = abstract_params(model, config)
    optimizer = make_optimizer(config.optimizer, boxed)
    abstract = abstract_state(model, optimizer, config, mesh)
    train_step = make_train_step(model, optimizer, make_schedule(config.optimizer, config.steps), config, boxed)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        compiled = lower_train_step(train_step, abstract, config, mesh).compile()
        state = init_state(model, optimizer, config, abstract)
        before = jax.device_get(state.params)
        state, values = compiled(state, sharding.put_batch(random_batch(0, config, 16), mesh))
    return {name: float(value) for name, value in values.items()}, before, jax.device_get(state.params)


@pytest.mark.parametrize("pieces", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_step_on_a_mesh(pieces):
    """The same losses, loads over all devices, gradients, and bias of the router. In micro-batches too, which the
    devices of `data` go through apart."""
    options = dict(router="sigmoid", shared=1, capacity=1.25, balance=0.1)
    wanted, before, after = one_step(options, training__accumulate=pieces)
    got, _, moved = one_step(options, training__accumulate=pieces, mesh__data=2, mesh__expert=2, mesh__tensor=2)
    assert got.keys() == wanted.keys() and 0 < wanted["dropped_fraction/0"] < 0.5
    for metric, value in wanted.items():
        assert got[metric] == pytest.approx(value, rel=1e-5, abs=1e-7), metric
    bias = [tree["blocks"]["block_0"]["mixer"]["router_bias"] for tree in (before, after, moved)]
    np.testing.assert_array_equal(bias[1], bias[2])
    assert np.abs(bias[1] - bias[0]).max() == pytest.approx(0.001)


def test_an_expert_axis_that_does_not_divide_the_experts_is_refused():
    with pytest.raises(UserError, match=r"^config.mesh.expert=8: must be a divisor of the 4 experts of a layer$"):
        one_step({}, mesh__expert=8)
