"""Masks by positions, the tiles that they leave out, and the memory and the work that this saves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.kernels.attention import attention, masks, tiles, xla
from seqmodels.kernels.attention.arguments import Side, Tokens
from seqmodels.kernels.attention.masks import BigBird, Fixed, Mask, Strided
from seqmodels.kernels.attention.visible import reached, visible
from seqmodels.layers.rerope import rerope
from seqmodels.layers.rope_scaling import frequencies
from tests.kernels.attention_cases import chosen

T = 48
PATTERNS = [
    Strided(5),
    Strided(3, block=4),
    Fixed(6, summary=2),
    Fixed(3, block=4),
    BigBird(window=2, first=1, random=2, block=4),
    BigBird(window=1, first=0, random=3, block=2, seed=5),
]
MASKS = [Mask(causal, pattern=pattern) for pattern in PATTERNS for causal in (True, False)]
MASKS += [Mask(), Mask(False), Mask(window=7), Mask(False, window=7), Mask(window=5, sinks=3)]


def whole(mask):
    """[T, T] bool, element by element."""
    where = np.arange(T, dtype=np.int32)
    seen = np.ones((T, T), bool) if mask.trivial else mask.sees(where[:, None], where[None])
    return np.broadcast_to(seen, (T, T))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_patterns_are_their_definitions(pattern):
    """With numpy and with jax."""
    want = np.array([[chosen(pattern, i, j) for j in range(T)] for i in range(T)])
    where = jnp.arange(T)
    np.testing.assert_array_equal(pattern.sees(np.arange(T)[:, None], np.arange(T)[None]), want)
    np.testing.assert_array_equal(pattern.sees(where[:, None], where[None]), want)
    assert not want.all()


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_most_keys(mask):
    assert mask.most_keys(T) == whole(mask).sum(1).max()


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("size", [4, 7])
def test_tiles_that_nobody_sees_are_left_out(mask, size):
    """Exactly these where blocks and tiles are the same, and never others."""
    side = tiles.side(Tokens().queries(T), size)
    plan = tiles.plan(mask, side, side)
    assert isinstance(plan.order, np.ndarray), "it is known before compilation"
    count = -(-T // size)
    padded = np.pad(whole(mask), (0, count * size - T))
    seen = padded.reshape(count, size, count, size).any((1, 3))
    visited = np.zeros((count, count), bool)
    for row, (order, some) in enumerate(zip(plan.order, plan.visits, strict=True)):
        assert sorted(order) == list(range(count)) and list(order[:some]) == sorted(order[:some])
        visited[row, order[:some]] = True
    assert not (seen & ~visited).any()
    if mask.pattern is None or mask.pattern.block == size:
        np.testing.assert_array_equal(visited, seen)


def test_documents_and_positions_leave_out_tiles():
    """By what a running computation knows: documents that do not meet, and blocks of each document."""
    segment = np.repeat([0, 1, 2], [8, 16, 24])[None].astype(np.int32)
    position = np.concatenate([np.arange(8), np.arange(16), np.arange(24)])[None].astype(np.int32)
    queries = tiles.side(Side(jnp.asarray(position), jnp.asarray(segment)), 4)
    for pattern in (None, BigBird(window=1, first=1, random=1, block=4), Strided(2, block=4)):
        mask = Mask(pattern=pattern)
        order, count = jax.jit(functools.partial(tiles.plan, mask))(queries, queries)
        seen = visible((T, T), mask, Tokens(segment, segment, positions=position, key_positions=position))[0]
        want = np.asarray(seen).reshape(12, 4, 12, 4).any((1, 3))
        np.testing.assert_array_equal(count, want.sum(1))
        for row in range(12):
            np.testing.assert_array_equal(order[row, : count[row]], np.flatnonzero(want[row]))


def test_draws_are_even():
    """Each block draws all blocks before it, none much more often than another."""
    pattern = BigBird(random=1)
    draws = np.array([pattern.drawn(np.arange(2000, 6000, dtype=np.int32), n) for n in range(3)])
    share = draws / np.arange(2000, 6000)
    assert (share >= 0).all() and (share < 1).all()
    counts = np.histogram(share, bins=20, range=(0, 1))[0]
    assert np.abs(counts - 600).max() < 6 * 600**0.5
    assert np.abs(np.corrcoef(share)[np.triu_indices(3, 1)]).max() < 0.1


@pytest.mark.parametrize("case", ["one document", "documents", "leaky_rerope"])
def test_memory_is_linear(case):
    """Forward and backward at T = 32,768; an array [T, T] of booleans alone would take 1 GiB."""
    length = 32_768
    q = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
    ids = None if case == "one document" else jax.ShapeDtypeStruct((1, length), jnp.int32)
    attend = functools.partial(attention, implementation="xla")
    if case == "leaky_rerope":
        attend = functools.partial(rerope, trained=512, factor=64.0, frequency=frequencies(8, 1e4))

    def loss(q, k, v, ids):
        return jnp.sum(attend(q, k, v, segment_ids=ids))

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, q, q, ids).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 24 * q.size * 4  # 24 arrays [T, H, d]


def test_work_is_that_of_the_tiles(monkeypatch):
    """Loops run once for each tile that is visited: a callback counts them."""
    monkeypatch.setitem(xla.TILE, jax.default_backend(), 8)
    visits, original = [], xla._sums

    def counted(options, inputs, queries, keys):
        jax.debug.callback(
            lambda i, j: visits.append((int(i), int(j))), queries.side.position[0, 0], keys.side.position[0, 0]
        )
        return original(options, inputs, queries, keys)

    monkeypatch.setattr(xla, "_sums", counted)
    q = jnp.ones((1, 64, 1, 4))
    jax.block_until_ready(jax.jit(lambda q: attention(q, q, q, window=9, implementation="xla"))(q))
    jax.effects_barrier()
    assert sorted(visits) == [(i, j) for i in range(0, 64, 8) for j in (i - 8, i) if j >= 0]


def test_what_a_bad_key_reaches():
    """In chunks, of which the last begins earlier."""
    draw = np.random.default_rng(0)
    segment = np.cumsum(draw.random((2, T)) < 0.1, axis=1).astype(np.int32)
    tokens = Tokens(segment, segment)
    for mask in (Mask(), Mask(window=3), Mask(False)):
        for bad in (draw.random((2, T)) < 0.1, np.zeros((2, T), bool)):
            want = (np.asarray(visible((T, T), mask, tokens)) & bad[:, None]).any(-1)
            np.testing.assert_array_equal(jax.jit(lambda bad: reached(bad, T, tokens, mask=mask, chunk=10))(bad), want)  # noqa: B023


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Mask(window=0), "window must be 1 or more, got 0"),
        (lambda: Mask(window=2, sinks=-1), "sinks must be 0 or more, got -1"),
        (lambda: Mask(sinks=2), "sinks=2 need a window"),
        (lambda: Strided(0), "stride must be 1 or more, got 0"),
        (lambda: Fixed(2, summary=3), "summary must be at most stride=2, got 3"),
        (lambda: masks.BigBird(random=-1), "random must be 0 or more, got -1"),
    ],
)
def test_bad_masks_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
