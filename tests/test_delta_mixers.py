"""DeltaNet and Gated DeltaNet: their equations in float64, and the operation of transformers.

Theirs run the recurrence in float32 whatever the model's dtype, so rounding is both sides'. Measured: outputs, states
and gradients differ by at most 6e-6 of their norm. test_parity_delta.py has Qwen3-Next and OLMo Hybrid.
"""

import functools
import importlib
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.configs import deltanet, densemamba, gated_deltanet
from seqmodels.errors import UserError
from seqmodels.kernels.delta_rule import delta_rule
from seqmodels.mixers.deltanet import DeltaNet
from seqmodels.mixers.gated_deltanet import GatedDeltaNet
from seqmodels.model import build
from seqmodels.sequence import make_sequence

B, T, D = 2, 13, 16


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def perturbed(module, scale=0.4):
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2, D)), make_sequence(1, 2)[0])
    leaves, tree = jax.tree.flatten(nn.unbox(variables["params"]))
    return jax.tree.unflatten(tree, [scale * draw(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)])


def near(ours, theirs, tolerance=1e-5):
    for (path, x), want in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        error = np.linalg.norm(np.asarray(x, np.float64) - want) / np.linalg.norm(want)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: relative error {error:.1e}"


@functools.partial(jax.jit, static_argnums=0)
def apply(module, params, x, state=None):
    return module.apply({"params": params}, x, make_sequence(*x.shape[:2])[0], state)


# Equations


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def equations(module, p, x):
    """The mixer in float64, token by token: y [B, T, D] and the last states [B, H, K, V]."""
    (groups, keys), (heads, values) = module.key_shape, module.value_shape

    def stream(name, heads, size):
        flat = np.einsum("btd,dhk->bthk", x, p[f"{name}_proj"]).reshape(B, T, -1)
        padded = np.pad(flat, [(0, 0), (module.conv - 1, 0), (0, 0)])
        taps = p[f"{name}_conv"]
        return silu(sum(padded[:, w : w + T] * taps[w] for w in range(module.conv))).reshape(B, T, heads, size)

    def unit(x):
        return np.repeat(x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6), heads // groups, axis=2)

    q, k, v = unit(stream("q", groups, keys)), unit(stream("k", groups, keys)), stream("v", heads, values)
    beta = sigmoid(x @ p["beta_proj"]) * (2 if module.negative_eigenvalues else 1)
    g = np.zeros_like(beta)
    if "A_log" in p:
        g = -np.exp(p["A_log"]) * np.log1p(np.exp(x @ p["dt_proj"] + p["dt_bias"]))
    S, o = np.zeros((B, heads, keys, values)), np.zeros((B, T, heads, values))
    for t in range(T):
        S = np.exp(g[:, t])[..., None, None] * S
        error = v[:, t] - np.einsum("bhk,bhkv->bhv", k[:, t], S)
        S = S + beta[:, t, :, None, None] * k[:, t, :, :, None] * error[:, :, None]
        o[:, t] = np.einsum("bhk,bhkv->bhv", q[:, t], S) / keys**0.5
    o = o / np.sqrt((o * o).mean(-1, keepdims=True) + module.norm_eps) * p["scale"]
    if "gate_proj" in p:
        o = o * silu(np.einsum("btd,dhv->bthv", x, p["gate_proj"]))
    return np.einsum("bthv,hvd->btd", o, p["out_proj"]), S


MIXERS = {
    "deltanet": DeltaNet(width=D),
    "deltanet, its own sizes": DeltaNet(width=D, heads=3, key_dim=4, value_dim=7, conv=2, negative_eigenvalues=True),
    "gated": GatedDeltaNet(width=D),
    "gated, shared keys": GatedDeltaNet(width=D, heads=4, key_heads=2, value_dim=5, norm_eps=1e-2),
}


@pytest.mark.parametrize("name", MIXERS)
def test_the_mixer_is_its_equations(name):
    module = MIXERS[name]
    params, x = perturbed(module), draw(B, T, D)
    float32 = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), params)
    y, state = apply(module, float32, jnp.asarray(x, jnp.float32))
    near((y, state["delta"]), equations(module, params, x))


