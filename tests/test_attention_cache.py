"""The cache of attention: rings of a window, chunks longer than the ring, padding, documents, and what does not fit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.layers.kv_cache import EMPTY, key_positions, put_keys
from seqmodels.mixers.attention import Attention
from seqmodels.sequence import make_sequence

B, T, D, WINDOW = 2, 13, 8, 4
CUTS = {
    "tokens": list(range(1, T)),
    "shorter than the ring": [3, 5, 8, 10],
    "longer than the ring": [1, 8],
}
SEGMENTS = np.array([[0] * 6 + [1] * 2 + [0] * 5, [7] * 1 + [3] * 11 + [4]], np.int32)
MASK = np.array([[0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1], [1] * 6 + [0] * 5 + [1, 0]], bool)


def attention(window=WINDOW):
    return Attention(width=D, heads=2, kv_heads=1, window=window)


@functools.cache
def parameters():
    return jax.jit(attention().init)(jax.random.key(1), jnp.zeros((B, T, D)), make_sequence(B, T)[0])


def draw(seed=0):
    return jax.random.normal(jax.random.key(seed), (B, T, D))


@functools.partial(jax.jit, static_argnames="window")
def apply(params, x, seq, state=None, window=WINDOW):
    return attention(window).apply(params, x, seq, state)


def in_pieces(params, x, state, cuts, segment_ids=None, mask=None, window=WINDOW):
    """y of all pieces, and the last state."""
    ys = []
    segment, position = jnp.zeros(B, jnp.int32) if segment_ids is None else segment_ids[:, 0], jnp.zeros(B, jnp.int32)
    for start, stop in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        ids, real = (None if v is None else jnp.asarray(v[:, start:stop]) for v in (segment_ids, mask))
        seq, segment, position = make_sequence(B, stop - start, ids, real, segment, position)
        y, state = apply(params, x[:, start:stop], seq, state, window=window)
        ys.append(y)
    return jnp.concatenate(ys, axis=1), state


@pytest.fixture(autouse=True)
def whole_float32():
    """GPUs multiply float32 matrices in a shorter format unless asked."""
    with jax.default_matmul_precision("highest"):
        yield


def close(ours, reference, tolerance=2e-5):
    for (path, x), want in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(reference), strict=True):
        error = np.linalg.norm(np.asarray(x - want, np.float64)) / max(np.linalg.norm(np.asarray(want)), 1e-6)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: relative error {error:.1e}"


def zero_padding(y, mask):
    return y if mask is None else jnp.where(mask[..., None], y, 0)


@pytest.mark.parametrize(
    "cuts",
    [pytest.param("tokens", marks=pytest.mark.slow), "shorter than the ring", "longer than the ring"],
)
@pytest.mark.parametrize(
    "segment_ids, mask",
    [pytest.param(None, None, marks=pytest.mark.slow), (SEGMENTS, MASK)],
    ids=["plain", "packed and padded"],
)
def test_a_ring_equals_the_whole_row(cuts, segment_ids, mask):
    """In value, last state, and gradients of the input and the parameters, whatever stands in the padding."""
    module, params = attention(), parameters()
    x, weights = draw(), draw(1)
    poisoned = x if mask is None else jnp.where(mask[..., None], x, jnp.nan)
    seq = make_sequence(B, T, segment_ids, None if mask is None else jnp.asarray(mask))[0]

    def whole(params, x):
        return apply(params, x, seq)

    def pieces(params, x):
        return in_pieces(params, x, module.init_state(B, T + 5), CUTS[cuts], segment_ids, mask)

    def value_and_gradients(run, x):
        def loss(params, x):
            y, state = run(params, x)
            y = zero_padding(y, mask)
            return jnp.sum(weights * y), (y, state)

        gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
        return out, gradients

    (y, state), gradients = value_and_gradients(whole, x)
    (got, got_state), got_gradients = value_and_gradients(pieces, poisoned)
    close(got, y)
    close(got_gradients, gradients, 1e-4)
    close(got_state, state)


def test_a_windowed_row_is_that_of_a_mask_over_all_keys():
    """Attention over the last tokens only: those before the window change nothing, the first within it does."""
    params = parameters()
    y, _ = apply(params, x := draw(), make_sequence(B, T)[0])
    for t in range(WINDOW, T):
        first = t - WINDOW + 1
        changed, _ = apply(params, x.at[:, :first].add(1.0), make_sequence(B, T)[0])
        np.testing.assert_allclose(changed[:, t], y[:, t], atol=1e-6)
        changed, _ = apply(params, x.at[:, first].add(1.0), make_sequence(B, T)[0])
        assert np.abs(changed[:, t] - y[:, t]).max() > 1e-5


@pytest.mark.parametrize("max_length, slots", [(2, 2), (WINDOW, WINDOW), (100, WINDOW)])
def test_a_ring_has_no_more_slots_than_the_window(max_length, slots):
    state = attention().init_state(B, max_length)
    assert state["k"].shape == (B, slots, 1, D // 2)
    assert all(x.shape[0] == B for x in jax.tree.leaves(state))
    assert attention(0).init_state(B, max_length)["k"].shape[1] == max_length


def test_a_ring_knows_each_keys_position():
    """Token p is at slot p % S, and padding takes no slot."""
    module, params = attention(), parameters()
    _, state = in_pieces(params, draw(), module.init_state(B, 50), [7], mask=MASK)
    np.testing.assert_array_equal(state["length"], MASK.sum(1))
    np.testing.assert_array_equal(key_positions(state), [[4, 5, 6, 7], [4, 5, 6, 3]])


@pytest.mark.parametrize("window", [0, WINDOW])
@pytest.mark.parametrize("length", [1, 3])
def test_empty_slots_never_leak(window, length):
    """What stands in a slot that holds no key reaches no output and no gradient."""
    module, params = attention(window), parameters()
    seq = make_sequence(B, length, position=jnp.full(B, 2), segment=jnp.zeros(B, jnp.int32))[0]
    _, state = apply(params, draw()[:, :2], make_sequence(B, 2)[0], module.init_state(B, 6), window=window)
    empty = (state["document"] == EMPTY)[..., None, None]
    assert empty.any() and not jnp.where(empty, state["k"], 0).any()
    filled = dict(state, **{name: jnp.where(empty, 1e3, state[name]) for name in "kv"})

    def loss(params, x, state):
        y, _ = apply(params, x, seq, state, window=window)
        return jnp.sum(jnp.sin(y)), y

    run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    close(run(params, draw(2)[:, :length], filled), run(params, draw(2)[:, :length], state), 1e-6)


@pytest.mark.parametrize("window", [0, WINDOW])
def test_dropped_keys_never_enter_the_cache(window):
    """Padding, tokens that the window has passed, and those beyond the last slot, NaN or not."""
    cache = attention(window).init_state(B, WINDOW)
    length, position = 7, np.array([[0, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 4, 4]], np.int32)
    mask = np.array([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]], bool)
    kept = (position >= mask.sum(1, keepdims=True) - WINDOW if window else position < WINDOW) & mask
    k = np.where(kept, 1.0 + position, np.nan)[..., None, None] * np.ones((B, length, 1, D // 2))
    new = dict(k=k, v=-k, document=np.zeros_like(position))
    cache = put_keys(cache, jax.tree.map(jnp.asarray, new), jnp.asarray(position), jnp.asarray(mask), window)
    want = [[4, 5, 2, 3], [4, 1, 2, 3]] if window else [[0, 1, 2, 3]] * 2
    np.testing.assert_array_equal(cache["k"][..., 0, 0], 1.0 + np.array(want))
    np.testing.assert_array_equal(cache["v"][..., 0, 1], -1.0 - np.array(want))
    np.testing.assert_array_equal(cache["length"], mask.sum(1))


def test_a_cache_that_is_too_small_is_refused():
    """Where sizes alone say it; a ring that is as long as its window takes any chunk."""
    for window, max_length in ((0, T - 1), (T, T - 1), (T + 5, 3)):
        module, params = attention(window), parameters()
        message = rf"attention: {T} tokens do not fit into a cache of {max_length} slots; .* max_length >= {T}"
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(module.apply, params, draw(), make_sequence(B, T)[0], module.init_state(B, max_length))
    state = attention().init_state(B, T)
    jax.eval_shape(attention().apply, parameters(), draw(), make_sequence(B, T)[0], state)


@pytest.mark.parametrize("window", [0, WINDOW])
@pytest.mark.parametrize("max_length", [(), (0,), (-1,)])
def test_a_cache_without_slots_is_refused(window, max_length):
    """It would drop every key."""
    with pytest.raises(ValueError, match="max_length must be at least 1, the number of tokens that a row will have"):
        attention(window).init_state(B, *max_length)


def test_tokens_without_a_free_slot_are_nan():
    """Where only the running computation knows how many slots are used. The tokens before are right."""
    module, params, cuts = attention(0), parameters(), [3, 6, 7, 8]
    whole = in_pieces(params, draw(), module.init_state(B, T), cuts, mask=MASK, window=0)[0]
    y = in_pieces(params, draw(), module.init_state(B, 5), cuts, mask=MASK, window=0)[0]
    lost = (np.cumsum(MASK, 1) > 5) & MASK
    assert lost.any() and np.isnan(y[lost]).all()
    close(y[~lost & MASK], whole[~lost & MASK])
