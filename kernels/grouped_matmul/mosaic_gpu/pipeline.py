"""Tiles of a matrix product, one after another on each multiprocessor, with copies and products at the same time.

A block has three warpgroups and stays on its multiprocessor until all tiles are done. One warpgroup copies the factors
of the coming steps into the slots of shared memory, also those of the next tile. The two others multiply: each has 64
of the 128 rows of a tile in its registers. The barriers `full` signal that a slot is filled, `empty` that both have
read it, and `cleaned` that both have set their half of a right factor to zero where it must be.
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

SIDE = 64  # columns of a swizzle of 128 bytes; rows of a warpgroup; length of a step of the sum
WORKERS = 2  # warpgroups that multiply
ROWS = WORKERS * SIDE  # of a tile
OUT = 2  # pieces of the result in shared memory, for each of the two
COPIER_REGISTERS, WORKER_REGISTERS = 40, 232  # for each thread


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static sizes of a kernel.

    Attributes:
        columns: of a tile of the result, 128 or 256.
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
        rows, columns: how many of its rows and columns are stored, from its first ones on.
        place: `place(row, rows, column)` gives a piece [rows, 64] of the result in global memory. It begins `row` rows
            and `column` columns after the tile's first.
        clean: `clean(step, part)` sets numbers to zero that do not belong to the sum, in columns of a factor in shared
            memory. None: all belong to it.
        unclean: whether a step's factors have such numbers.
    """

    steps: Array
    sources: Callable[[Array], tuple[Any, Any]]
    rows: Array
    columns: Array
    place: Callable[[Array, int, int], Any]
    clean: Callable[[Array, Any], None] | None = None
    unclean: Callable[[Array], Array] | None = None


