"""The branch of experts against a dense computation: every token through every expert, times its weight or zero."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from seqmodels.backbone import branch_of
from seqmodels.channels.moe import Moe
from seqmodels.configs.base import base
from seqmodels.errors import UserError
from seqmodels.fields.moe import MOE
from seqmodels.layers import routing
from seqmodels.model import build
from seqmodels.sequence import make_sequence
from seqmodels.training import side
from seqmodels.training.flops import forward_flops_per_token

B, T, D, X, K = 2, 8, 6, 4, 2
MASK = np.array([[1, 1, 0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1, 1]], bool)
TRAINING = {"dropout": jax.random.key(0)}


def moe(**options):
    return Moe(D, **dict(experts=X, top_k=K, hidden=5) | options)


def draw(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def parameters(**options):
    """Perturbed, and with a router that sees more than noise."""
    seq = make_sequence(B, T)[0]
    shapes = nn.unbox(jax.eval_shape(moe(**options).init, jax.random.key(0), jnp.zeros((B, T, D)), seq))["params"]
    params = {name: draw(v.shape, seed) for seed, (name, v) in enumerate(sorted(shapes.items()))}
    return params | {name: 0.2 * v for name, v in params.items() if name == "router_bias"}


@functools.partial(jax.jit, static_argnames=("module", "collect", "training"))
def call(module, params, x, mask=None, collect=(), training=False):
    """y, and what the branch reports."""
    seq, _, _ = make_sequence(*x.shape[:2], mask=mask)
    rngs = TRAINING if training else {}
    (y, _), reported = module.apply({"params": params}, x, seq, rngs=rngs, mutable=list(collect))
    return y, reported


def dense_weights(module, params, x):
    """[B, T, X], the weight of every expert, 0 for those that are not chosen."""
    logits = x @ params["router"]
    if module.router == "sigmoid":
        scores = jax.nn.sigmoid(logits)
        order = jnp.argsort(-(scores + params["router_bias"]), axis=-1)
    else:
        scores = jax.nn.softmax(logits)
        order = jnp.argsort(-scores, axis=-1)
    rank = jnp.argsort(order, axis=-1)
    weights = jnp.where(rank < module.top_k, scores, 0)
    if module.router != "softmax":
        weights /= weights.sum(-1, keepdims=True)
    return module.scale * weights


def dense(module, params, x, kept=True):
    """Every expert on every token; `kept` [B, T, X] selects weights."""
    product = jnp.einsum("btd,edgf->btegf", x, params["gate_up"])
    hidden = jax.nn.silu(product[..., 0, :]) * product[..., 1, :]
    each = jnp.einsum("btef,efd->bted", hidden, params["down"])
    y = jnp.einsum("bted,bte->btd", each, jnp.where(kept, dense_weights(module, params, x), 0))
    if module.shared:
        gate, up = (x @ params["shared_gate_up"][:, i] for i in range(2))
        y += (jax.nn.silu(gate) * up) @ params["shared_down"]
    return y


def close(ours, wanted, tolerance=1e-5):
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(wanted), strict=True):
        b = np.asarray(b, np.float64)
        error = np.abs(np.asarray(a, np.float64) - b).max() / max(np.abs(b).max(), 1e-3)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: {error:.1e}"


def compare(module, params, x, kept=True, **options):
    """Values and all gradients, ours in float32 against the dense ones in float64."""
    target = draw(x.shape, 9)
    y, gradients = jax.value_and_grad(
        lambda p, x: (jnp.sum(target * (y := call(module, p, x, **options)[0])), y), argnums=(0, 1), has_aux=True
    )(params, x)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), (params, x, target))
        loss = lambda p, x: (jnp.sum(wide[2] * (y := dense(module, p, x, kept))), y)  # noqa: E731
        want, want_gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(*wide[:2])
    gradients[0].pop("router_bias", None), want_gradients[0].pop("router_bias", None)  # see test_routing.py
    close((y[1], gradients), (want[1], want_gradients))
    return gradients[0]


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(router="renormalised"),
        dict(router="sigmoid", scale=2.5, shared=2),
        pytest.param(dict(top_k=1), marks=pytest.mark.slow),
        pytest.param(dict(top_k=X), marks=pytest.mark.slow),
    ],
    ids=["softmax", "renormalised", "sigmoid, shared", "one", "all"],
)
def test_dropless_equals_dense_in_values_and_gradients(options):
    module, params = moe(**options), parameters(**options)
    gradients = compare(module, params, draw((B, T, D)))
    assert all(np.abs(gradient).max() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("favourites", [(2,), (0, 3)])
def test_experts_without_tokens(favourites):
    """All tokens go to the same experts; those of the others have a gradient of zero."""
    module, params, x = moe(top_k=len(favourites)), dict(parameters()), draw((B, T, D))
    x[..., 0] = 1
    params["router"] = params["router"].copy()
    params["router"][0, list(favourites)] += 50
    gradients = compare(module, params, x)
    for expert in range(X):
        moved = [bool(np.abs(gradients[name][expert]).max() > 0) for name in ("gate_up", "down")]
        assert moved == [expert in favourites] * 2
    figures = call(module, params, x, collect=("figures",))[1]["figures"]
    assert figures["idle_experts"][0] == X - len(favourites) and figures["router_collapsed"][0] == 1
    assert figures["max_load"][0] == X / len(favourites)


# Capacity


def within(module, params, x, capacity):
    """[B, T, X]: whether an expert takes a token, by counting; and the share of picks that it does not take."""
    picks = np.asarray(dense_weights(module, params, x)) > 0
    kept = np.cumsum(picks, axis=1) <= capacity
    return kept, (picks & ~kept).sum() / picks.sum()


def test_capacity_drops_the_last_tokens_of_a_row():
    """Their weights are zero, and those of the others stay: values, gradients and the reported share."""
    module, params, x = moe(capacity=0.75), parameters(), draw((B, T, D))
    kept, dropped = within(module, params, x, 3)  # 0.75 * K T / X
    assert 0.05 < dropped < 0.5
    compare(module, params, x, kept, training=True)
    figures = call(module, params, x, collect=("figures",), training=True)[1]["figures"]
    assert figures["dropped_fraction"][0] == pytest.approx(dropped)


def test_a_large_capacity_drops_nothing():
    params, x = parameters(), draw((B, T, D))
    y, reported = call(moe(capacity=float(X)), params, x, collect=("figures",), training=True)
    np.testing.assert_array_equal(y, call(moe(), params, x)[0])
    assert reported["figures"]["dropped_fraction"][0] == 0


def test_evaluation_and_decoding_drop_nothing():
    """So a row equals its tokens one by one, whatever the capacity."""
    module, params, x = moe(capacity=0.25), parameters(), draw((B, T, D))
    y, _ = call(module, params, x)
    np.testing.assert_array_equal(y, call(moe(), params, x)[0])
    single = jnp.concatenate([call(module, params, x[:, t : t + 1])[0] for t in range(T)], axis=1)
    close(single, y)
    assert np.abs(call(module, params, x, training=True)[0] - y).max() > 0.1


def test_padding_takes_no_room():
    """NaN in it reaches nothing, and tokens behind it are not dropped for it."""
    module, params, x = moe(capacity=1.0), parameters(), draw((B, T, D))
    bad = np.where(MASK[..., None], x, np.nan)
    y, reported = call(module, params, bad, MASK, ("figures",), training=True)
    assert not y[~MASK].any()
    picks = (np.asarray(dense_weights(module, params, x)) > 0) & MASK[..., None]
    kept = np.cumsum(picks, axis=1) <= 4
    assert reported["figures"]["dropped_fraction"][0] == pytest.approx((picks & ~kept).sum() / picks.sum())
    close(y[MASK], dense(module, params, jnp.asarray(x), kept)[MASK])


# What it reports


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_losses_and_figures_do_not_count_padding(router):
    module, params, x = moe(router=router), parameters(router=router), draw((B, T, D))
    bad = np.where(MASK[..., None], x, np.nan)
    _, padded = call(module, params, bad, MASK, ("losses", "figures"))
    _, bare = call(module, params, x[MASK][None], None, ("losses", "figures"))
    close(padded, bare)
    rows = x[MASK]
    picks = np.asarray(dense_weights(module, params, rows[None]))[0] > 0
    logits = rows @ params["router"]
    scores = np.asarray(jax.nn.softmax(logits) if router == "softmax" else jax.nn.sigmoid(logits))
    p = scores / scores.sum(-1, keepdims=True)
    losses, figures = padded["losses"], padded["figures"]
    assert losses["balance_loss"][0] == pytest.approx(0.01 * X * (picks.mean(0) * p.mean(0)).sum(), rel=1e-5)
    wide = np.log(np.exp(logits).sum(-1))
    assert losses["router_z_loss"][0] == pytest.approx(0.001 * (wide**2).mean(), rel=1e-5)
    assert figures["max_load"][0] == pytest.approx(picks.sum(0).max() / picks.sum(0).mean())
    assert figures["router_entropy"][0] == pytest.approx((-p * np.log(p)).sum(-1).mean(), rel=1e-5)
    assert figures["router_collapsed"][0] == 0 and "dropped_fraction" not in figures


def test_losses_without_a_coefficient_are_not_reported():
    module = moe(balance=0.0, z_loss=0.0)
    assert not call(module, parameters(), draw((B, T, D)), collect=("losses",))[1]


@pytest.mark.slow
def test_logits_of_every_layer_through_the_scan_over_blocks():
    """And the pooled loss of them, which differs from the mean over the layers."""
    config = base().unlock()
    config.model.pattern, config.model.repeats, config.model.width = "moe mlp+moe", 2, 8
    config.model.moe, config.model.mlp = MOE.defaults(experts=X, hidden=4), dict(hidden=4)
    rows = np.random.default_rng(0).integers(0, 11, (B, T))
    found = []
    for scan in (0, 1):
        config.model.scan_blocks = scan
        model = build(config.model, 11)

        @jax.jit
        def logits(key, model=model):
            params = nn.unbox(model.init(key, rows[:1])["params"])
            return model.apply({"params": params}, rows, mutable=[side.ROUTING])[1][side.ROUTING]

        found.append(side.by_layer(logits(jax.random.key(0)), config.model))
        assert sorted(found[-1]) == [f"logits/{layer}" for layer in range(4)]
        assert all(values[0].shape == (B, T, X) for values in found[-1].values())
    layers = [values[0] for values in found[1].values()]
    pooled = routing.pooled_load_balance_loss(layers, K)
    each = [routing.pooled_load_balance_loss([layer], K) for layer in layers]
    assert abs(pooled - np.mean(each)) > 1e-4


# Options


def test_active_parameters_and_operations():
    config = base().unlock()
    config.model.pattern, config.model.repeats, config.model.width = "moe", 3, 8
    config.model.moe = MOE.defaults(experts=16, top_k=2, hidden=5, shared=1)
    branch = branch_of(config.model, "moe", parent=None)
    assert branch.idle_parameters() == 14 * 3 * 8 * 5

    def operations():
        model = build(config.model, 11)
        boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, T), jnp.int32))["params"]
        return forward_flops_per_token(boxed, config.model, T)

    many = operations()
    config.model.moe.experts = 2
    assert many - operations() == 3 * 2 * 14 * 8  # only the router is larger


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(top_k=9), r"config.model.moe.top_k=9: must be at most model.moe.experts=8"),
        (dict(top_k=1, router="sigmoid"), r"config.model.moe.top_k=1: must be at least 2 with router='sigmoid'"),
        (dict(capacity=-1.0), r"config.model.moe.capacity=-1.0: must be at least 0"),
        (dict(router="softmx"), r"did you mean 'softmax'\?"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        Moe(D, **options)
