"""Tiles of a matrix product, one after another on each multiprocessor, with copies and products at the same time.

A block has three warpgroups and stays on its multiprocessor until all tiles are done. One warpgroup copies the factors
of the coming steps into the slots of shared memory, also those of the next tile. The two others multiply: each has 64
of the 128 rows of a tile of the result in its registers. `full` signals that a slot is filled, `empty` that both have
read it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from seqmodels.kernels.interpreter import gpu_interpreter
from seqmodels.kernels.lanes import processors

SIDE = 64  # rows of a warpgroup; columns of a swizzle of 128 bytes; length of a step of the sum
WORKERS = 2  # warpgroups that multiply
ROWS = WORKERS * SIDE  # of a tile
OUT = 2  # pieces of the result in shared memory, for each of the two
COPIER_REGISTERS, WORKER_REGISTERS = 40, 232  # for each thread


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static sizes of a kernel.

    Attributes:
        columns: of a tile of the result, a multiple of 64, at most 256.
        slots: steps whose factors are in shared memory.
        panel: tiles below each other that are done before the next ones to the right: these share their right factor.
    """

    columns: int = 256
    slots: int = 4
    panel: int = 8


@dataclasses.dataclass(frozen=True)
class Tile:
    """What is done for one tile of the result, inside a kernel.

    Attributes:
        steps: how many steps its sum has; 0: the result is zero.
        sources: `sources(step)` gives the pieces of the two factors in global memory.
        rows: how many of its rows are stored, from its first on.
        place: `place(row, rows, column)` gives a piece [rows, 64] of the result in global memory. It begins `row` rows
            and `column` columns after the tile's first.
        clean: `clean(step, left, right, worker)` sets numbers in shared memory to zero that do not belong to the sum.
            None: all belong to it.
    """

    steps: Array
    sources: Callable[[Array], tuple[Any, Any]]
    rows: Array
    place: Callable[[Array, int, int], Any]
    clean: Callable[[Array, Any, Any, Array], None] | None = None


