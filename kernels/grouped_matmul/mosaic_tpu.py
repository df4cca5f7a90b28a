"""Grouped products as Pallas TPU kernels.

The rows are cut into tiles. The grid visits each pair of a tile and a group with rows in it, in their order, so the
visits of one tile follow one another, and those of one group, too. Which pair a visit has is known only at run time:
the tables are prefetched as scalars, and the blocks' indices are read from them.

A product of rows writes a tile at each of its visits, and keeps what the visits before wrote in rows of other groups. A
sum over a group's rows is held in VMEM, and written after the group's last visit.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from seqmodels.kernels.arrays import pad, round_up
from seqmodels.kernels.grouped_matmul.groups import Visits, visits
from seqmodels.kernels.interpreter import tpu_interpreter

f32 = jnp.float32
LANES = 128
ROWS, COLUMNS, STEP = 512, 1024, 1024  # most rows and columns of a tile, and length of a step of its sum
VMEM_LIMIT = 64 * 2**20  # bytes
DTYPES = ("bfloat16", "float32")


def supports(
    platform: str,
    rows: int = 8192,
    inner: int = 4096,
    outer: int = 14336,
    groups: int = 16,
    dtype: DTypeLike = "bfloat16",
    **facts: object,
) -> str | None:
    """Why this backend cannot serve the call; None: it can."""
    if platform != "tpu" and not tpu_interpreter():
        return f"it needs a TPU; the platform is {platform}"
    if jnp.dtype(dtype).name not in DTYPES:
        return f"x is {jnp.dtype(dtype).name}; it takes {', '.join(DTYPES)}"
    return "an array is empty" if min(rows, inner, outer, groups) < 1 else None


def grouped_matmul(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """See `kernels.grouped_matmul.grouped_matmul`. Sums in float32."""
    return _by_rows(x, w, sizes, transposed=False)


def transposed(dy: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """The gradient of x [M, K], given that of y [M, N]: the product with the transposed matrices."""
    return _by_rows(dy, w, sizes, transposed=True)


def weight_gradient(x: jax.Array, dy: jax.Array, sizes: jax.Array) -> jax.Array:
    """The gradient of w [X, K, N], given x [M, K] and the gradient of y [M, N]: a sum over each group's rows."""
    (rows, inner), outer = x.shape, dy.shape[1]
    tall = round_up(rows, row_tile(rows))
    x, dy = (pad(v, {0: tall, 1: round_up(v.shape[1], LANES)}) for v in (x, dy))
    return jax.custom_batching.sequential_vmap(by_groups)(x, dy, sizes)[:, :inner, :outer]


def _by_rows(x, w, sizes, transposed):
    rows, outer = x.shape[0], w.shape[1 if transposed else 2]
    x = pad(x, {0: round_up(rows, row_tile(rows)), 1: round_up(x.shape[1], LANES)})
    w = pad(w, {axis: round_up(w.shape[axis], LANES) for axis in (1, 2)})
    call = jax.custom_batching.sequential_vmap(functools.partial(by_rows, transposed=transposed))
    return call(x, w, sizes)[:rows, :outer]


def row_tile(rows: int) -> int:
    """Rows of a tile: a multiple of 16, which all dtypes can be cut at."""
    return min(ROWS, round_up(rows, 16))


def width(size: int, most: int) -> int:
    """The largest multiple of the number of lanes, up to `most`, that divides an axis."""
    return max(n for n in range(LANES, min(size, most) + 1, LANES) if size % n == 0)


