"""Which tiles of keys each tile of queries visits, as tables that the kernels read, and the reverse for gradients.

The tables follow from positions before compilation. Documents and padding are known only when the program runs. They
shorten each list at its two ends, by the ranges of documents in the tiles, and say which tiles need a mask inside.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqmodels.kernels.attention.masks import Mask, Range

NOBODY = np.iinfo(np.int32).min  # document of keys that no query sees


class Tiles(NamedTuple):
    """Sizes: tokens in a tile of the visitors, and in a tile of those that they visit."""

    visitor: int
    visited: int


class Visits(NamedTuple):
    """The tiles that each of N tiles visits.

    Attributes:
        order: [B or 1, N, M] int32: for each visit twice the number of the tile, plus 1 if the tokens of both tiles see
            each other in part only, so that a mask is needed.
        span: [B or 1, N, 2] int32: the place in `order` of the first visit, and that after the last one.
    """

    order: jax.Array | np.ndarray
    span: jax.Array | np.ndarray


class Documents(NamedTuple):
    """[B, T] int32 for queries and for keys; a query sees the keys of equal number. Keys of `NOBODY` are not seen."""

    queries: jax.Array
    keys: jax.Array


def visits(mask: Mask, documents: Documents | None, length: int, tiles: Tiles, *, by_keys: bool = False) -> Visits:
    """The tiles of keys that each tile of queries visits; with `by_keys`, the tiles of queries that see a tile of keys.

    Args:
        length: T, a multiple of both sizes. Tokens are at positions 0 to T - 1.
    """
    order, count, whole = of_positions(mask, length, tiles, by_keys)
    number = np.arange(order.shape[1])
    if documents is None:
        span = np.stack([np.zeros_like(count), count], axis=-1)
        return Visits((2 * order + ~whole)[None], span[None])
    touched, alike = _documents_meet(documents, tiles, by_keys)
    touched, alike = (jnp.take_along_axis(x, order[None], axis=2) for x in (touched, alike))
    touched = touched & (number < count[:, None])
    some = jnp.any(touched, axis=-1)
    first, last = jnp.argmax(touched, axis=-1), len(number) - jnp.argmax(touched[..., ::-1], axis=-1)
    span = jnp.stack([first, jnp.where(some, last, first)], axis=-1)
    return Visits((2 * order + ~(whole & alike)).astype(jnp.int32), span.astype(jnp.int32))


@functools.lru_cache(maxsize=64)
def of_positions(mask: Mask, length: int, tiles: Tiles, by_keys: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What follows from positions alone.

    Returns:
        [N, M] int32, the tiles that each tile visits, in order, M the greatest number of visits, then any others;
        [N] int32, the number of visits; [N, M] bool, whether all tokens of both tiles see each other.
    """
    queries, keys = tiles[::-1] if by_keys else tiles
    i, j = ((np.arange(0, length, n), np.arange(0, length, n) + n - 1) for n in (queries, keys))
    rows, columns = (i[0][:, None], i[1][:, None]), (j[0][None], j[1][None])
    needed, whole = mask.touches(rows, columns, queries), covers(mask, rows, columns)
    if by_keys:
        needed, whole = needed.T, whole.T
    count = needed.sum(axis=1, dtype=np.int32)
    order = np.argsort(~needed, axis=1, kind="stable").astype(np.int32)[:, : max(count.max(), 1)]
    return order, count, np.take_along_axis(whole, order, axis=1)


def covers(mask: Mask, rows: Range, columns: Range) -> np.ndarray:
    """Whether every query in a range of positions sees every key in another, for patterns whose blocks hold the ranges.

    It is not asked where no query sees a key.
    """
    whole = rows[0] >= columns[1] if mask.causal else (rows[0] >= 0) & (columns[0] >= 0)
    if mask.window is not None:
        whole = whole & ((rows[1] - columns[0] < mask.window) | (columns[1] < mask.sinks))
    return whole


def _documents_meet(documents: Documents, tiles: Tiles, by_keys: bool) -> tuple[jax.Array, jax.Array]:
    """[B, N, M] bool: whether tiles may have a document in common, and whether both have one and the same only."""
    queries, keys = tiles[::-1] if by_keys else tiles
    row, column = (x.reshape(len(x), -1, n) for x, n in zip(documents, (queries, keys), strict=True))
    seen = jnp.where(column == NOBODY, np.iinfo(np.int32).max, column)
    low, high, lowest = (x[:, None] for x in (seen.min(-1), column.max(-1), column.min(-1)))
    first, last = row.min(-1)[..., None], row.max(-1)[..., None]
    touched = (low <= last) & (high >= first) & (high != NOBODY)
    alike = (first == last) & (lowest == first) & (high == first)
    return tuple(jnp.swapaxes(x, 1, 2) for x in (touched, alike)) if by_keys else (touched, alike)  # type: ignore
