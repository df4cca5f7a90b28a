"""Options of attention: the contract of branches for each, and the formulas against transformers and numpy."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.errors import UserError
from seqmodels.fields.attention import ATTENTION
from seqmodels.layers.kv_cache import newest, put_keys
from seqmodels.mixers.attention import Attention, log_n
from seqmodels.sequence import make_sequence

B, T, D = 2, 16, 8
OPTIONS = {
    "sinks": dict(window=3, sinks=2),
    "strided": dict(mask="strided", stride=2, block=2),
    "fixed": dict(mask="fixed", stride=3, summary=1, block=1),
    "bigbird": dict(mask="bigbird", near=1, first=1, random=1, block=2),
    "scores": dict(softcap=2.0, qk_norm="rms", log_n=4, window=5),
    "gated": dict(qk_norm="all", output_gate=True),
    "forget": dict(forget=True, positions="none"),
    "forget, sinks": dict(forget=True, window=3, sinks=1),
}
each = pytest.mark.parametrize(
    "name", [name if name == "sinks" else pytest.param(name, marks=pytest.mark.slow) for name in OPTIONS]
)
SEGMENTS = np.array([[0] * 9 + [1] * 2 + [0] * 5, [7] * 1 + [3] * 14 + [4]], np.int32)
MASK = np.array([[0, 0, 1, 1, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0, 1], [1] * 6 + [0] * 3 + [1] * 7], bool)


def attention(name):
    options = dict(qk_norm="rms") if name == "norm" else OPTIONS[name]
    return Attention(width=D, heads=2, kv_heads=1, **options)


@functools.cache
def parameters(name):
    """Perturbed, without the names of axes."""
    fresh = jax.jit(attention(name).init)(jax.random.key(1), jnp.zeros((B, T, D)), make_sequence(B, T)[0])
    leaves, tree = jax.tree.flatten(nn.unbox(fresh))
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [x + 0.4 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


def draw(seed=0, length=T):
    return jax.random.normal(jax.random.key(seed), (B, length, D))


@functools.partial(jax.jit, static_argnames="name")
def step(params, x, dy, state, dlast, ids, mask, segment, position, name):
    """y, the new state and the next carry; and gradients of the parameters, x and the state."""
    seq, *carry = make_sequence(*x.shape[:2], ids, mask, segment, position)
    whole = {} if state is None else {k: v for k, v in state.items() if not jnp.issubdtype(v.dtype, jnp.floating)}

    def run(params, x, numbers):
        y, new = attention(name).apply(params, x, seq, None if state is None else whole | numbers)
        real = y if mask is None else jnp.where(mask[..., None], y, 0)
        return (real, {k: v for k, v in new.items() if k not in whole or k in numbers}), new

    numbers = {} if state is None else {k: v for k, v in state.items() if k not in whole}
    (y, last), pull, new = jax.vjp(run, params, x, numbers, has_aux=True)
    last = {k: v for k, v in last.items() if jnp.issubdtype(v.dtype, jnp.floating)}
    zeros = jax.tree.map(jnp.zeros_like, last) if dlast is None else dlast
    rest = {k: np.zeros(v.shape, jax.dtypes.float0) for k, v in new.items() if k not in last}
    given = {**zeros, **{k: v for k, v in rest.items() if state is None}}
    return y, new, carry, pull((dy, given))


def close(ours, reference, tolerance=2e-5):
    for (path, x), want in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(reference), strict=True):
        error = np.linalg.norm(np.asarray(x - want, np.float64)) / max(np.linalg.norm(np.asarray(want)), 1e-6)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: relative error {error:.1e}"


def in_pieces(name, x, dy, sizes):
    """y, the last state, and the gradients of the parameters and of x, by calls that go on from each other's state."""
    params, state = parameters(name), attention(name).init_state(B, T)
    segment, position = jnp.asarray(SEGMENTS[:, 0]), jnp.zeros(B, jnp.int32)
    calls, ys, start = [], [], 0
    for size in sizes:
        at = slice(start, start + size)
        arguments = (state, None, SEGMENTS[:, at], MASK[:, at], segment, position)
        calls.append((at, arguments))
        y, state, (segment, position), _ = step(params, x[:, at], dy[:, at], *arguments, name=name)
        ys.append(y)
        start += size
    total, dxs, dlast = None, [], None
    for at, (old, _, *rest) in reversed(calls):
        dparams, dx, dlast = step(params, x[:, at], dy[:, at], old, dlast, *rest, name=name)[3]
        total = dparams if total is None else jax.tree.map(jnp.add, total, dparams)
        dxs.insert(0, dx)
    return jnp.concatenate(ys, axis=1), state, (total, jnp.concatenate(dxs, axis=1))


