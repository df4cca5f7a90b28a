"""Which tiles of keys each tile of queries visits, as tables that the kernels read, and the reverse for gradients.

If tokens are at positions 0 to T - 1, the tables follow from these before compilation. Documents and padding are known
only when the program runs. They shorten each list at its two ends, by the ranges of documents in the tiles, and say
which tiles need a mask inside. Given positions are known only then too, and with them the whole lists.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqmodels.kernels.attention.masks import Mask, Range
from seqmodels.kernels.tensor_cores import SIDE

ROWS = 2 * SIDE  # of a tile that visits others: 64 for each of the two warpgroups that multiply
PARTLY, NUMBER = 4, 5  # the first bits of these in an entry of `Visits.order`, after those of the quarters


class Visits(NamedTuple):
    """The tiles that each of N tiles visits.

    Attributes:
        order: [B or 1, N, M] int32, the visits. The lowest four bits say which quarters of the two tiles' pairs of
            tokens the pattern has: bit 2 r + c, where r and c are the halves of 64 tokens of the tile that visits and
            of the one that is visited. The next bit says that some tokens do not see each other, so that a mask is
            needed. The other bits are the number of the visited tile.
        span: [B or 1, N, 2] int32: the place in `order` of the first visit, and that after the last one.
    """

    order: jax.Array | np.ndarray
    span: jax.Array | np.ndarray


class Documents(NamedTuple):
    """[B, T] int32 for queries and for keys; a query sees the keys of equal number.

    nobody [B, 1]: a number that no query has, and that the keys have which no query sees. None: there are none.
    """

    queries: jax.Array
    keys: jax.Array
    nobody: jax.Array | None = None


class Given(NamedTuple):
    """What is known of the tokens only when the program runs.

    documents: None: there is one. positions [B, T] int32, T a multiple of `ROWS`. None: they are 0 to T - 1.
    """

    documents: Documents | None = None
    positions: jax.Array | None = None


class Static(NamedTuple):
    """What follows from positions: the lists in order, with further tiles behind them.

    Attributes:
        tile: [N, M] int32, M the greatest number of visits. visits: [N] int32.
        whole: [N, M] bool, whether all tokens see each other. quarters: [N, M] int32, see `Visits.order`.
    """

    tile: np.ndarray
    visits: np.ndarray
    whole: np.ndarray
    quarters: np.ndarray


def visits(mask: Mask, given: Given, length: int, columns: int, *, by_keys: bool = False) -> Visits:
    """The tiles of keys that each tile of queries visits; with `by_keys`, the tiles of queries that see a tile of keys.

    With given positions the quarters in the tables mean nothing.

    Args:
        length: T, a multiple of `ROWS`.
        columns: tokens of a visited tile, 64 or 128.
    """
    documents, positions = given
    if positions is not None:
        return _of_given_positions(mask, positions, documents, columns, by_keys)
    static = of_positions(mask, length, columns, by_keys)
    if documents is None:
        every = np.stack([np.zeros_like(static.visits), static.visits], axis=-1)
        return Visits(_entries(static, ~static.whole)[None], every[None])
    met, alike = (
        jnp.take_along_axis(x, static.tile[None], axis=2) for x in _documents_meet(documents, columns, by_keys)
    )
    most = static.tile.shape[1]
    met = met & (np.arange(most) < static.visits[:, None])
    first, last = jnp.argmax(met, axis=-1), most - jnp.argmax(met[..., ::-1], axis=-1)
    span = jnp.stack([first, jnp.where(jnp.any(met, axis=-1), last, first)], axis=-1).astype(jnp.int32)
    return Visits(_entries(static, ~(static.whole & alike)), span)


def _of_given_positions(
    mask: Mask, positions: jax.Array, documents: Documents | None, columns: int, by_keys: bool
) -> Visits:
    """As `visits`, by the ranges of positions in the tiles."""
    queries, keys = (columns, ROWS) if by_keys else (ROWS, columns)
    tiles = positions.reshape(len(positions), -1, 1, queries), positions.reshape(len(positions), 1, -1, keys)
    rows, columns_of = ((x.min(-1), x.max(-1)) for x in tiles)
    needed = mask.touches(rows, columns_of, max(queries, keys))
    whole = jnp.zeros_like(needed)  # whether a pattern has all pairs of two tiles is not looked at
    if mask.pattern is None:
        whole = jnp.broadcast_to(covers(mask, rows, columns_of), needed.shape)
    if by_keys:
        needed, whole = (jnp.swapaxes(x, 1, 2) for x in (needed, whole))
    if documents is not None:
        met, alike = _documents_meet(documents, columns, by_keys)
        needed, whole = needed & met, whole & alike
    order = jnp.argsort(~needed, axis=2, stable=True).astype(jnp.int32)
    partly = ~jnp.take_along_axis(whole, order, axis=2)
    count = needed.sum(axis=2, dtype=jnp.int32)
    entries = order * 2**NUMBER + partly * np.int32(2**PARTLY)
    return Visits(entries, jnp.stack([jnp.zeros_like(count), count], axis=-1))


def _entries(static: Static, partly: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    return static.tile * 2**NUMBER + partly * np.int32(2**PARTLY) + static.quarters


@functools.lru_cache(maxsize=64)
def of_positions(mask: Mask, length: int, columns: int, by_keys: bool) -> Static:
    """The lists by positions alone, for patterns of blocks of a multiple of 64 tokens."""
    queries, keys = (columns, ROWS) if by_keys else (ROWS, columns)
    i, j = ((np.arange(0, length, n), np.arange(0, length, n) + n - 1) for n in (queries, keys))
    rows, keys_of = (i[0][:, None], i[1][:, None]), (j[0][None], j[1][None])
    rules = dataclasses.replace(mask, pattern=None)
    needed, whole = rules.touches(rows, keys_of, queries), covers(rules, rows, keys_of)
    block = np.arange(0, length, SIDE)
    chosen = (
        np.ones((len(block),) * 2, bool) if mask.pattern is None else mask.pattern.sees(block[:, None], block[None])
    )
    if by_keys:
        needed, whole, chosen = needed.T, whole.T, chosen.T
    chosen = chosen.reshape(length // ROWS, ROWS // SIDE, length // columns, columns // SIDE)
    needed, whole = needed & chosen.any((1, 3)), whole & chosen.all((1, 3))
    bits = 2 * np.arange(ROWS // SIDE)[:, None, None] + np.arange(columns // SIDE)
    quarters = np.sum(chosen << bits, axis=(1, 3), dtype=np.int32)
    count = needed.sum(axis=1, dtype=np.int32)
    tile = np.argsort(~needed, axis=1, kind="stable").astype(np.int32)[:, : max(count.max(), 1)]
    return Static(tile, count, *(np.take_along_axis(x, tile, axis=1) for x in (whole, quarters)))


def covers(rules: Mask, rows: Range, columns: Range) -> np.ndarray:
    """Whether every query in a range of positions sees every key in another, by a mask without a pattern.

    It is not asked where no query sees a key.
    """
    whole = rows[0] >= columns[1] if rules.causal else (rows[0] >= 0) & (columns[0] >= 0)
    if rules.window is not None:
        whole = whole & ((rows[1] - columns[0] < rules.window) | (columns[1] < rules.sinks))
    return whole


def _documents_meet(documents: Documents, columns: int, by_keys: bool) -> tuple[jax.Array, jax.Array]:
    """[B, N, M] bool: whether tiles may have a document in common, and whether both have one and the same only."""
    queries, keys = (columns, ROWS) if by_keys else (ROWS, columns)
    row, column = (x.reshape(len(x), -1, n) for x, n in zip(documents[:2], (queries, keys), strict=True))
    hidden = jnp.zeros_like(column, bool) if documents.nobody is None else column == documents.nobody[..., None]
    limits = np.iinfo(np.int32)
    low = jnp.where(hidden, limits.max, column).min(-1)[:, None]
    high = jnp.where(hidden, limits.min, column).max(-1)[:, None]
    first, last = row.min(-1)[..., None], row.max(-1)[..., None]
    touched = (low <= last) & (high >= first)
    alike = (first == last) & (low == first) & (high == first) & ~hidden.any(-1)[:, None]
    return (jnp.swapaxes(touched, 1, 2), jnp.swapaxes(alike, 1, 2)) if by_keys else (touched, alike)