@dataclasses.dataclass(frozen=True)
class Product:
    """A kernel that computes a matrix, or several, tile by tile.

    Attributes:
        plan: its sizes.
        tiles: `tiles(*inputs, out)` gives, inside the kernel, the number of tiles, and a function of a tile's number.
        left: which axis of the left factor in shared memory is that of the tile's rows. With 0 it is [128, 64], and its
            rows may begin anywhere in global memory; with 1 it is [64, 128], and they begin at a multiple of 8.
        right: which axis of the right factor is that of the tile's columns. With 1 it is [64, columns].
    """

    plan: Plan
    tiles: Callable[..., tuple[Array, Callable[[Array], Tile]]]
    left: int
    right: int

    def rows_of(self, left: Any, worker: Array) -> Any:
        """A warpgroup's part of the left factor in shared memory."""
        own = pl.ds(worker * SIDE, SIDE)
        return left.at[:, own] if self.left else left.at[own]

    def factors(self, left: Any, right: Any) -> tuple[Any, Any]:
        """The factors as they are multiplied, [64, 64] and [64, columns]."""
        return left.transpose((1, 0)) if self.left else left, right if self.right else right.transpose((1, 0))

    def __call__(self, inputs: Sequence[Array], out: jax.ShapeDtypeStruct, most: int) -> Array:
        """Run the kernel.

        Args:
            inputs: arrays in global memory, of which the first is the left factor. most: a static bound of the tiles.
        """
        plan, dtype, grid = self.plan, out.dtype, min(processors(), most)
        left, right = ((ROWS, SIDE), (SIDE, ROWS))[self.left], ((plan.columns, SIDE), (SIDE, plan.columns))[self.right]

        def grouped_matmul(*refs):
            Block.of(self, grid, *refs).run()

        call = plgpu.kernel(
            grouped_matmul,  # the kernel's name in profiles
            out_type=out,
            scratch_types=[
                (swizzled if self.left else views)(plan.slots, *left, dtype=dtype),
                swizzled(plan.slots, *right, dtype=dtype),
                views(WORKERS, OUT, SIDE, SIDE, dtype=dtype, plain=True),
                plgpu.Barrier(num_arrivals=2, num_barriers=plan.slots),
                plgpu.Barrier(num_arrivals=WORKERS, num_barriers=plan.slots),
                plgpu.Barrier(num_arrivals=WORKERS),
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


def swizzled(*shape: int, dtype: Any) -> Any:
    """An array in shared memory. wgmma takes its last two axes as the left or right factor, transposed or not.

    It is copied in tiles of 8 rows, so the rows in global memory must begin at a multiple of 8.
    """
    transforms = (plgpu.TilingTransform((8, SIDE)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=() if gpu_interpreter() else transforms)


def views(*shape: int, dtype: Any, plain: bool = False) -> Any:
    """`swizzled` of 64 columns, for `unpack`; with `plain`, the memory also serves as an array without a swizzle.

    All have the same shape, so that each warpgroup has the same part of the memory in every view.
    """
    refs = [swizzled(*shape, dtype=dtype)]
    if not gpu_interpreter():
        refs.append(plgpu.SMEM(shape, dtype, transforms=(plgpu.SwizzleTransform(128),)))
    if plain:
        refs.append(plgpu.SMEM(shape, dtype))
    return plgpu.RefUnion(*refs)


def unpack(refs: Any) -> tuple[Any, ...]:
    """References that `views` made: as wgmma takes it; for copies of rows that begin anywhere; plain, if there is one.

    The two views are one, since a row of 64 columns is as long as the swizzle: only the tiles of 8 rows differ, which
    lie one after another. The interpreter, whose memory has no layout, has the first alone.
    """
    first, *others = refs
    return (first, first, *others) if gpu_interpreter() else (first, *others)


@dataclasses.dataclass(frozen=True)
class Block:
    """Inside the kernel: one warpgroup of one block.

    Attributes:
        left, right: slots of the factors; left_rows: of the left one, for copies.
        out, out_rows, edge: memory for the result, see `unpack`.
        block, grid: number of the block, and of all blocks. thread: of the warpgroup.
    """

    product: Product
    count: Array
    tile: Callable[[Array], Tile]
    left: Any
    left_rows: Any
    right: Any
    out: Any
    out_rows: Any
    edge: Any
    full: Any
    empty: Any
    cleaned: Any
    block: Array
    thread: Array
    grid: int

    @classmethod
    def of(cls, product: Product, grid: int, *refs: Any) -> "Block":
        *arrays, left, right, outputs, full, empty, cleaned = refs
        count, tile = product.tiles(*arrays)
        left, left_rows = (left, left) if product.left else unpack(left)
        out, out_rows, edge = unpack(outputs)
        memory = dict(left=left, left_rows=left_rows, right=right, out=out, out_rows=out_rows, edge=edge)
        place: Any = dict(block=lax.axis_index("block"), thread=lax.axis_index("thread"), grid=grid)
        return cls(product, count, tile, **memory, full=full, empty=empty, cleaned=cleaned, **place)

    @property
    def plan(self) -> Plan:
        return self.product.plan

    def run(self) -> None:
        pl.when(self.thread == WORKERS)(self.copy)
        pl.when(self.thread < WORKERS)(self.work)

    def each_tile(self, one: Callable[[Tile, Array], Any]) -> Array:
        """Call `one(tile, done)` for each tile of this block, where `done` is the number of steps before it.

        Returns: the number of all steps.
        """

        def body(n, done):
            tile = self.tile(self.block + n * self.grid)
            one(tile, done)
            return done + tile.steps

        mine = lax.div(self.count - self.block + (self.grid - 1), self.grid)
        return lax.fori_loop(0, mine, body, jnp.int32(0))

    def slot(self, done: Array) -> Array:
        """The slot of a step, of which `done` came before."""
        return lax.rem(done, self.plan.slots)

    def copy(self) -> None:
        """Fill slots as soon as they are empty."""
        plgpu.set_max_registers(COPIER_REGISTERS, action="decrease")

        def one(tile, done):
            def step(k, _):
                slot = self.slot(done + k)
                pl.when(done + k >= self.plan.slots)(lambda: plgpu.barrier_wait(self.empty.at[slot]))
                for source, buffer in zip(tile.sources(k), (self.left_rows, self.right), strict=True):
                    plgpu.copy_gmem_to_smem(source, buffer.at[slot], self.full.at[slot])
                return 0

            lax.fori_loop(0, tile.steps, step, 0)

        def drain(step, _):
            plgpu.barrier_wait(self.empty.at[self.slot(step)])
            return 0

        done = self.each_tile(one)
        lax.fori_loop(jnp.maximum(done - self.plan.slots, 0), done, drain, 0)  # no barrier ends while it is used

    def work(self) -> None:
        """Multiply, and store."""
        plgpu.set_max_registers(WORKER_REGISTERS, action="increase")
        self.each_tile(lambda tile, done: self.store(tile, self.multiply(tile, done)))
        plgpu.wait_smem_to_gmem(0)

    def multiply(self, tile: Tile, done: Array) -> Array:
        """This warpgroup's sums [64, columns] of a tile."""

        def run(sums):
            def step(k, _):
                slot = self.slot(done + k)
                plgpu.barrier_wait(self.full.at[slot])
                left, right = self.product.rows_of(self.left.at[slot], self.thread), self.right.at[slot]
                self.clean(tile, k, left, right)
                plgpu.wgmma(sums, *self.product.factors(left, right))
                plgpu.wgmma_wait(1)  # the step before has read its slot
                before = self.slot(done + k + (self.plan.slots - 1))
                pl.when(k > 0)(lambda: plgpu.barrier_arrive(self.empty.at[before]))
                return 0

            lax.fori_loop(0, tile.steps, step, 0)
            plgpu.wgmma_wait(0)
            last = self.slot(done + tile.steps + (self.plan.slots - 1))
            pl.when(tile.steps > 0)(lambda: plgpu.barrier_arrive(self.empty.at[last]))
            return sums[...]

        return pl.run_scoped(run, plgpu.ACC((SIDE, self.plan.columns)))

    def clean(self, tile: Tile, step: Array, left: Any, right: Any) -> None:
        """Set numbers of a step's factors to zero: of this warpgroup's left one, and half of the right one."""
        if tile.clean is None or tile.unclean is None:
            return
        clean, half = tile.clean, self.plan.columns // WORKERS

        @pl.when(tile.unclean(step))
        def _():
            clean(step, left)
            clean(step, right.at[:, pl.ds(self.thread * half, half)])
            plgpu.barrier_arrive(self.cleaned)
            plgpu.barrier_wait(self.cleaned)

    def store(self, tile: Tile, sums: Array) -> None:
        """Store this warpgroup's 64 rows of a tile, or as many of them and of the columns as count."""
        row = self.thread * SIDE
        rows = jnp.clip(tile.rows - row, 0, SIDE)
        sums = sums.astype(self.out.dtype)
        for column in range(0, self.plan.columns, SIDE):
            # No piece beyond the last column: jax copies a single row as bytes, and then to the next row's beginning
            there, piece = column < tile.columns, sums[:, column : column + SIDE]
            whole = functools.partial(self.store_piece, tile, piece, row, column)
            pl.when(there & (rows == SIDE))(whole)
            some = functools.partial(self.store_rows, tile, piece, rows, row, column)
            pl.when(there & (rows > 0) & (rows < SIDE))(some)

    def store_piece(self, tile: Tile, piece: Array, row: Array, column: int) -> None:
        """Store 64 x 64 numbers."""
        slot = (column // SIDE) % OUT
        plgpu.wait_smem_to_gmem(OUT - 1 if column else 0, wait_read_only=True)  # the tile before had any number
        self.out.at[self.thread, slot][...] = piece
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.out_rows.at[self.thread, slot], tile.place(row, SIDE, column))

    def store_rows(self, tile: Tile, piece: Array, rows: Array, row: Array, column: int) -> None:
        """Store the first `rows` rows of 64. A copy has a static size, so there is one for each power of two."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        held = self.edge.at[self.thread, 0]
        held[...] = piece
        plgpu.commit_smem()
        for part in (32, 16, 8, 4, 2, 1):
            before = rows & -(2 * part)
            copy = functools.partial(
                plgpu.copy_smem_to_gmem, held.at[pl.ds(before, part)], tile.place(row + before, part, column)
            )
            pl.when(rows & part > 0)(copy)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