@each
@pytest.mark.parametrize("sizes", [pytest.param((1,) * T, marks=pytest.mark.slow), (7, 1, 8)], ids=["tokens", "chunks"])
def test_pieces_equal_the_whole(name, sizes):
    """Of packed and padded rows: values, the state that matters, and gradients. Padding holds NaN."""
    x, dy = jnp.where(MASK[..., None], draw(), jnp.nan), draw(1)
    y, last, _, (dparams, dx, _) = step(parameters(name), x, dy, None, None, SEGMENTS, MASK, None, None, name=name)
    got, got_last, gradients = in_pieces(name, x, dy, sizes)
    close(got, y)
    close(gradients, (dparams, dx), 1e-4)
    assert {k: v.shape for k, v in last.items()} == {k: v.shape for k, v in got_last.items()}
    np.testing.assert_array_equal(last["length"], got_last["length"])
    y_next, *_ = step(parameters(name), draw(2, 1), dy[:, :1], last, None, None, None, None, None, name=name)
    got_next, *_ = step(parameters(name), draw(2, 1), dy[:, :1], got_last, None, None, None, None, None, name=name)
    if "window" in OPTIONS[name]:  # the other caches are full
        close(got_next, y_next)


@each
def test_packed_documents_equal_separate_ones(name):
    """In value and in gradient."""
    x, dy = draw(), draw(1)
    y, _, _, (dparams, dx, _) = step(parameters(name), x, dy, None, None, SEGMENTS, None, None, None, name=name)
    total = jax.tree.map(jnp.zeros_like, dparams)
    for row, start, stop in [(0, 0, 9), (0, 9, 11), (0, 11, 16), (1, 0, 1), (1, 1, 15), (1, 15, 16)]:
        of = lambda v: jnp.zeros((B, T, D)).at[0, : stop - start].set(v[row, start:stop])  # noqa: B023, E731
        mask = np.broadcast_to(np.arange(T) < stop - start, (B, T))
        alone, _, _, (dp, dx_alone, _) = step(
            parameters(name), of(x), of(dy), None, None, None, mask, None, None, name=name
        )
        close(y[row, start:stop], alone[0, : stop - start])
        close(dx[row, start:stop], dx_alone[0, : stop - start], 1e-4)
        total = jax.tree.map(jnp.add, total, dp)
    close(dparams, total, 1e-4)


def test_sinks_have_slots_of_their_own():
    """Those of the last document; the ring holds the newest tokens that are no sinks."""
    module = Attention(width=D, heads=2, kv_heads=1, window=3, sinks=2)
    cache = module.init_state(1, 100)
    assert cache["k"].shape[1] == 5
    assert module.init_state(1, 2)["k"].shape[1] == 4
    position = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4]], np.int32)
    document = np.array([[0, 0, 0, 0, 1, 1, 1, 1, 1]], np.int32)
    value = np.arange(9.0)[None, :, None, None] * np.ones((1, 9, 1, 4))
    new = dict(k=value, v=-value, document=document, position=position)
    cache = put_keys(cache, jax.tree.map(jnp.asarray, new), jnp.arange(9)[None], None, 3, 2)
    np.testing.assert_array_equal(cache["k"][0, :, 0, 0], [4, 5, 6, 7, 8])
    np.testing.assert_array_equal(cache["position"][0], [0, 1, 2, 3, 4])
    assert newest(cache) == 4
    again = {name: x[:, :1] for name, x in new.items()} | dict(document=np.array([[2]], np.int32))
    cache = put_keys(cache, jax.tree.map(jnp.asarray, again), jnp.array([[9]]), None, 3, 2)
    np.testing.assert_array_equal(cache["document"][0], [2, 1, 1, 1, 1])
    assert newest(cache) == 0


