"""Positions in attention: rotations and their scaling, biases, xPos, log-n, ReRoPE, and positions at the input."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels import backbone
from seqmodels.branches import BRANCHES
from seqmodels.config import validate
from seqmodels.configs import transformer
from seqmodels.errors import UserError
from seqmodels.kernels.attention import attention, xla
from seqmodels.kernels.attention.masks import Strided
from seqmodels.layers import rope_scaling
from seqmodels.layers.positions import sinusoids, xpos, zeta
from seqmodels.layers.rerope import rerope
from seqmodels.layers.rope import rope
from seqmodels.mixers.attention import Attention
from seqmodels.model import build
from seqmodels.sequence import make_sequence

B, T, H, D = 2, 12, 2, 8
PAIRS = D // 2


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def of_transformers(method, pairs, theta, factor, trained, length=None):
    torch = pytest.importorskip("torch")
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    parameters = dict(rope_type=method, rope_theta=theta, factor=factor, original_max_position_embeddings=trained)
    if method == "llama3":
        parameters |= dict(low_freq_factor=1.0, high_freq_factor=4.0)
    config = LlamaConfig(
        hidden_size=4 * pairs, num_attention_heads=2, max_position_embeddings=trained, rope_parameters=parameters
    )
    frequency, scale = rope_utils.ROPE_INIT_FUNCTIONS[method](config, torch.device("cpu"), seq_len=length)
    return frequency.numpy(), scale


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize(("pairs", "factor", "trained"), [(32, 4.0, 256), (8, 16.0, 4096), (64, 1.5, 2048)])
@pytest.mark.parametrize("method", ["linear", "yarn", "llama3"])
def test_scaled_frequencies_are_those_of_transformers(method, pairs, theta, factor, trained):
    want, scale = of_transformers(method, pairs, theta, factor, trained)
    got = rope_scaling.frequencies_of(method, pairs, theta, factor, trained)
    np.testing.assert_allclose(got, want, rtol=2e-6)
    np.testing.assert_allclose(rope_scaling.scale_of(method, factor), scale, rtol=1e-12)


@pytest.mark.parametrize("length", [100, 256, 1000])
@pytest.mark.parametrize("strength", [1.0, 4.0])
def test_dynamic_ntk_is_that_of_transformers(length, strength):
    want, _ = of_transformers("dynamic", 16, 1e4, strength, 256, length)
    got = rope_scaling.ntk(16, 1e4, rope_scaling.dynamic_factor(length, 256, strength))
    np.testing.assert_allclose(got, want, rtol=2e-6)


def test_ntk_keeps_the_fastest_pair_and_slows_the_slowest_by_the_factor():
    plain, scaled = rope_scaling.frequencies(16, 1e4), rope_scaling.ntk(16, 1e4, 8.0)
    np.testing.assert_allclose(scaled[[0, -1]], plain[[0, -1]] / [1, 8], rtol=1e-12)


def test_interleaved_rotation_is_that_of_gptj():
    torch, gptj = pytest.importorskip("torch"), pytest.importorskip("transformers.models.gptj.modeling_gptj")
    x, positions = draw(B, T, H, D), np.random.default_rng(1).integers(0, 5000, (B, T))
    table = gptj.create_sinusoidal_positions(5000, D)[torch.tensor(positions)]
    sin, cos = torch.split(table, PAIRS, dim=-1)
    want = gptj.apply_rotary_pos_emb(torch.tensor(x, dtype=torch.float32), sin, cos)
    got = rope(jnp.float32(x), jnp.asarray(positions), interleaved=True)
    np.testing.assert_allclose(got, want, atol=2e-4)  # angles of thousands of radians, in float32 on both sides
    np.testing.assert_allclose(
        rope(jnp.float32(x), jnp.asarray(positions), scale=1.5, interleaved=True), 1.5 * got, rtol=1e-5
    )


def naive(scores, v):
    """Causal softmax attention in float64 from scores [B, H, T, T] and v [B, T, H, d]."""
    scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), v)


def turned(x, positions):
    """x [B, T, H, d] rotated at positions [T], in float64: half-split pairs as complex numbers."""
    z = x[..., :PAIRS] + 1j * x[..., PAIRS:]
    z = z * np.exp(1j * positions[:, None, None] * rope_scaling.frequencies(PAIRS, 1e4))
    return np.concatenate([z.real, z.imag], -1)


@pytest.mark.parametrize("case", ["rerope", "leaky_rerope"])
def test_rerope_against_its_formula(case, monkeypatch):
    """Every pair of a query and a key by itself, at the rotary distance that the formula gives; values and gradients.

    Of tiles of four tokens, and Leaky ReRoPE with everything else that changes scores or hides keys.
    """
    monkeypatch.setitem(xla.TILE, jax.default_backend(), 4)
    q, k, v, do = (draw(B, T, H, D, seed=i) for i in range(4))
    trained, factor, options, seen = 6, None, {}, np.tril(np.ones((T, T), bool))
    w, slower, gates = trained / 2, 0.0, np.zeros((B, T, H))
    if case == "leaky_rerope":
        factor = 4.0
        slower = 1 / ((factor * trained - w) / (trained - w))
        assert w + (factor * trained - w) * slower == pytest.approx(trained)
        ids, gates = np.arange(T) // (2 * T // 3), np.cumsum(draw(B, T, H, seed=5), axis=1)
        options = dict(window=T // 2, softcap=2.0, segment_ids=jnp.int32(ids)[None].repeat(B, 0))
        options |= dict(gates=jnp.float32(gates), pattern=Strided(2, 2))
        i, j = np.arange(T)[:, None], np.arange(T)[None]
        seen &= (ids[:, None] == ids) & (i - j < T // 2) & Strided(2, 2).sees(i, j)

    distance = np.arange(T)[:, None] - np.arange(T)[None].astype(float)
    distance = np.where(distance < w, distance, w + (distance - w) * slower)
    turn = np.exp(1j * distance[..., None] * rope_scaling.frequencies(PAIRS, 1e4))

    def exact(q, k, v):
        zq, zk = (x[..., :PAIRS] + 1j * x[..., PAIRS:] for x in (q, k))
        scores = jnp.einsum("bthi,bshi,tsi->bhts", zq, zk.conj(), turn).real / math.sqrt(D)
        scores = 2 * jnp.tanh(scores / 2) if options else scores
        change = np.moveaxis(gates[:, :, None] - gates[:, None], 3, 1)
        weights = jax.nn.softmax(jnp.where(seen, scores + change, -jnp.inf))
        return jnp.einsum("bhts,bshd->bthd", weights, v)

    with jax.enable_x64(True):
        want, pull = jax.vjp(exact, *map(jnp.asarray, (q, k, v)))
        gradients = pull(jnp.asarray(do))
    turning = dict(trained=trained, factor=factor, frequency=rope_scaling.frequencies(PAIRS, 1e4))
    ours = jax.jit(functools.partial(rerope, **turning, **options))
    got, pull = jax.vjp(ours, *map(jnp.float32, (q, k, v)))
    for mine, theirs in zip((got, *pull(jnp.float32(do))), (want, *gradients), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-4, atol=2e-5)
    if options:  # NaN stays in its document
        bad = np.where(ids == 0, np.nan, 0)[:, None, None]
        spoilt, good = ours(*(jnp.float32(x + bad) for x in (q, k, v))), ids == 1
        np.testing.assert_array_equal(spoilt[:, good], got[:, good])
        assert np.isnan(spoilt[:, ~good]).all()


@pytest.mark.parametrize("start", [0, 1_000_000])
def test_xpos_against_its_formula(start):
    """In values and gradients, also far from the beginning, where zeta^t by itself is 0 in float32."""
    q, k, v, dy = (draw(B, T, H, D, seed=i) for i in range(4))
    positions = start + np.arange(T)

    def exact(q, k, v):
        decay = zeta(PAIRS) ** ((np.arange(T)[:, None] - np.arange(T)[None])[..., None] / 512)
        scores = jnp.einsum("bthi,bshi,tsi->bhts", q[..., :PAIRS], k[..., :PAIRS], decay)
        scores = (scores + jnp.einsum("bthi,bshi,tsi->bhts", q[..., PAIRS:], k[..., PAIRS:], decay)) / math.sqrt(D)
        weights = jax.nn.softmax(jnp.where(np.tril(np.ones((T, T), bool)), scores, -jnp.inf))
        return jnp.einsum("bhts,bshd->bthd", weights, v)

    def ours(q, k, v):
        return xpos(attention, q, k, v, positions=jnp.asarray(positions)[None].repeat(B, 0))

    with jax.enable_x64(True):
        want, pull = jax.vjp(exact, q, k, v)
        gradients = pull(jnp.asarray(dy))
    got, pull = jax.vjp(ours, *map(jnp.float32, (q, k, v)))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(pull(jnp.float32(dy)), gradients, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-5)


def test_sinusoids():
    got = sinusoids(jnp.array([[0, 3, 70]]), 6)
    for p, row in zip((0, 3, 70), np.asarray(got[0]), strict=True):
        want = [f(p / 10_000 ** (2 * i / 6)) for f in (math.sin, math.cos) for i in range(3)]
        np.testing.assert_allclose(row, want, atol=1e-5)


VARIANTS = {
    "xpos": dict(positions="xpos"),
    "alibi": dict(positions="alibi"),
    "kerple": dict(positions="kerple"),
    "sandwich": dict(positions="sandwich"),
    "t5": dict(positions="t5"),
    "interleaved": dict(rope_style="interleaved"),
    "yarn": dict(scaling="yarn", scaling_factor=4.0, trained_length=8),
    "ntk": dict(scaling="ntk", scaling_factor=4.0),
    "rerope": dict(scaling="rerope", trained_length=4),
    "leaky_rerope": dict(scaling="leaky_rerope", scaling_factor=2.0, trained_length=4),
}


QUICK = [("alibi", 0), ("rerope", 0), ("xpos", 4)]
SLOW = [(variant, 0) for variant in VARIANTS if (variant, 0) not in QUICK] + [("t5", 4), ("rerope", 4)]


@pytest.mark.parametrize(("variant", "window"), QUICK + [pytest.param(*each, marks=pytest.mark.slow) for each in SLOW])
def test_contract_of_every_kind_of_position(variant, window):
    """Packed documents with padding, in pieces from a state, are those documents alone; and the positions matter."""
    width, segments = 16, np.array([[0] * 6 + [1] * 6, [3] * 12], np.int32)
    real = np.ones((B, T), bool)
    real[0, [1, 7]] = real[1, [0, 11]] = False
    module = Attention(width=width, heads=2, window=window, **VARIANTS[variant])
    x = jnp.float32(draw(B, T, width))
    variables = nn.unbox(jax.jit(module.init)(jax.random.key(0), x, make_sequence(B, T)[0]))
    variables = jax.tree.map(lambda p: p + jnp.float32(0.3 * draw(*p.shape, seed=5)), variables)
    apply = jax.jit(functools.partial(module.apply, variables))
    want = np.zeros((B, T, width), np.float32)
    for row, part in ((0, segments[0] == 0), (0, segments[0] == 1), (1, segments[1] == 3)):
        at = np.flatnonzero(part & real[row])
        want[row, at] = apply(x[row : row + 1, at], make_sequence(1, len(at))[0])[0][0]
    state, segment, position, got = module.init_state(B, T), None, None, []
    for cut in (slice(0, 5), slice(5, 6), slice(6, 12)):
        ids, mask = jnp.asarray(segments[:, cut]), jnp.asarray(real[:, cut])
        seq, segment, position = make_sequence(B, ids.shape[1], ids, mask, segment, position)
        y, state = apply(x[:, cut], seq, state)
        got.append(y)
    np.testing.assert_allclose(np.where(real[..., None], jnp.concatenate(got, 1), 0), want, rtol=2e-4, atol=2e-5)
    whole, _ = apply(x, make_sequence(B, T, jnp.asarray(segments), jnp.asarray(real))[0])
    np.testing.assert_allclose(np.where(real[..., None], whole, 0), want, rtol=2e-4, atol=2e-5)
    plain = module.clone(positions="rope", scaling="none", rope_style="half")
    plain, _ = jax.jit(plain.apply)(variables, x, make_sequence(B, T)[0])
    assert np.abs(apply(x, make_sequence(B, T)[0])[0] - plain).max() > 1e-4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(positions="rotary"), r"attention.positions='rotary': must be one of 'rope', 'none'"),
        (dict(scaling="yarn"), r"attention.trained_length=0: must be at least 2 with scaling='yarn'"),
        (dict(scaling="ntk", positions="alibi"), r"attention.scaling='ntk': must be 'none' with positions='alibi'"),
        (dict(scaling="ntk", head_dim=2), r"attention.scaling='ntk': must be another with head_dim=2, of"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        Attention(width=16, **fields)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "constant"), [("mamba", "dt_proj"), ("mamba2", "dt_proj"), ("mamba3", "head_proj")])
def test_dt_scale_is_a_factor_of_every_step(name, constant):
    """Where the step is softplus(dt_bias) alone, a factor of it is another bias."""
    factor, plain = 0.25, BRANCHES[name](width=16)
    x, (seq, *_) = jnp.float32(draw(B, T, 16)), make_sequence(B, T)
    params = nn.unbox(jax.jit(plain.init)(jax.random.key(0), x, seq))["params"]
    at = (slice(None), 0) if name == "mamba3" else slice(None)
    params[constant] = params[constant].at[at].set(0)
    bias = np.asarray(params["dt_bias"], np.float64) + 1.0
    smaller = np.log(np.expm1(factor * np.log1p(np.exp(bias))))
    run = lambda branch, bias: branch.apply({"params": params | dict(dt_bias=jnp.float32(bias))}, x, seq)  # noqa: E731
    got, want = run(plain.clone(dt_scale=factor), bias), run(plain, smaller)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-4, atol=1e-5)
    assert np.abs(got[0] - run(plain, bias)[0]).max() > 1e-3


def model_with(positions, **fields):
    """A small model with positions at its input, and its parameters."""
    config = transformer.get_config().model.unlock()
    config.update(width=16, repeats=1, positions=positions, **fields)
    config.attention.update(heads=2, kv_heads=2, positions="none")
    model = build(config, 11)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (B, T)), jnp.int32)
    return model, tokens, nn.unbox(jax.jit(model.init)(jax.random.key(0), tokens))


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_positions_at_the_input(positions):
    """Packed documents, in pieces, count each from its own beginning; the stream is embedding plus vector."""
    model, tokens, variables = model_with(positions, position_table=T)
    segments = jnp.asarray([[0] * 5 + [1] * 7, [2] * 12], jnp.int32)
    apply = jax.jit(model.apply)
    want, _ = apply(variables, tokens, segments)
    alone, _ = apply(variables, tokens[:1, 5:], segments[:1, 5:])
    np.testing.assert_allclose(want[0, 5:], alone[0], rtol=1e-4, atol=1e-5)
    state, got = model.init_state(B, T), []
    for cut in (slice(0, 4), slice(4, 12)):
        hidden, state = apply(variables, tokens[:, cut], segments[:, cut], None, state)
        got.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(got, 1), want, rtol=1e-4, atol=1e-5)
    params = dict(variables["params"])
    table = params.pop("positions")["table"] if positions == "learned" else sinusoids(jnp.arange(T), 16)
    plain, *_ = model_with("none")  # with the first position's vector in its embeddings: the same first token
    shifted = {"params": dict(params, embedding=params["embedding"] + table[0])}
    np.testing.assert_allclose(plain.apply(shifted, tokens)[0][:, 0], want[:, 0], rtol=1e-4, atol=1e-5)
    assert np.abs(plain.apply(shifted, tokens)[0][:, 4] - want[:, 4]).max() > 1e-3


@pytest.mark.slow
def test_learned_positions_end():
    model, tokens, variables = model_with("learned", position_table=T - 2)
    hidden, _ = model.apply(variables, tokens)
    assert np.isnan(hidden[:, T - 2 :]).all()
    mask = jnp.arange(T)[None].repeat(B, 0) < T - 2
    grads = jax.grad(lambda v: jnp.sum(model.apply(v, tokens, mask=mask)[0][:, : T - 2] ** 2))(variables)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert backbone.context(transformer.get_config()) == 256


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(positions="learned", position_table=100), "model.position_table=100: must be at least seq_len=256"),
        (dict(positions="learnt"), "model.positions='learnt': must be one of 'none', 'learned', 'sinusoidal'"),
    ],
)
def test_bad_positions_of_the_input(fields, message):
    config = transformer.get_config().unlock()
    config.model.update(fields)
    with pytest.raises(UserError, match=message):
        validate(config)