@functools.partial(jax.jit, static_argnames="transposed")
def by_rows(x: jax.Array, w: jax.Array, sizes: jax.Array, *, transposed: bool) -> jax.Array:
    """y_r = x_r w_g [M, N] for the rows of each group; with `transposed`, x_r w_g^T.

    Args:
        x: [M, K] of whole tiles of rows. w: [X, K, N], or with `transposed` [X, N, K]; K and N are multiples of 128.
    """
    (rows, inner), outer = x.shape, w.shape[1 if transposed else 2]
    tile = row_tile(rows)
    columns, step = width(outer, COLUMNS), width(inner, STEP)
    table = visits(sizes, rows, tile)

    def of_w(n, v, k, table):
        return table.group[v], *((n, k) if transposed else (k, n))

    return pl.pallas_call(
        functools.partial(_rows_kernel, tile=tile, transposed=transposed),
        name="grouped_matmul_transposed" if transposed else "grouped_matmul_forward",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(table),
            grid=(outer // columns, len(table.group), inner // step),
            in_specs=[
                pl.BlockSpec((tile, step), _index(lambda n, v, k, table: (table.tile[v], k))),
                pl.BlockSpec((None, columns, step) if transposed else (None, step, columns), _index(of_w)),
            ],
            out_specs=pl.BlockSpec((tile, columns), _index(lambda n, v, k, table: (table.tile[v], n))),
            scratch_shapes=[pltpu.VMEM((tile, columns), f32)],
        ),
        out_shape=jax.ShapeDtypeStruct((rows, outer), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=tpu_interpreter(),
    )(*table, x, w)


def _rows_kernel(group, tile_of, start, end, x, w, y, sums, *, tile, transposed):
    visit, step = pl.program_id(1), pl.program_id(2)

    @pl.when(step == 0)
    def _():
        sums[...] = jnp.zeros(sums.shape, f32)

    @pl.when(start[visit] < end[visit])
    def _():
        sums[...] += _dot(x[...], w[...], ((1,), (1 if transposed else 0,)))

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        first = (visit == 0) | (tile_of[visit] != tile_of[jnp.maximum(visit - 1, 0)])
        own = _own_rows(start[visit], end[visit], tile_of[visit] * tile, sums.shape)
        before = jnp.where(first, 0, y[...].astype(f32))  # what has never been written may be anything
        y[...] = jnp.where(own, sums[...], before).astype(y.dtype)


@jax.jit
def by_groups(x: jax.Array, dy: jax.Array, sizes: jax.Array) -> jax.Array:
    """The sums [X, K, N] over each group's rows of x_r^T dy_r.

    Args:
        x: [M, K], dy: [M, N] of whole tiles of rows; K and N are multiples of 128.
    """
    (rows, inner), outer = x.shape, dy.shape[1]
    tile = row_tile(rows)
    below, across = width(inner, COLUMNS), width(outer, COLUMNS)
    table = visits(sizes, rows, tile)
    return pl.pallas_call(
        functools.partial(_groups_kernel, tile=tile),
        name="grouped_matmul_weights",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(table),
            grid=(inner // below, outer // across, len(table.group)),
            in_specs=[
                pl.BlockSpec((tile, below), _index(lambda k, n, v, table: (table.tile[v], k))),
                pl.BlockSpec((tile, across), _index(lambda k, n, v, table: (table.tile[v], n))),
            ],
            out_specs=pl.BlockSpec((None, below, across), _index(lambda k, n, v, table: (table.group[v], k, n))),
            scratch_shapes=[pltpu.VMEM((below, across), f32)],
        ),
        out_shape=jax.ShapeDtypeStruct((len(sizes), inner, outer), x.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=tpu_interpreter(),
    )(*table, x, dy)


def _groups_kernel(group, tile_of, start, end, x, dy, dw, sums, *, tile):
    visit, last = pl.program_id(2), pl.num_programs(2) - 1

    @pl.when((visit == 0) | (group[visit] != group[jnp.maximum(visit - 1, 0)]))
    def _():
        sums[...] = jnp.zeros(sums.shape, f32)

    @pl.when(start[visit] < end[visit])
    def _():
        rows = start[visit], end[visit], tile_of[visit] * tile
        left, right = (jnp.where(_own_rows(*rows, v.shape), v[...], jnp.zeros((), v.dtype)) for v in (x, dy))
        sums[...] += _dot(left, right, ((0,), (0,)))

    @pl.when((visit == last) | (group[visit] != group[jnp.minimum(visit + 1, last)]))
    def _():
        dw[...] = sums[...].astype(dw.dtype)


def _index(of: Any) -> Any:
    """The index map of a block: `of` is called with the indices of the grid and the table."""
    return lambda a, b, c, *table: of(a, b, c, Visits(*table))


def _own_rows(start, end, first, shape):
    """Bool of this shape: which of the rows from `first` on are the group's."""
    row = first + lax.broadcasted_iota(jnp.int32, shape, 0)
    return (row >= start) & (row < end)


def _dot(a, b, contracted):
    precision = lax.Precision.HIGHEST if a.dtype == f32 else None  # otherwise float32 is rounded to bfloat16 first
    return lax.dot_general(a, b, (contracted, ((), ())), precision=precision, preferred_element_type=f32)