@pytest.mark.slow
def test_qk_norm_is_qwen_3s():
    """With rotary positions and grouped heads."""
    torch = pytest.importorskip("torch")
    qwen = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    config = qwen.Qwen3Config(
        hidden_size=D, num_attention_heads=2, num_key_value_heads=1, head_dim=4, rope_theta=1e4, vocab_size=3
    )
    config._attn_implementation = "eager"
    theirs = qwen.Qwen3Attention(config, layer_idx=0).eval()
    params = jax.tree.map(np.array, parameters("norm")["params"])
    with torch.no_grad():
        for name, projection in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            getattr(theirs, projection).weight.copy_(torch.tensor(params[name].reshape(D, -1).T))
        theirs.o_proj.weight.copy_(torch.tensor(params["out"].reshape(-1, D).T))
        theirs.q_norm.weight.copy_(torch.tensor(params["query_norm"]["scale"]))
        theirs.k_norm.weight.copy_(torch.tensor(params["key_norm"]["scale"]))
        x = torch.tensor(np.array(draw()))
        turn = qwen.Qwen3RotaryEmbedding(config)(x, torch.arange(T)[None])
        mask = torch.triu(torch.full((T, T), -1e30), 1)[None, None]
        want = theirs(x, turn, mask)[0].numpy()
    y, _ = attention("norm").apply({"params": params}, draw(), make_sequence(B, T)[0])
    np.testing.assert_allclose(y, want, rtol=2e-5, atol=2e-6)


def test_log_n_is_its_formula():
    q, positions = np.ones((1, 5, 1, 2)), np.array([[0, 1, 7, 8, 99]])
    want = np.maximum(1, np.log(positions + 1) / np.log(8))
    np.testing.assert_allclose(log_n(jnp.asarray(q), jnp.asarray(positions), 8)[0, :, 0, 0], want[0], rtol=1e-6)


def test_forget_gates_are_their_formula():
    """softmax(q k^T / sqrt(d) + log of the product of the gates after the key up to the query) v, in float64."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), parameters("forget")["params"])
    x = np.asarray(draw(), np.float64)
    q, k, v = (np.einsum("btd,dhk->bhtk", x, params[name]) for name in ("query", "key", "value"))
    gates = 1 / (1 + np.exp(-(x @ params["forget"] + params["forget_bias"])))
    scores = q @ k.swapaxes(2, 3) / 2
    for t in range(T):
        for s in range(t + 1):
            scores[:, :, t, s] += np.log(np.prod(gates[:, s + 1 : t + 1], axis=1))
    weights = np.where(np.tril(np.ones((T, T), bool)), np.exp(scores), 0)
    o = weights / weights.sum(-1, keepdims=True) @ v
    want = np.einsum("bhtk,hkd->btd", o, params["out"])
    y, _ = attention("forget").apply(parameters("forget"), draw(), make_sequence(B, T)[0])
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(sinks=2, window=1), r"config.model.attention.sinks=2: must be at most model.attention.window=1"),
        (dict(mask="strided", window=4), r"config.model.attention.window=4: must be 0 with mask='strided'"),
        (dict(mask="bigbrid"), r"config.model.attention.mask='bigbrid': must be one of .*; did you mean 'bigbird'"),
        (dict(mask="fixed", summary=9), r"config.model.attention.summary=9: must be at most model.attention.stride=8"),
        (dict(log_n=1), r"config.model.attention.log_n=1: must be 0 or at least 2"),
        (dict(softcap=-1.0), r"config.model.attention.softcap=-1.0: must be at least 0"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        Attention(width=D, **fields)
    assert set(fields) <= set(ATTENTION.fields)
