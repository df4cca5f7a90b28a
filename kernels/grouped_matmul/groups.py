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
        used: [1] int32, how many of the T tiles are used; these come first.
    """

    group: jax.Array
    start: jax.Array
    rows: jax.Array
    used: jax.Array


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
    real = group < len(sizes)
    group = jnp.minimum(group, len(sizes) - 1)
    before = (number - (after - tiles)[group]) * tile  # rows of the group in tiles before this one
    row = jnp.maximum(jnp.minimum(start[group] + before, end[group] - tile), start[group])
    own = jnp.where(real, jnp.minimum(sizes[group], tile), 0)
    return RowTiles(group, row, own, after[-1:])


class Visits(NamedTuple):
    """Pairs of a tile of rows and a group with rows in it, in their order. Each group has at least one.

    Attributes:
        group: [V] int32, never falls; that of the last group in pairs that are not used.
        tile: [V] int32, number of the tile; never falls, and is every tile at least once.
        start, end: [V] int32, the group's first row, and the row after its last. Equal where no row is the group's: in
            pairs that are not used, and those of tiles beyond the sum.
    """

    group: jax.Array
    tile: jax.Array
    start: jax.Array
    end: jax.Array


def visits(sizes: jax.Array, rows: int, tile: int) -> Visits:
    """The visits of M = `rows` rows in whole tiles of `tile` rows, by groups of `sizes` [X] int32."""
    groups, tiles = len(sizes), rows // tile
    start, end = bounds(jnp.append(sizes, rows - jnp.sum(sizes)))  # rows beyond the sum are one more group
    first = jnp.minimum(start // tile, tiles - 1)
    last = jnp.maximum(first, (end - 1) // tile)
    after = jnp.cumsum(last - first + 1, dtype=jnp.int32)
    number = jnp.arange(tiles + groups, dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(number[:, None] >= after, axis=1, dtype=jnp.int32), groups)
    at = jnp.minimum(last[group], last[group] + 1 + number - after[group])
    real = group < groups
    return Visits(jnp.minimum(group, groups - 1), at, jnp.where(real, start[group], 0), jnp.where(real, end[group], 0))