def test_steps_above_one_turn_what_is_held_around():
    """With beta near 2 the same key and a value of zero make the state change its sign: an eigenvalue of -1."""
    state = draw(1, 1, 4, 3).astype(np.float32)
    key, zero = np.eye(4, dtype=np.float32)[None, None, :1], np.zeros((1, 1, 1, 3), np.float32)
    _, after = delta_rule(key, 2 * key, zero, 2 * key, key, initial_state=state)
    np.testing.assert_array_equal(after[..., 0, :], -state[..., 0, :])
    np.testing.assert_array_equal(after[..., 1:, :], state[..., 1:, :])


@pytest.mark.parametrize("module", [deltanet, gated_deltanet], ids=lambda module: module.__name__.split(".")[-1])
def test_counts(module):
    """The small preset is as large as DenseMamba's; the large ones have what their layers' matrices come to."""

    def count(config):
        model = build(config.model, config.model.vocab_size or 264)
        shapes = jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, 2), jnp.int32)), jax.random.key(0))
        return sum(x.size for x in jax.tree.leaves(shapes["params"]))

    assert abs(count(module.get_config()) / count(densemamba.get_config()) - 1) < 0.02
    for preset, (width, layers, *_) in module.PAPER.items():
        config = module.get_config(preset)
        mixer = 4 * width**2 if module is deltanet else 6 * width**2
        matrices = layers * (mixer + 3 * width * config.model.mlp.hidden) + 32_000 * width
        assert 1 < count(config) / matrices < 1.002, preset


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: DeltaNet(width=D, heads=3), r"deltanet.heads=3: must be a divisor of model.width=16, or key_dim"),
        (lambda: DeltaNet(width=D, conv=1), r"deltanet.conv=1: must be .*between 2 and 8"),
        (lambda: GatedDeltaNet(width=D, heads=4, key_heads=3), r"key_heads=3: must be a divisor of heads=4, or 0"),
        (lambda: GatedDeltaNet(width=D, heads=5), r"heads=5: must be such that 3/4 of model.width=16 divide by it"),
        (lambda: GatedDeltaNet(width=D, dt_max=1e-4), r"dt_max=0.0001: must be at least dt_min=0.001"),
    ],
)
def test_bad_fields_are_named(build, message):
    with pytest.raises(UserError, match=message):
        build()


# transformers

os.environ.setdefault("HF_HUB_OFFLINE", "1")
families = pytest.mark.parametrize("family", ["qwen3_next", "olmo_hybrid"])


def modeling(family):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


@families
@pytest.mark.parametrize("function", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
@pytest.mark.slow
def test_the_operation_is_that_of_transformers(family, function):
    """Values and gradients; OLMo's steps reach 2. Two heads of values share a key."""
    torch, theirs = pytest.importorskip("torch"), getattr(modeling(family), function)
    length, groups, heads, keys, values = 70, 2, 4, 6, 5
    unit = lambda x: x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)  # noqa: E731
    arrays = dict(query=unit(draw(B, length, groups, keys)), key=unit(draw(B, length, groups, keys, seed=1)))
    arrays |= dict(value=draw(B, length, heads, values, seed=2), g=-np.abs(draw(B, length, heads, seed=3)))
    arrays |= dict(beta=sigmoid(3 * draw(B, length, heads, seed=4)) * (2 if family == "olmo_hybrid" else 1))
    arrays |= dict(initial_state=draw(B, heads, keys, values, seed=5))
    arrays = {name: x.astype(np.float32) for name, x in arrays.items()}
    tensors = {name: torch.tensor(x, requires_grad=True) for name, x in arrays.items()}
    results = theirs(**tensors, output_final_state=True)
    weights = [draw(*x.shape, seed=6).astype(np.float32) for x in results]
    sum((x * torch.tensor(w)).sum() for x, w in zip(results, weights, strict=True)).backward()
    want = [x.detach().numpy() for x in results], {name: x.grad.numpy() for name, x in tensors.items()}

    @jax.jit
    def ours(arrays):
        def run(query, key, value, g, beta, initial_state):
            shared = jnp.repeat(key, 2, axis=2)
            written, seen = beta[..., None] * shared, jnp.exp(g)[..., None] * shared
            options = dict(scale=keys**-0.5, initial_state=initial_state)
            return delta_rule(query, written, value, written, seen, g, **options)

        results, pull = jax.vjp(lambda arrays: run(**arrays), arrays)
        return list(results), pull(tuple(jnp.asarray(w) for w in weights))[0]

    near(ours(arrays), want)
