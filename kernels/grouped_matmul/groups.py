"""Where the rows of each group are."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


def bounds(sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first row of each group, and the row after its last, [X] int32 each."""
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    return ends - sizes, ends


def real_rows(x: jax.Array, sizes: jax.Array) -> jax.Array:
    """x [M, ...] with zeros in the rows that belong to no group, those beyond the sum of the sizes."""
    return jnp.where(jnp.arange(x.shape[0])[:, None] < jnp.sum(sizes, dtype=jnp.int32), x, 0)


class RowTiles(NamedTuple):
    """Tiles that together cover the rows 0 to M - 1, each within one group, or within the rows beyond the sum.

    The last tile of a group ends with the group, and may overlap the one before it. Only a group of fewer rows than a
    tile has a tile of which not all rows count.

    Attributes:
        group: [T] int32, group of each tile; X for rows beyond the sum.
        start: [T] int32, its first row.
        rows: [T] int32, how many rows count, from its first on; 0 in tiles that are not used.
        count: [1] int32, how many of the T tiles are used; these come first.
    """

    group: jax.Array
    start: jax.Array
    rows: jax.Array
    count: jax.Array


def most_tiles(rows: int, groups: int, tile: int) -> int:
    """The largest number of tiles that M rows in X groups, and rows beyond their sum, can need."""
    return rows // tile + groups + 1


def row_tiles(sizes: jax.Array, rows: int, tile: int) -> RowTiles:
    """The tiles of `tile` rows of M = `rows` rows, in their order. `sizes` [X] int32."""
    sizes = jnp.append(sizes, rows - jnp.sum(sizes))
    start, end = bounds(sizes)
    tiles = -(-sizes // tile)
    after = jnp.cumsum(tiles, dtype=jnp.int32)
    number = jnp.arange(most_tiles(rows, len(sizes) - 1, tile), dtype=jnp.int32)
    group = jnp.sum(number[:, None] >= after, axis=1, dtype=jnp.int32)
    used = group < len(sizes)
    group = jnp.minimum(group, len(sizes) - 1)
    before = (number - (after - tiles)[group]) * tile  # rows of the group in tiles before this one
    row = jnp.maximum(jnp.minimum(start[group] + before, end[group] - tile), start[group])
    count = jnp.where(used, jnp.minimum(sizes[group], tile), 0)
    return RowTiles(group, row, count, after[-1:])
