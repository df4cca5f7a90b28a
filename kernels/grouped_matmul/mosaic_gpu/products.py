"""The three grouped products as kernels: how their tiles lie, and what their steps add up."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from seqmodels.kernels.grouped_matmul.groups import bounds, most_tiles, row_tiles
from seqmodels.kernels.grouped_matmul.mosaic_gpu import tuning
from seqmodels.kernels.grouped_matmul.mosaic_gpu.pipeline import ROWS, SIDE, Plan, Product, Tile

ALIGNED = 8  # rows: copies of tiles of 64 columns and more begin at a multiple


@functools.partial(jax.jit, static_argnames=("transposed", "plan"))  # traced once per shape, not per layer
def by_rows(x: Array, w: Array, sizes: Array, *, transposed: bool, plan: Plan | None = None) -> Array:
    """y_r = x_r w_g [M, N] for the rows of each group; with `transposed`, x_r w_g^T.

    Args:
        x: [M, K] of M >= 128 rows. w: [X, K, N], or with `transposed` [X, N, K]. sizes: [X] int32.
    """
    rows, inner = x.shape
    groups, outer = w.shape[0], w.shape[1 if transposed else 2]
    plan = plan or tuning.plan(outer)
    table = row_tiles(sizes, rows, ROWS)
    across = -(-outer // plan.columns)

    def tiles(x, w, group, start, count, used, y):
        def tile(number):
            row, column = snake(number, used[0], across, plan.panel)
            g, first, column = group[row], start[row], column * plan.columns
            columns = pl.ds(column, plan.columns)

            def sources(step):
                k = pl.ds(step * SIDE, SIDE)
                return x.at[pl.ds(first, ROWS), k], w.at[g, columns, k] if transposed else w.at[g, k, columns]

            def place(offset, height, right):
                return y.at[pl.ds(first + offset, height), pl.ds(column + right, SIDE)]

            steps = jnp.where(g < groups, -(-inner // SIDE), 0)
            return Tile(steps, sources, count[row], outer - column, place)

        return used[0] * across, tile

    product = Product(plan, tiles, left=0, right=0 if transposed else 1)
    out = jax.ShapeDtypeStruct((rows, outer), x.dtype)
    return product((x, w, *table), out, most_tiles(rows, groups, ROWS) * across)


@functools.partial(jax.jit, static_argnames="plan")
def by_groups(x: Array, dy: Array, sizes: Array, *, plan: Plan | None = None) -> Array:
    """The sums [X, K, N] over each group's rows of x_r^T dy_r.

    Args:
        x: [M, K], dy: [M, N] of M >= 64 rows, a multiple of 8. sizes: [X] int32.
    """
    (inner, outer), groups = (x.shape[1], dy.shape[1]), len(sizes)
    plan = plan or tuning.plan(outer)
    start, _ = bounds(sizes)
    below, across = -(-inner // ROWS), -(-outer // plan.columns)
    each = below * across

    def tiles(x, dy, start, size, dw):
        def tile(number):
            g = lax.div(number, each)
            row, column = snake(lax.rem(number, each), below, across, plan.panel)
            row, column = row * ROWS, column * plan.columns
            lead = lax.rem(start[g], ALIGNED)  # rows of the group before, in the first step
            first, length = start[g] - lead, size[g] + lead
            steps = jnp.where(size[g] > 0, lax.div(length + (SIDE - 1), SIDE), 0)

            def sources(step):
                part = pl.ds(pl.multiple_of(first + step * SIDE, ALIGNED), SIDE)
                return x.at[part, pl.ds(row, ROWS)], dy.at[part, pl.ds(column, plan.columns)]

            def place(offset, height, right):
                return dw.at[g, pl.ds(row + offset, height), pl.ds(column + right, SIDE)]

            def own_rows(step):
                return jnp.where(step == 0, lead, 0), length - step * SIDE

            def other_rows(step):
                begin, end = own_rows(step)
                return (begin > 0) | (end < SIDE)

            def clean(step, part):
                keep_rows(part, *own_rows(step))

            # Rows of other groups and of no group need to be zero in both factors, since they may hold anything.
            return Tile(steps, sources, inner - row, outer - column, place, clean, unclean=other_rows)

        return jnp.int32(groups * each), tile

    product = Product(plan, tiles, left=1, right=1)
    out = jax.ShapeDtypeStruct((groups, inner, outer), x.dtype)
    return product((x, dy, start, sizes), out, groups * each)


def keep_rows(ref: Any, begin: Array, end: Array) -> None:
    """Set the rows before `begin` and from `end` on of a reference [64, columns] in shared memory to zero."""
    row = plgpu.broadcasted_iota(jnp.int32, (SIDE, SIDE), 0, layout=plgpu.Layout.WGMMA)
    own = (row >= begin) & (row < end)
    for column in range(0, ref.shape[1], SIDE):
        part = ref.at[:, pl.ds(column, SIDE)]
        held = plgpu.layout_cast(part[...], plgpu.Layout.WGMMA)
        part[...] = jnp.where(own, held, jnp.zeros_like(held))
    plgpu.commit_smem()


def snake(number: Array, below: Array | int, across: int, panel: int) -> tuple[Array, Array]:
    """Row and column of a tile: column after column of a panel of `panel` rows, then the next panel."""
    size = panel * across
    above = lax.div(number, size) * panel
    height = jnp.minimum(panel, below - above)
    left = lax.rem(number, size)
    return above + lax.rem(left, height), lax.div(left, height)
