"""Experts in training: loads over micro-batches, the bias that balances them, a run and its log."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from seqmodels.channels.moe import Moe
from seqmodels.configs.base import base
from seqmodels.fields.attention import ATTENTION
from seqmodels.fields.moe import MOE
from seqmodels.layers.parameter import Parameter
from seqmodels.model import build
from seqmodels.sequence import make_sequence
from seqmodels.training import loop, metrics, sharding, side
from seqmodels.training.micro_batches import split_rows
from seqmodels.training.optimizer import global_norm, make_optimizer, make_schedule, sign_rule
from seqmodels.training.state import abstract_params, abstract_state, init_state
from seqmodels.training.step import lower_train_step, make_loss, make_train_step, random_streams
from tests.array_data import ArrayDataset
from tests.training_model import random_batch

X, K, PIECES = 4, 2, 2


def settings(**options):
    """Two layers under a scan over blocks, rematerialised; micro-batches."""
    config = base().unlock()
    config.model.pattern, config.model.width, config.model.repeats = "moe", 8, 2
    config.model.scan_blocks, config.model.remat = 1, "block"
    config.model.moe = MOE.defaults(**dict(experts=X, hidden=8) | options)
    config.batch_size, config.seq_len, config.mesh.data, config.steps = 4, 8, 1, 4
    config.training.accumulate, config.optimizer.warmup = PIECES, 0
    return config


@functools.cache
def one_step():
    """Config, model, batch, parameters before and after one step, and the metrics of the step."""
    config = settings(router="sigmoid")
    model, mesh = build(config.model, 16), sharding.make_mesh(config)
    boxed = abstract_params(model, config)
    optimizer = make_optimizer(config.optimizer, boxed)
    abstract = abstract_state(model, optimizer, config, mesh)
    train_step = make_train_step(model, optimizer, make_schedule(config.optimizer, config.steps), config, boxed)
    batch = random_batch(0, config, 16)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        compiled = lower_train_step(train_step, abstract, config, mesh).compile()
        state = init_state(model, optimizer, config, abstract)
        # so that the router is no toss-up between equal sigmoids
        state = state.replace(params=jax.tree.map(lambda x: x * (4 if x.ndim > 1 else 1), state.params))
        before = jax.device_get(state.params)
        state, values = compiled(state, sharding.put_batch(batch, mesh))
    return config, model, batch, before, jax.device_get(state), {name: float(v) for name, v in values.items()}


@functools.cache
def of_each_piece():
    """By layer and micro-batch: the load [X] and the mean probabilities [X]."""
    config, model, batch, params, *_ = one_step()
    pieces = split_rows(batch, PIECES)

    @jax.jit
    def logits(rows):
        apply = functools.partial(model.apply, {"params": params}, rows["tokens"], segment_ids=rows["segment_ids"])
        return side.by_layer(apply(mutable=[side.ROUTING])[1][side.ROUTING], config.model)

    load, probabilities = np.zeros((2, PIECES, X)), np.zeros((2, PIECES, X))
    for i in range(PIECES):
        for layer in range(2):
            (values,) = logits(jax.tree.map(lambda x, i=i: x[i], pieces))[f"logits/{layer}"]
            scores = 1 / (1 + np.exp(-np.asarray(values, np.float64)))
            picks = np.argsort(-scores, axis=-1)[..., :K]
            load[layer, i] = np.bincount(picks.ravel(), minlength=X)
            probabilities[layer, i] = (scores / scores.sum(-1, keepdims=True)).mean((0, 1))
    return load, probabilities


@pytest.mark.slow
def test_the_balance_loss_sees_the_load_of_the_micro_batches_before():
    """The last one sees the load of the whole batch."""
    *_, values = one_step()
    load, probabilities = of_each_piece()
    tokens = 4 // PIECES * 8
    so_far = np.cumsum(load, axis=1) / (tokens * np.arange(1, PIECES + 1)[:, None])
    own = load / tokens
    for layer in range(2):
        seen, alone = (0.01 * X * (f[layer] * probabilities[layer]).sum(-1).mean() for f in (so_far, own))
        assert values[f"balance_loss/{layer}"] == pytest.approx(seen, rel=1e-5)
        assert abs(seen - alone) > 1e-4 * seen


def test_the_bias_goes_against_the_load_of_the_whole_batch():
    """By the same amount everywhere, whatever the learning rate; nothing else knows of it."""
    *_, before, state, values = one_step()
    load, _ = of_each_piece()
    excess = load.sum(1) - load.sum(1).mean(-1, keepdims=True)
    bias = [tree["blocks"]["block_0"]["mixer"]["router_bias"] for tree in (before, state.params)]
    np.testing.assert_allclose(bias[1] - bias[0], -0.001 * np.sign(excess), atol=1e-9)
    assert np.sign(excess).any() and values["grad_norm"] < 10  # the load alone would make it more
    assert values["skipped"] == 0
    moments = [tree["blocks"]["block_0"]["mixer"] for tree in state.opt_state[1][1:]]
    assert all(not m["router_bias"].any() and m["router"].any() for m in moments)


def test_debugging_and_measuring_call_the_loss_without_micro_batches():
    """What they pass is what they always passed; every batch then stands for itself."""
    config, model, batch, params, *_ = one_step()
    (_, reports), _, running = jax.jit(make_loss(model, config))(params, batch, None, random_streams(config, 0))[1]
    load, probabilities = of_each_piece()
    f, p = load.sum(1) / (4 * 8), probabilities.mean(1)
    for layer in range(2):
        total = reports.losses[f"balance_loss/{layer}"] / np.prod(batch["targets"].shape)
        assert total == pytest.approx(0.01 * X * (f[layer] * p[layer]).sum(), rel=1e-5)
    assert running == {}


def test_a_rule_of_signs():
    """Gradients without those of the rule's parameters, and their steps; None where there are none."""
    boxed = {"a": Parameter(jnp.zeros((2, 2)), (None, None)), "b": Parameter(jnp.zeros(3), (None,), sign_step=0.5)}
    assert sign_rule({"a": boxed["a"]}) is None
    grads, moves = sign_rule(boxed)({"a": jnp.ones((2, 2)), "b": jnp.array([3.0, 0.0, -9.0])})
    assert global_norm(grads) == 2
    np.testing.assert_array_equal(moves["b"], [0.5, 0, -0.5])
    assert moves["a"] == 0
    frozen = sign_rule({"b": Parameter(jnp.zeros(3), (None,), sign_step=0.0)})
    assert not frozen({"b": jnp.ones(3)})[1]["b"].any()


