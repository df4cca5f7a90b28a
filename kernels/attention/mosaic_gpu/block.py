"""What the kernels share: the place of a block, the tiles that it visits, and the mask inside a tile.

A block has three warpgroups, and one tile of 128 rows after another: queries, or keys for their gradients. Two of them
multiply, with 64 rows each. The third one copies the tiles that are visited into slots of shared memory, and goes on to
those of the next tile of rows while the others store their results. There are as many blocks as multiprocessors,
or as many as tiles where registers are short.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from seqmodels.kernels.attention.masks import Mask, Pattern
from seqmodels.kernels.attention.mosaic_gpu.places import Places
from seqmodels.kernels.attention.mosaic_gpu.tables import NUMBER, PARTLY, ROWS, Given, Visits, of_positions
from seqmodels.kernels.interpreter import gpu_interpreter
from seqmodels.kernels.lanes import processors
from seqmodels.kernels.tensor_cores import ACCUMULATOR, COLUMN, ROW, SIDE, along, gather

WORKERS = ROWS // SIDE  # warpgroups that multiply
Copies = list[tuple[Any, Any]]
COPIER_REGISTERS, WORKER_REGISTERS = 24, 240  # for each thread


@dataclasses.dataclass(frozen=True)
class Rules:
    """Static options of the kernels.

    Attributes:
        mask: the rules of positions. scale: greater than 0.
        documents: whether queries and keys have documents. placed: whether they have positions other than 0 to T - 1.
    """

    mask: Mask
    scale: float
    documents: bool
    placed: bool = False

    @property
    def by_token(self) -> Mask:
        """The rules without the pattern."""
        return dataclasses.replace(self.mask, pattern=None)

    @property
    def pattern(self) -> Pattern | None:
        """The pattern, if it is asked for each pair of tokens; otherwise the tables know it."""
        return self.mask.pattern if self.placed else None

    @property
    def quarters(self) -> bool:
        """Whether blocks of the pattern are smaller than tiles, and at the same places."""
        return not self.placed and self.mask.pattern is not None and self.mask.pattern.block % ROWS > 0

    @property
    def whole(self) -> bool:
        """Whether no tile needs a mask inside."""
        return self.by_token.trivial and not self.documents and not self.quarters and self.pattern is None

    def marks(self, positions: Array) -> Array:
        """[B, M, T] int32: the positions, and the marks of the pattern."""
        return jnp.stack([positions, *(self.pattern.marks(positions) if self.pattern else ())], axis=1)


class Visit(NamedTuple):
    """A tile that is visited: its number, whether a mask is needed, this warpgroup's quarters, its round and slot."""

    tile: Array
    partly: Array
    quarters: Array
    round: Array
    slot: Array


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel that visits tiles.

    Attributes:
        body: called inside the kernel as `body(block, *references)`, of the inputs, the outputs and `scratch`.
        name: in profiles.
        columns: tokens of a visited tile. slots: of shared memory. copies: how many fill a slot.
        own: how many copies bring a warpgroup's own rows.
        rounds: how often all tiles are visited, for several heads.
        by_keys: whether rows are keys, and columns queries.
        stays: whether a block takes one tile after another. Otherwise there is a block for each, with more registers.
    """

    body: Callable[..., None]
    name: str
    rules: Rules
    columns: int
    slots: int
    copies: int
    own: int
    rounds: int = 1
    by_keys: bool = False
    stays: bool = True

    def __call__(
        self, heads: int, inputs: Sequence[Array], tables: Visits, given: Given, out: Any, scratch: list
    ) -> Any:
        """Run the kernel over all rows of `heads` heads.

        Args:
            inputs: arrays, the first one [B, T, ...]. out: shapes and dtypes of the results.
            scratch: shared memory, and barriers besides those of copies.
        """
        batch, length = inputs[0].shape[:2]
        visits = of_positions(self.rules.mask, length, self.columns, self.by_keys).visits
        visits, most = visits if self.by_keys else visits[::-1], processors() if self.stays else batch * heads * length
        places = Places.of(batch, heads, visits, most, self.rules.documents or self.rules.placed)

        def run(*refs):
            arrays, (order, span, *rest) = refs[: len(inputs)], refs[len(inputs) :]
            ids, rest = (rest[:2], rest[2:]) if self.rules.documents else (None, rest)
            ids = ids[::-1] if ids is not None and self.by_keys else ids
            marks, rest = (rest[0], rest[1:]) if self.rules.placed else (None, rest)
            *rest, loaded, full, empty = rest
            thread = lax.axis_index("thread")
            self.body(Block(self, places, order, span, ids, marks, loaded, full, empty, thread), *arrays, *rest)

        run.__name__ = self.name
        kernel = plgpu.kernel(
            run,
            out_type=out,
            scratch_types=[
                *scratch,
                plgpu.Barrier(num_arrivals=self.own, num_barriers=2 * WORKERS),
                plgpu.Barrier(num_arrivals=self.copies, num_barriers=self.slots),
                plgpu.Barrier(num_arrivals=WORKERS, num_barriers=self.slots),
            ],
            grid=(places.blocks,),
            grid_names=("block",),
            num_threads=WORKERS + 1,
            thread_name="thread",
            compiler_params=compiler_params(),
            interpret=gpu_interpreter(),
        )
        documents = () if given.documents is None else (given.documents.queries, given.documents.keys)
        marks = () if given.positions is None else (self.rules.marks(given.positions),)
        return kernel(*inputs, *tables, *documents, *marks)


def compiler_params() -> plgpu.CompilerParams:
    """Manual barriers, layouts as written, and the hardware's exponentials."""
    from jax.experimental.mosaic.gpu.core import LoweringSemantics

    return plgpu.CompilerParams(
        approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=LoweringSemantics.Lane
    )


