"""Norm, MLP, rotary positions and the attention mixer; the contract of all mixers is tested apart."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from seqmodels.channels.mlp import Mlp
from seqmodels.errors import UserError
from seqmodels.layers.kv_cache import EMPTY
from seqmodels.layers.matmul import separate_matmuls
from seqmodels.layers.norm import LayerNorm, RMSNorm, gated_norm, layer_norm, rms_norm
from seqmodels.layers.rope import rope
from seqmodels.mixers.attention import Attention
from seqmodels.sequence import make_sequence

WIDTH = 16


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def perturbed(module, *args, seed=1):
    """Parameters far from their initial values, without boxes."""
    params = nn.meta.unbox(module.init(jax.random.key(0), *args))
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(p + 0.3 * draw.normal(size=p.shape), jnp.float32), params)


def test_a_sequence_without_tokens():
    with pytest.raises(ValueError, match="T is 0; allowed: 1 or more"):
        make_sequence(2, 0)


def test_layer_norm():
    """Values and gradients against float64, from an input with a mean far from zero."""
    x, scale, bias, weights = (
        normal(3, 5, WIDTH) * 3 + 5,
        normal(WIDTH, seed=1),
        normal(WIDTH, seed=2),
        normal(3, 5, WIDTH),
    )
    centred = x - x.mean(-1, keepdims=True)
    want = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-2) * scale + bias
    variables = {"params": {"scale": jnp.float32(scale), "bias": jnp.float32(bias)}}
    np.testing.assert_allclose(LayerNorm(eps=1e-2).apply(variables, jnp.float32(x)), want, rtol=2e-5, atol=1e-5)
    assert layer_norm(jnp.bfloat16(x), jnp.float32(scale)).dtype == jnp.bfloat16

    def loss(x, scale, bias):
        return jnp.sum(weights * layer_norm(x, scale, bias, 1e-2))

    got = jax.grad(loss, argnums=(0, 1, 2))(jnp.float32(x), jnp.float32(scale), jnp.float32(bias))
    with jax.enable_x64(True):
        exact = jax.grad(loss, argnums=(0, 1, 2))(x, scale, bias)
        jax.test_util.check_grads(lambda x: layer_norm(x, scale, bias, 1e-2), (x,), order=1, modes=["rev"])
    for ours, reference in zip(got, exact, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=2e-4, atol=2e-4)


def test_rms_norm():
    x, scale = normal(3, 5, WIDTH) * 7, normal(WIDTH, seed=1)
    want = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-2) * scale
    np.testing.assert_allclose(rms_norm(jnp.float32(x), jnp.float32(scale), 1e-2), want, rtol=2e-6)
    variables = {"params": {"scale": jnp.float32(scale)}}
    np.testing.assert_allclose(RMSNorm(eps=1e-2).apply(variables, jnp.float32(x)), want, rtol=2e-6)
    np.testing.assert_allclose(rms_norm(jnp.float32(x), eps=1e-2), want / scale, rtol=2e-6)
    with jax.enable_x64(True):
        np.testing.assert_allclose(rms_norm(x, scale, 1e-2), want, rtol=1e-14)


@pytest.mark.parametrize("scaled", [True, False])
def test_rms_norm_gradients(scaled):
    """Against the derivatives that JAX makes of the formula itself."""
    x, dy, scale = (jnp.float32(normal(2, 3, WIDTH, seed=seed)) for seed in (0, 1, 2))
    inputs = (x, scale[0, 0]) if scaled else (x,)

    def formula(x, scale=1.0):
        return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 0.1) * scale

    got = jax.vjp(lambda *inputs: rms_norm(*inputs, eps=0.1), *inputs)[1](dy)
    with jax.enable_x64(True):
        double = [np.float64(v) for v in inputs]
        want = jax.vjp(formula, *double)[1](np.float64(dy))
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_rms_norm_keeps_its_input_alone():
    x = jnp.asarray(normal(2, 3, WIDTH), jnp.bfloat16)
    kept = jax.tree.leaves(jax.vjp(rms_norm, x, jnp.ones(WIDTH))[1])
    assert [v.dtype for v in kept if v.shape == x.shape] == [jnp.bfloat16]


def test_rms_norm_of_bfloat16_squares_in_float32():
    x = jnp.asarray(1 + normal(2, 4096) * 0.01, jnp.bfloat16)
    y = rms_norm(x)
    want = np.asarray(x, np.float64)
    want /= np.sqrt((want**2).mean(-1, keepdims=True) + 1e-5)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), want, rtol=2**-8)


@pytest.mark.parametrize("groups", [1, 4])
def test_gated_norm(groups):
    """Values, and gradients against the derivatives that JAX makes of the formula itself."""
    x, z, dy = (normal(2, 3, WIDTH, seed=seed) for seed in (0, 1, 2))
    inputs = (x, z, normal(WIDTH, seed=3))

    def formula(x, z, scale):
        x = (x * z / (1 + jnp.exp(-z))).reshape(2, 3, groups, -1)
        return (x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 0.1)).reshape(z.shape) * scale

    y, pullback = jax.vjp(lambda *inputs: gated_norm(*inputs, groups, 0.1), *map(jnp.float32, inputs))
    got = (y, *pullback(jnp.float32(dy)))
    with jax.enable_x64(True):
        want, pullback = jax.vjp(formula, *map(jnp.float64, inputs))
        want = (want, *pullback(jnp.float64(dy)))
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_norm_declares_its_axis():
    variables = RMSNorm(axis="inner").init(jax.random.key(0), jnp.ones((1, WIDTH)))
    scale = variables["params"]["scale"]
    assert scale.names == ("inner",) and scale.value.dtype == jnp.float32
    np.testing.assert_array_equal(scale.value, 1)


def test_rope_rotates_pairs():
    x = normal(2, 5, 3, 8)
    positions = np.array([[0, 1, 2, 3, 4], [7, 0, 1, 100, 5]])
    angles = positions[..., None, None] * 500.0 ** (-np.arange(4) / 4)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)
    want = np.concatenate([turned.real, turned.imag], axis=-1)
    with jax.enable_x64(True):
        np.testing.assert_allclose(rope(x, positions, 500.0), want, rtol=1e-12, atol=1e-12)
    y = rope(jnp.float32(x), jnp.int32(positions), 500.0)
    np.testing.assert_allclose(y, want, rtol=0, atol=5e-5)  # 100 radians carry a float32 error of 1e-5
    assert rope(jnp.bfloat16(x), jnp.int32(positions)).dtype == jnp.bfloat16


def test_rope_sees_distances_only():
    q, k = jnp.float32(normal(1, 4, 1, 8)), jnp.float32(normal(1, 4, 1, 8, seed=1))

    def scores(shift):
        places = jnp.arange(4)[None] + shift
        return jnp.einsum("bthd,bshd->bts", rope(q, places), rope(k, places))

    np.testing.assert_allclose(scores(37), scores(0), atol=1e-4)


def test_mlp():
    mlp, x = Mlp(width=WIDTH, hidden=24), normal(2, 3, WIDTH)
    seq, *_ = make_sequence(2, 3)
    variables = perturbed(mlp, jnp.float32(x), seq)
    gate, up, down = (np.asarray(variables["params"][name], np.float64) for name in ("gate", "up", "down"))
    gated = x @ gate
    want = (gated / (1 + np.exp(-gated)) * (x @ up)) @ down
    y, state = mlp.apply(variables, jnp.float32(x), seq)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    assert state == {}


def test_mlp_with_biases():
    mlp, x = Mlp(width=WIDTH, hidden=24, bias=True), normal(2, 3, WIDTH)
    seq, *_ = make_sequence(2, 3)
    variables = perturbed(mlp, jnp.float32(x), seq)
    p = {name: np.asarray(value, np.float64) for name, value in variables["params"].items()}
    gated = x @ p["gate"] + p["gate_bias"]
    want = (gated / (1 + np.exp(-gated)) * (x @ p["up"] + p["up_bias"])) @ p["down"] + p["down_bias"]
    np.testing.assert_allclose(mlp.apply(variables, jnp.float32(x), seq)[0], want, rtol=1e-5, atol=1e-5)


def test_mlp_hidden_width():
    x, (seq, *_) = jnp.ones((1, 1, 768)), make_sequence(1, 1)
    assert jax.eval_shape(Mlp(width=768).init, jax.random.key(0), x, seq)["params"]["gate"].value.shape == (768, 2048)
    assert jax.eval_shape(Mlp(width=768, hidden=8).init, jax.random.key(0), x, seq)["params"]["down"].value.shape == (
        8,
        768,
    )
    with pytest.raises(UserError, match=r"config.model.mlp.hidden=-1: must be "):
        Mlp(width=768, hidden=-1)


def test_branches_start_smaller_in_deeper_models():
    def spread(layers):
        variables = Mlp(width=64, layers=layers).init(jax.random.key(0), jnp.ones((1, 1, 64)), make_sequence(1, 1)[0])
        return {name: float(np.std(p.value)) for name, p in variables["params"].items()}

    shallow, deep = spread(1), spread(8)
    np.testing.assert_allclose(shallow["down"] / deep["down"], 8**0.5, rtol=1e-5)
    assert shallow["gate"] == deep["gate"]
    np.testing.assert_allclose(shallow["gate"], 0.02, rtol=0.05)


@pytest.mark.parametrize(("init_std", "std"), [(0.02, 0.02), (0.3, 0.3), (0.0, 1 / 8)])
def test_fresh_attention(init_std, std):
    module = Attention(width=64, layers=2, init_std=init_std)
    params = module.init(jax.random.key(0), jnp.ones((1, 1, 64)), make_sequence(1, 1)[0])["params"]
    for name in ("query", "key", "value"):
        np.testing.assert_allclose(np.std(params[name].value), std, rtol=0.05)
    np.testing.assert_allclose(np.std(params["out"].value), std / 2, rtol=0.05)


@pytest.fixture
def mixer():
    attention = Attention(width=WIDTH, heads=4, kv_heads=2, window=3)
    x = jnp.float32(normal(2, 7, WIDTH))
    return attention, perturbed(attention, x, make_sequence(2, 7)[0]), x


@functools.partial(jax.jit, static_argnums=0)
def apply(attention, variables, x, seq, state=None):
    return attention.apply(variables, x, seq, state)


def decode(attention, variables, x, state, cuts, segment_ids=None, mask=None):
    """The whole of x in pieces, as the language model would hand it over."""
    pieces, segment, position = [], None, None
    for start, stop in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        part = (slice(None), slice(start, stop))
        packed = None if segment_ids is None else segment_ids[part]
        real = None if mask is None else mask[part]
        seq, segment, position = make_sequence(2, stop - start, packed, real, segment, position)
        y, state = apply(attention, variables, x[part], seq, state)
        pieces.append(y)
    return jnp.concatenate(pieces, axis=1), state


@pytest.mark.slow
def test_cache_slides_with_its_window_over_padding(mixer):
    """Padding takes no slot and no place in the window; the cache ends as if it had not been there."""
    attention, variables, x = mixer
    y, state = decode(attention, variables, x, attention.init_state(2, 9), [2, 3, 6])
    mask = np.array([[1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 0], [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0]], bool)
    spread = np.full((2, 12, WIDTH), 1e3, np.float32)
    spread[mask] = np.asarray(x).reshape(-1, WIDTH)
    for cuts in ([], [1, 5]):
        padded, padded_state = decode(
            attention, variables, jnp.asarray(spread), attention.init_state(2, 9), cuts, mask=jnp.asarray(mask)
        )
        np.testing.assert_allclose(padded[mask].reshape(x.shape), y, atol=2e-6)
        np.testing.assert_array_equal(padded[~mask], 0)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), padded_state, state)
    np.testing.assert_array_equal(state["length"], 7)
    np.testing.assert_array_equal(state["document"][:, 7:], EMPTY)


def test_document_that_comes_back_starts_anew(mixer):
    attention, variables, x = mixer
    ids = jnp.array([[5, 5, 6, 6, 5, 5, 5], [5, 5, 6, 6, 5, 5, 5]])
    packed, _ = decode(attention, variables, x, attention.init_state(2, 7), [1, 4], segment_ids=ids)
    for start, stop in ((0, 2), (2, 4), (4, 7)):
        alone, _ = apply(attention, variables, x[:, start:stop], make_sequence(2, stop - start)[0])
        np.testing.assert_allclose(packed[:, start:stop], alone, atol=2e-6)


def test_cache_of_a_call_without_state(mixer):
    attention, variables, x = mixer
    _, filled = decode(attention, variables, x, attention.init_state(2, 7), [3])
    _, fresh = apply(attention, variables, x, make_sequence(2, 7)[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), fresh, filled)


def test_cache_has_the_activations_dtype():
    attention = Attention(width=WIDTH, dtype=jnp.bfloat16)
    assert attention.init_state(1, 4)["k"].dtype == jnp.bfloat16
    x = jnp.ones((1, 2, WIDTH), jnp.bfloat16)
    y, state = attention.apply(perturbed(attention, x, make_sequence(1, 2)[0]), x, make_sequence(1, 2)[0])
    assert y.dtype == state["v"].dtype == jnp.bfloat16


def test_without_positions_the_order_of_earlier_tokens_does_not_matter():
    """The last token sees a set: its output is the same for any order of the others, whole or from a cache."""
    x, order = jnp.float32(normal(2, 7, WIDTH)), jnp.array([4, 0, 5, 2, 1, 3, 6])
    attention = Attention(width=WIDTH, heads=4, kv_heads=2, head_dim=3, positions="none")  # odd: nothing turns pairs
    variables = perturbed(attention, x, make_sequence(2, 7)[0])
    y, _ = apply(attention, variables, x, make_sequence(2, 7)[0])
    for cuts in ([], [2, 6]):
        shuffled, _ = decode(attention, variables, x[:, order], attention.init_state(2, 7), cuts)
        np.testing.assert_allclose(shuffled[:, -1], y[:, -1], atol=2e-6)
        assert np.abs(shuffled[:, 0] - y[:, 0]).max() > 1e-2
    turned = Attention(width=WIDTH, heads=4, kv_heads=2, head_dim=4)
    variables = perturbed(turned, x, make_sequence(2, 7)[0])
    y, shuffled = (apply(turned, variables, tokens, make_sequence(2, 7)[0])[0] for tokens in (x, x[:, order]))
    assert np.abs(shuffled[:, -1] - y[:, -1]).max() > 1e-2


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(positions="alibis"), r"config.model.attention.positions='alibis': must be one of 'rope', 'none'"),
        (dict(heads=3), r"config.model.attention.heads=3: must be a divisor of model.width=16"),
        (dict(heads=0), r"config.model.attention.heads=0: must be at least 1"),
        (dict(kv_heads=3), r"config.model.attention.kv_heads=3: must be a divisor of heads=4"),
        (dict(head_dim=5), r"config.model.attention.head_dim=5: must be even"),
        (dict(heads=16), r"config.model.attention.head_dim=1: must be even"),
        (dict(window=-1), r"config.model.attention.window=-1: must be at least 0"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        Attention(width=WIDTH, **fields)


def test_separate_matmuls_stay_separate():
    """The products, and in the program as many of them, whose left factors XLA cannot know to be equal."""
    x, weights = normal(2, 3, 8), [normal(8, size, seed=size) for size in (4, 5, 6)]
    f = jax.jit(lambda x, *weights: separate_matmuls((x,) * 3, weights))
    arguments = jnp.float32(x), *map(jnp.float32, weights)
    for y, weight in zip(f(*arguments), weights, strict=True):
        np.testing.assert_allclose(y, x @ weight, rtol=1e-5, atol=1e-5)
    text = f.lower(*arguments).as_text()
    left = re.findall(r"dot_general (%\w+),", text)
    assert len(left) == len(set(left)) == 3 and text.count("optimization_barrier") == 2
