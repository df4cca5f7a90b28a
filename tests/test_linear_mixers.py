"""Linear attention, Performer, GLA and Mamba-3 against float64 forms of their papers' equations."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.config import validate
from seqmodels.configs import performer
from seqmodels.errors import UserError
from seqmodels.mixers.gla import Gla
from seqmodels.mixers.linear_attention import FEATURE_MAPS, LinearAttention
from seqmodels.mixers.mamba3 import Mamba3
from seqmodels.mixers.performer import Performer, draw_features, positive_features
from seqmodels.sequence import make_sequence
from seqmodels.training.step import random_streams

B, T, D = 2, 9, 8


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def perturbed(module, scale=0.4):
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2, D)), make_sequence(1, 2)[0])
    leaves, tree = jax.tree.flatten(nn.unbox(variables["params"]))
    return jax.tree.unflatten(tree, [scale * draw(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)])


def output(module, params, x):
    float32 = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), params)
    return module.apply({"params": float32}, jnp.asarray(x, jnp.float32), make_sequence(*x.shape[:2])[0])[0]


def close(got, want, tolerance=1e-5):
    assert np.abs(np.asarray(got) - want).max() < tolerance * want.std()


def heads(x, weight):
    return np.einsum("btd,dhk->bthk", x, weight)


def attend(scores, v):
    """Causal weights [B, H, T, T], not negative, normalised and applied to v [B, T, H, V]."""
    scores = np.tril(scores)
    return np.einsum("bhts,bshv->bthv", scores / scores.sum(-1, keepdims=True), v)


KERNELS = {  # similarity of q and k [B, H, T, T], written without features
    "elu": lambda q, k: product(np.where(q > 0, q + 1, np.exp(q)), np.where(k > 0, k + 1, np.exp(k))),
    "relu": lambda q, k: product(np.maximum(q, 0) + 1e-3, np.maximum(k, 0) + 1e-3),
    "softmax": lambda q, k: product(softmax(q, -1), softmax(k, -1)),
    "taylor": lambda q, k: 1 + (s := product(q, k) / q.shape[-1] ** 0.5) + s**2 / 2,
}


def product(q, k):
    return np.einsum("bthk,bshk->bhts", q, k)


def softmax(x, axis):
    x = np.exp(x - x.max(axis, keepdims=True))
    return x / x.sum(axis, keepdims=True)


@pytest.mark.parametrize("name", KERNELS)
def test_linear_attention_is_attention_with_another_kernel(name):
    module = LinearAttention(width=D, heads=2, feature_map=name)
    params, x = perturbed(module), draw(B, T, D, seed=7)
    q, k, v = (heads(x, params[f"{letter}_proj"]) for letter in "qkv")
    y = attend(KERNELS[name](q, k), v)
    close(output(module, params, x), np.einsum("bthv,hvd->btd", y, params["out_proj"]))
    assert set(KERNELS) == set(FEATURE_MAPS)


# Performer


@functools.partial(jax.jit, static_argnames=("features", "orthogonal", "draws"))
def kernel_estimates(q, k, features, orthogonal, draws=100):
    """Estimates [draws, n] of exp(q . k / sqrt(K)) for n pairs [n, K]."""
    shape = (1, len(q), 1, q.shape[-1])

    def one(key):
        w = draw_features(key, 1, features, q.shape[-1], orthogonal)
        phi = lambda x: positive_features(x.reshape(shape), w, False)[0, :, 0]  # noqa: E731
        return jnp.sum(phi(q) * phi(k), axis=-1)

    return jax.lax.map(one, jax.random.split(jax.random.key(3), draws))


def test_random_features_are_unbiased_and_their_error_falls_as_the_root_of_their_number():
    q, k = (jnp.asarray(0.6 * draw(20, 16, seed=s), jnp.float32) for s in (1, 2))
    exact = np.exp(np.sum(np.asarray(q) * np.asarray(k), -1) / 4)
    sizes = np.array([32, 128, 512])
    errors = {}
    for orthogonal in (False, True):
        estimates = [kernel_estimates(q, k, int(m), orthogonal) / exact for m in sizes]
        errors[orthogonal] = np.array([np.sqrt(np.mean((e - 1) ** 2)) for e in estimates])
        assert abs(np.mean(estimates[-1]) - 1) < 0.02
        slope = np.polyfit(np.log(sizes), np.log(errors[orthogonal]), 1)[0]
        assert -0.6 < slope < -0.4, slope
    assert (errors[True] < errors[False]).all(), errors


def test_orthogonal_directions():
    w = np.asarray(draw_features(jax.random.key(0), 2, 12, 8))
    assert w.shape == (2, 12, 8)
    for block in (w[0, :8], w[1, :8], w[0, 8:]):
        gram = block @ block.T
        assert np.abs(gram - np.diag(np.diag(gram))).max() < 1e-5
    lengths = np.linalg.norm(np.asarray(draw_features(jax.random.key(1), 64, 8, 8)), axis=-1)
    assert abs((lengths**2).mean() - 8) < 0.5 and lengths.std() > 0.5  # as of normal vectors


def test_performer_nears_softmax_attention():
    small, large = (Performer(width=D, heads=2, random_features=m) for m in (16, 4096))
    params, x = perturbed(small, 0.25), draw(B, T, D, seed=7)
    q, k, v = (heads(x, params[f"{letter}_proj"]) for letter in "qkv")
    want = np.einsum("bthv,hvd->btd", attend(np.exp(product(q, k) / 2), v), params["out_proj"])
    error = [np.sqrt(np.mean((output(module, params, x) - want) ** 2)) / want.std() for module in (small, large)]
    assert error[1] < 0.05 and error[1] < error[0] / 4


def test_a_huge_key_neither_changes_the_past_nor_overflows():
    """What stabilises the exponentials of keys must not know the later ones."""
    module = Performer(width=D, heads=2)
    params, x = perturbed(module), draw(B, T, D, seed=7)
    y = output(module, params, x)
    large = output(module, params, np.where(np.arange(T)[:, None] == 5, 100 * x, x))
    np.testing.assert_array_equal(y[:, :5], large[:, :5])
    assert np.isfinite(large).all()


def test_features_are_redrawn_by_the_schedule():
    config = performer.get_config()
    assert set(random_streams(config, 3)) == {"dropout"}
    config.model.performer.redraw = 10
    keys = [jax.random.key_data(random_streams(config, step)["features"]).tolist() for step in (0, 9, 10, 19, 20)]
    assert keys[0] == keys[1] != keys[2] == keys[3] != keys[4]
    module = Performer(width=D, heads=2, redraw=10)
    params, x = perturbed(module), jnp.asarray(draw(B, T, D), jnp.float32)
    params = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), params)
    run = lambda **rngs: module.apply({"params": params}, x, make_sequence(B, T)[0], rngs=rngs)[0]  # noqa: E731
    first, second = run(features=jax.random.key(0)), run(features=jax.random.key(1))
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(run(), run(dropout=jax.random.key(0)))  # in evaluation: those of the seed
    config.training.bptt = True
    with pytest.raises(UserError, match=r"performer.redraw=10: must be 0 with training.bptt"):
        validate(config)


# GLA


def test_gla_is_its_recurrence():
    module = Gla(width=D, heads=2)
    params, x = perturbed(module, 0.8), draw(B, T, D, seed=7)
    params["decay_bias"] = params["decay_bias"] - 20  # decays of a tenth a token too
    q, k, v, gate = (heads(x, params[f"{name}_proj"]) for name in ("q", "k", "v", "gate"))
    number = heads(x @ params["decay_in"], params["decay_out"]) + params["decay_bias"].reshape(2, 2)
    decay = (1 / (1 + np.exp(-number))) ** (1 / 16)
    state, ys = np.zeros((B, 2, 2, 4)), []
    for t in range(T):
        state = decay[:, t, ..., None] * state + k[:, t, ..., None] * v[:, t, :, None]
        ys.append(np.einsum("bhk,bhkv->bhv", q[:, t] * 2**-0.5, state))
    y = np.stack(ys, 1)
    y = params["scale"] * y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * gate / (1 + np.exp(-gate))
    assert decay.min() < 0.3
    close(output(module, params, x), np.einsum("bthv,hvd->btd", y, params["out_proj"]))


# Mamba-3


def softplus(x):
    return np.logaddexp(0, x)


def mamba3_step_by_step(p, x, H, P, N, G, turned, activation):
    """One token after the other, in the order of the paper's equations."""
    rms = lambda v, scale: scale * v / np.sqrt((v**2).mean(-1, keepdims=True) + 1e-5)  # noqa: E731
    S, key, value = np.zeros((B, H, N, P)), np.zeros((B, H, N)), np.zeros((B, H, P))
    phase, ys = np.zeros((B, H, turned // 2)), []
    for t in range(x.shape[1]):
        token = x[:, t]
        z, u = token @ p["in_proj"][:, 0], (token @ p["in_proj"][:, 1]).reshape(B, H, P)
        keys, queries = np.split(token @ p["BC_proj"], 2, -1)
        number = np.einsum("bd,dch->cbh", token, p["head_proj"])
        dt, share = softplus(number[0] + p["dt_bias"]), 1 / (1 + np.exp(-number[2]))
        a = np.exp(-dt * np.maximum(activation(number[1]), 1e-4))
        phase = phase + dt[..., None] * (np.pi * np.tanh(token @ p["angle_proj"]))[:, None]

        def spread(v, scale, bias, phase=phase):
            v = np.repeat(rms(v.reshape(B, G, N), scale), H // G, axis=1) + bias.reshape(H, N)
            c = (v[..., :turned:2] + 1j * v[..., 1:turned:2]) * np.exp(1j * phase)
            return np.concatenate([np.stack([c.real, c.imag], -1).reshape(B, H, turned), v[..., turned:]], -1)

        k, q = spread(keys, p["B_norm"], p["B_bias"]), spread(queries, p["C_norm"], p["C_bias"])
        write = lambda k, v: k[..., None] * v[..., None, :]  # noqa: E731
        number4 = lambda v: v[..., None, None]  # noqa: E731
        S = number4(a) * (S + number4((1 - share) * dt) * write(key, value)) + number4(share * dt) * write(k, u)
        key, value = k, u
        y = np.einsum("bhn,bhnp->bhp", q, S) + p["D"][:, None] * u
        ys.append((y.reshape(B, -1) * z / (1 + np.exp(-z))) @ p["out_proj"])
    return np.stack(ys, 1)


@pytest.mark.parametrize(
    "activation, rotated",
    [pytest.param("heavy_tail", 0.5, marks=pytest.mark.slow), pytest.param("softplus", 1.0, marks=pytest.mark.slow)],
)
def test_mamba3_is_its_recurrence(activation, rotated):
    H, P, N, G = 4, 4, 8, 2
    sizes = dict(state=N, head_dim=P, groups=G, rotated=rotated, A_activation=activation)
    module = Mamba3(width=D, **sizes)
    params, x = perturbed(module), draw(B, T, D, seed=7)
    formula = dict(softplus=softplus, heavy_tail=lambda v: np.where(v >= 0, 1 + v, 1 / (1 - np.minimum(v, 0))))
    want = mamba3_step_by_step(params, x, H, P, N, G, int(N * rotated), formula[activation])
    close(output(module, params, x), want)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Mamba3(width=D, rotated=0.3), "config.model.mamba3.rotated=0.3: must be one of 0.5, 1.0"),
        (
            lambda: Mamba3(width=D, A_activation="exp"),
            "config.model.mamba3.A_activation='exp': must be one of 'heavy_tail', 'softplus'",
        ),
        (
            lambda: Mamba3(width=D, head_dim=5),
            r"config.model.mamba3.head_dim=5: must be a divisor of expand \* model.width = 16",
        ),
        (lambda: Gla(width=D, heads=8), "config.model.gla.heads=8: must be half a divisor of model.width=8"),
        (
            lambda: LinearAttention(width=D, feature_map="cos"),
            "config.model.linear_attention.feature_map='cos': must be one of 'elu', 'relu'",
        ),
        (
            lambda: LinearAttention(width=D, heads=3),
            "config.model.linear_attention.heads=3: must be a divisor of model.width=8",
        ),
        (lambda: Performer(width=D, heads=3), "config.model.performer.heads=3: must be a divisor of model.width=8"),
        (lambda: Performer(width=D, random_features=0), "config.model.performer.random_features=0: must be at least 1"),
    ],
)
def test_bad_fields_are_named(build, message):
    with pytest.raises(UserError, match=message):
        build()