@dataclasses.dataclass(frozen=True)
class Block:
    """Inside a kernel: one warpgroup of one block, at one of its tiles of rows.

    Attributes:
        kernel: its sizes. places: where the tiles are.
        order, span: `Visits` in global memory. ids: documents of the rows and of the columns, or None.
        marks: `Rules.marks`, or None.
        loaded, full, empty: barriers that signal that own rows are there, that a slot is filled, that all have read it.
        thread: number of the warpgroup.
        n: how many tiles of this block came before, and done: how many visits.
        b, h, tile: indices in the batch, of the head and of the tile of rows.
        load_next: starts to copy the rows of the next tile.
        first, count: place of the first visit in `Visits.order`, and how many tiles are visited in a round.
    """

    kernel: Kernel
    places: Places
    order: Any
    span: Any
    ids: tuple[Any, Any] | None
    marks: Any
    loaded: Any
    full: Any
    empty: Any
    thread: Array
    n: Any = 0
    done: Any = 0
    b: Any = None
    h: Any = None
    tile: Any = None
    load_next: Any = None
    first: Any = None
    count: Any = None

    def at(self, n: Any, done: Any = 0) -> "Block":
        """The same at its n-th tile."""
        b, h, tile = self.places.place(lax.axis_index("block"), n)
        if not self.kernel.by_keys:  # the last queries have the most work with a causal mask: they come first
            tile = self.places.tiles - 1 - tile
        here = dataclasses.replace(self, n=n, done=done, b=b, h=h, tile=tile)
        first = self.span[*here.own, 0]
        return dataclasses.replace(here, first=first, count=self.span[*here.own, 1] - first)

    def each_tile(self, one: Callable[["Block"], None]) -> Array:
        """Call `one` at each tile. Returns the number of all visits."""

        def step(n, done):
            here = self.at(n, done)
            one(here)
            return done + here.steps

        return lax.fori_loop(0, self.mine, step, jnp.int32(0))

    @property
    def mine(self) -> Array:
        return self.places.mine(lax.axis_index("block"))

    @property
    def half(self) -> Array:
        """Which half of the memory for own rows they are in: the next tile's are copied to the other one."""
        return lax.rem(self.n, jnp.int32(2))

    @property
    def steps(self) -> Array:
        """How many visits this tile makes."""
        return self.count * self.kernel.rounds

    @property
    def columns(self) -> int:
        return self.kernel.columns

    @property
    def row(self) -> Array:
        """Position of this warpgroup's first row."""
        return self.tile * ROWS + self.thread * SIDE

    @property
    def rows(self) -> Any:
        return pl.ds(self.row, SIDE)

    def part(self, visit: Visit) -> Any:
        """The tokens of a visited tile."""
        return pl.ds(visit.tile * self.columns, self.columns)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the scores of this warpgroup's rows and a visited tile."""
        return SIDE, self.columns

    @property
    def own(self) -> tuple[Any, Array]:
        """Indices of the block's lists in the tables."""
        return self.b if self.order.shape[0] > 1 else 0, self.tile

    def visit(self, step: Array) -> Visit:
        """The visit of a step, of `count` times `rounds`."""
        around, number = jnp.int32(0), step
        if self.kernel.rounds > 1:
            around, number = lax.div(step, self.count), lax.rem(step, self.count)
        entry = self.order[*self.own, self.first + number]
        quarters = lax.shift_right_logical(entry, 2 * self.thread) & 3
        partly = (entry & 2**PARTLY) > 0
        return Visit(lax.shift_right_logical(entry, NUMBER), partly, quarters, around, self.slot(step))

    def slot(self, step: Array) -> Array:
        return lax.rem(self.done + step, jnp.int32(self.kernel.slots))

    def run(
        self, own: Callable[["Block"], Copies], visited: Callable[["Block", Visit], Copies], work: Callable[..., None]
    ) -> None:
        """Let one warpgroup copy and the others work, tile by tile.

        Args:
            own: pairs of a warpgroup's own rows in global memory, and their memory. The latter may hold results later.
            visited: pairs of a piece of the visited tile in global memory, and the slots that it goes to.
            work: called as `work(block)` at each tile. It calls `visit_all`, and may leave copies of results under way.
        """

        def copy():
            plgpu.set_max_registers(COPIER_REGISTERS, action="decrease")
            self._copy_all(visited)

        def load(n):
            here = self.at(n)
            for source, buffer in own(here):
                plgpu.copy_gmem_to_smem(source, buffer, self.loaded.at[2 * self.thread + here.half])

        def one(here):
            def load_next():
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the results of the tile before have left
                pl.when(here.n + 1 < self.mine)(lambda: load(here.n + 1))

            plgpu.barrier_wait(self.loaded.at[2 * self.thread + here.half])
            work(dataclasses.replace(here, load_next=load_next))

        def multiply():
            plgpu.set_max_registers(WORKER_REGISTERS, action="increase")
            load(jnp.int32(0))
            self.each_tile(one)
            plgpu.wait_smem_to_gmem(0)

        pl.when(self.thread == WORKERS)(copy)
        pl.when(self.thread < WORKERS)(multiply)

    def _copy_all(self, visited: Callable[["Block", Visit], Copies]) -> None:
        """Fill slots as soon as they are empty."""
        slots = self.kernel.slots

        def one(here):
            def step(n, _):
                visit = here.visit(n)
                pl.when(here.done + n >= slots)(lambda: plgpu.barrier_wait(self.empty.at[visit.slot]))
                for source, buffer in visited(here, visit):
                    plgpu.copy_gmem_to_smem(source, buffer.at[visit.slot], self.full.at[visit.slot])
                return 0

            lax.fori_loop(0, here.steps, step, 0)

        def drain(n, _):
            plgpu.barrier_wait(self.empty.at[lax.rem(n, jnp.int32(slots))])
            return 0

        done = self.each_tile(one)
        lax.fori_loop(jnp.maximum(done - slots, 0), done, drain, 0)  # no barrier ends while it is used

    def visit_all(self, one: Callable[[Visit, Any], Any], sums: Any) -> Any:
        """The sums after all visits; `one(visit, sums)` gives those after one, whose slot it reads."""

        def step(n, sums):
            visit = self.visit(n)
            plgpu.barrier_wait(self.full.at[visit.slot])
            sums = one(visit, sums)
            plgpu.barrier_arrive(self.empty.at[visit.slot])
            pl.when(n == 0)(self.load_next)  # not before, when the results of the tile before are on their way
            return sums

        pl.when(self.steps == 0)(self.load_next)
        return lax.fori_loop(0, self.steps, step, sums)

    def where_seen(self, visit: Visit, other: float, *arrays: Array) -> Any:
        """The arrays [rows, columns] where a query sees a key, else `other`; as they are if the tile needs no mask."""
        if self.kernel.rules.whole:
            return arrays

        def masked(*arrays):
            seen = self._seen(visit)
            return tuple(jnp.where(seen, x, other) for x in arrays)

        return lax.cond(visit.partly, masked, lambda *arrays: arrays, *arrays)

    def _seen(self, visit: Visit) -> Array:
        """[rows, columns] bool: whether queries and keys see each other."""
        rules = self.kernel.rules
        rows, columns = self._marks(visit)
        query, key = (columns, rows) if self.kernel.by_keys else (rows, columns)
        seen: Any = rules.by_token.sees(query[0], key[0])
        others = []
        if self.ids is not None:
            of_row, of_column = self.ids[0].at[self.b, self.rows], self.ids[1].at[self.b, self.part(visit)]
            others.append(self._along_rows(of_row) == self._along_columns(of_column))
        if rules.pattern is not None:
            others.append(rules.pattern.meets(query[1:], key[1:]))
        if rules.quarters:
            column = self._iota(1)
            half = lax.shift_right_logical(column, jnp.full_like(column, SIDE.bit_length() - 1))
            others.append((lax.shift_right_logical(jnp.full_like(column, 0) + visit.quarters, half) & 1) > 0)
        for other in others:
            seen = other if seen is None else seen & other
        return seen

    def _marks(self, visit: Visit) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Positions of the rows and of the columns, each with the marks of the pattern, all [rows, columns]."""
        if self.marks is None:
            return (self.row + self._iota(0),), (visit.tile * self.columns + self._iota(1),)
        numbers = range(self.marks.shape[1])
        return (
            tuple(self._along_rows(self.marks.at[self.b, n, self.rows]) for n in numbers),
            tuple(self._along_columns(self.marks.at[self.b, n, self.part(visit)]) for n in numbers),
        )

    def _iota(self, axis: int) -> Array:
        return plgpu.broadcasted_iota(jnp.int32, self.shape, axis, layout=ACCUMULATOR)

    def _along_rows(self, vector: Any) -> Array:
        """Numbers of rows in global memory, for all columns."""
        return along(gather(vector, ROW), 0, self.shape)

    def _along_columns(self, vector: Any) -> Array:
        """Numbers of columns in global memory, for all rows."""
        return along(gather(vector, COLUMN), 1, self.shape)