def swizzled(*shape: int, dtype: Any) -> Any:
    """An array in shared memory. wgmma takes its last two axes as the left or right factor, transposed or not.

    It is copied in tiles of 8 rows, so the rows in global memory must begin at a multiple of 8.
    """
    transforms = (plgpu.TilingTransform((8, SIDE)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=() if gpu_interpreter() else transforms)


def views(*shape: int, dtype: Any, plain: tuple[int, ...] | None = None) -> Any:
    """`swizzled` of 64 columns, for `unpack`; with `plain`, the memory also serves as an array without a swizzle."""
    refs = [swizzled(*shape, dtype=dtype)]
    if not gpu_interpreter():
        refs.append(plgpu.SMEM(shape, dtype, transforms=(plgpu.SwizzleTransform(128),)))
    if plain:
        refs.append(plgpu.SMEM(plain, dtype))
    return plgpu.RefUnion(*refs)


def unpack(refs: Any) -> tuple[Any, ...]:
    """References that `views` made: as wgmma takes it; for copies of rows that begin anywhere; plain, if there is one.

    The two views are one, since a row of 64 columns is as long as the swizzle: only the tiles of 8 rows differ, which
    lie one after another. The interpreter, whose memory has no layout, has the first alone.
    """
    first, *others = refs
    return (first, first, *others) if gpu_interpreter() else (first, *others)


def kernel(
    plan: Plan,
    inputs: Sequence[Array],
    out: jax.ShapeDtypeStruct,
    most: int,
    tiles: Callable[..., tuple[Array, Callable[[Array], Tile]]],
    left: tuple[int, int],
    right: tuple[int, int],
    factors: Callable[[Any, Any, Array], tuple[Any, Any]],
    *,
    anywhere: bool,
) -> Array:
    """Run a kernel that computes `out` tile by tile.

    Args:
        inputs: arrays in global memory.
        most: a static bound of the number of tiles.
        tiles: `tiles(*inputs, out)` gives, inside the kernel, the number of tiles and a function of a tile's number.
        left, right: shapes of the factors of a step in shared memory.
        factors: `factors(left, right, worker)` gives what one warpgroup multiplies: [64, 64] and [64, columns].
        anywhere: whether the rows of the left factor, which has 64 columns, may begin at any row in global memory.
    """
    grid = min(processors(), most)

    def body(*refs):
        *arrays, left_s, right_s, outputs, full, empty = refs
        left_s, left_rows_s = unpack(left_s) if anywhere else (left_s, left_s)
        count, tile = tiles(*arrays)
        block, thread = lax.axis_index("block"), lax.axis_index("thread")
        mine = lax.div(count - block + (grid - 1), grid)  # tiles of this block

        def copy():
            plgpu.set_max_registers(COPIER_REGISTERS, action="decrease")

            def one(n, done):
                now = tile(block + n * grid)

                def step(k, done):
                    slot = lax.rem(done, plan.slots)
                    pl.when(done >= plan.slots)(lambda: plgpu.barrier_wait(empty.at[slot]))
                    for source, buffer in zip(now.sources(k), (left_rows_s, right_s), strict=True):
                        plgpu.copy_gmem_to_smem(source, buffer.at[slot], full.at[slot])
                    return done + 1

                return lax.fori_loop(0, now.steps, step, done)

            done = lax.fori_loop(0, mine, one, jnp.int32(0))

            def drain(step, _):
                plgpu.barrier_wait(empty.at[lax.rem(step, plan.slots)])
                return 0

            lax.fori_loop(jnp.maximum(done - plan.slots, 0), done, drain, 0)  # no barrier ends while it is used

        def work():
            plgpu.set_max_registers(WORKER_REGISTERS, action="increase")

            def one(n, done):
                now = tile(block + n * grid)

                def multiply(sums):
                    def step(k, done):
                        slot = lax.rem(done, plan.slots)
                        plgpu.barrier_wait(full.at[slot])
                        if now.clean is not None:
                            now.clean(k, left_s.at[slot], right_s.at[slot], thread)
                        plgpu.wgmma(sums, *factors(left_s.at[slot], right_s.at[slot], thread))
                        plgpu.wgmma_wait(1)  # the step before has read its slot
                        before = lax.rem(done + (plan.slots - 1), plan.slots)
                        pl.when(k > 0)(lambda: plgpu.barrier_arrive(empty.at[before]))
                        return done + 1

                    done_then = lax.fori_loop(0, now.steps, step, done)
                    plgpu.wgmma_wait(0)
                    last = lax.rem(done_then + (plan.slots - 1), plan.slots)
                    pl.when(now.steps > 0)(lambda: plgpu.barrier_arrive(empty.at[last]))
                    return sums[...]

                sums = pl.run_scoped(multiply, plgpu.ACC((SIDE, plan.columns)))
                store(plan, now, thread, sums.astype(out.dtype), *unpack(outputs))
                return done + now.steps

            lax.fori_loop(0, mine, one, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        pl.when(thread == WORKERS)(copy)
        pl.when(thread < WORKERS)(work)

    dtype = out.dtype
    call = plgpu.kernel(
        body,
        out_type=out,
        scratch_types=[
            (views if anywhere else swizzled)(plan.slots, *left, dtype=dtype),
            swizzled(plan.slots, *right, dtype=dtype),
            views(WORKERS, OUT, SIDE, SIDE, dtype=dtype, plain=(WORKERS, SIDE, SIDE)),
            plgpu.Barrier(num_arrivals=2, num_barriers=plan.slots),
            plgpu.Barrier(num_arrivals=WORKERS, num_barriers=plan.slots),
        ],
        grid=(grid,),
        grid_names=("block",),
        num_threads=WORKERS + 1,
        thread_name="thread",
        compiler_params=compiler_params(),
        interpret=gpu_interpreter(),
    )
    return call(*inputs)


def compiler_params() -> plgpu.CompilerParams:
    """Manual barriers, and layouts as written."""
    from jax.experimental.mosaic.gpu.core import LoweringSemantics

    return plgpu.CompilerParams(unsafe_no_auto_barriers=True, lowering_semantics=LoweringSemantics.Lane)


def store(plan: Plan, tile: Tile, worker: Array, sums: Array, out_s: Any, out_rows_s: Any, edge_s: Any) -> None:
    """Store a warpgroup's 64 rows of a tile, or as many of them as count, through the memory of `unpack`."""
    first = worker * SIDE
    rows = jnp.clip(tile.rows - first, 0, SIDE)

    @pl.when(rows == SIDE)
    def _():
        for column in range(0, plan.columns, SIDE):
            slot = (column // SIDE) % OUT
            plgpu.wait_smem_to_gmem(OUT - 1, wait_read_only=True)
            out_s.at[worker, slot][...] = sums[:, column : column + SIDE]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_rows_s.at[worker, slot], tile.place(first, SIDE, column))

    @pl.when((rows > 0) & (rows < SIDE))
    def _():
        for column in range(0, plan.columns, SIDE):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            edge_s.at[worker][...] = sums[:, column : column + SIDE]
            plgpu.commit_smem()
            for part in (32, 16, 8, 4, 2, 1):  # a copy has a static size: one for each power of two in `rows`
                copy = functools.partial(store_part, tile, edge_s.at[worker], rows, part, first, column)
                pl.when(rows & part > 0)(copy)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def store_part(tile: Tile, held: Any, rows: Array, part: int, first: Array, column: int) -> None:
    """Store those of `rows` rows that the bit `part` of their number stands for; larger bits come first."""
    offset = rows & -(2 * part)
    plgpu.copy_smem_to_gmem(held.at[pl.ds(offset, part)], tile.place(first + offset, part, column))