def test_the_bias_balances_a_router_that_prefers_two_experts():
    """The router itself does not learn here."""
    module = Moe(8, experts=X, top_k=K, hidden=4, router="sigmoid", bias_rate=0.02)
    x = jax.random.normal(jax.random.key(0), (4, 64, 8))
    seq, _, _ = make_sequence(4, 64)
    boxed = jax.jit(module.init)(jax.random.key(1), x, seq)["params"]
    params = nn.unbox(boxed)
    params["router"] = params["router"] * 10
    x = x.at[..., 0].set(1)
    params["router"] = params["router"].at[0].set(jnp.array([1.0, 0.8, 0, 0]))
    rule = sign_rule(boxed)

    @jax.jit
    def step(params):
        def loss(params):
            (y, _), reported = module.apply({"params": params}, x, seq, mutable=["figures"])
            return y.sum(), reported["figures"]["max_load"][0]

        grads, most = jax.grad(loss, has_aux=True)(params)
        return optax.tree.sub(params, rule(grads)[1]), most

    loads = []
    for _ in range(40):
        params, most = step(params)
        loads.append(float(most))
    assert loads[0] > 1.5 and max(loads[-5:]) < 1.15


def constant(rng, count, length=8):
    """Rows of one and the same token: whatever the router does, it does it with all of them."""
    return {
        "tokens": np.ones((count, length), np.int32),
        "mask": np.ones((count, length), bool),
        "labels": rng.integers(0, 2, count).astype(np.int32),
    }


@pytest.mark.slow
def test_a_run_tells_of_the_load_and_of_a_router_that_collapsed(tmp_path, capsys):
    config = base().unlock()
    config.model.pattern, config.model.head = "attention+moe", "classify"
    config.model.width, config.model.repeats, config.model.scan_blocks = 8, 2, 1
    config.model.attention, config.model.moe = ATTENTION.defaults(heads=2), MOE.defaults(experts=X, hidden=8)
    config.batch_size, config.seq_len, config.mesh.data, config.steps = 4, 8, 1, 3
    data = ArrayDataset("classify", constant, 4, {"tokens": 2, "labels": 2}, rows=4)
    loop.train(config, tmp_path / "run", data)
    rows = [row for row in metrics.read(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert len(rows) == 3
    for row in rows:
        for layer in range(2):
            assert row[f"max_load/{layer}"] == X / K and row[f"idle_experts/{layer}"] == X - K
            assert row[f"router_collapsed/{layer}"] == 1 and 0 < row[f"router_entropy/{layer}"] < np.log(X)
            assert row[f"balance_loss/{layer}"] > 0 and row[f"router_z_loss/{layer}"] > 0
        assert row["balance_loss"] == pytest.approx(row["balance_loss/0"] + row["balance_loss/1"])
    captured = capsys.readouterr()
    assert "kernel   grouped_matmul: xla" in captured.out
    for layer in range(2):
        assert (
            captured.err.count(f"step 1: warning: layer {layer}: its router sends all tokens to the same experts") == 1
        )
    assert captured.err.count("warning: layer") == 2
