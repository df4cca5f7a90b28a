"""What the kernels share: the place of a block, the tiles that it visits, and the mask inside a tile.

A block has three warpgroups and 128 rows: queries, or keys for their gradients. Two of them multiply, with 64 rows
each. The third one copies the tiles that the block visits into slots of shared memory.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from seqmodels.kernels.attention.masks import Mask
from seqmodels.kernels.attention.mosaic_gpu.tables import NUMBER, PARTLY, ROWS, Documents, Visits
from seqmodels.kernels.interpreter import gpu_interpreter
from seqmodels.kernels.tensor_cores import ACCUMULATOR, COLUMN, ROW, SIDE, along, gather

WORKERS = ROWS // SIDE  # warpgroups that multiply
COPIER_REGISTERS, WORKER_REGISTERS = 24, 240  # for each thread


@dataclasses.dataclass(frozen=True)
class Rules:
    """Static options of the kernels.

    Attributes:
        mask: the rules of positions. scale: greater than 0.
        documents: whether queries and keys have documents.
    """

    mask: Mask
    scale: float
    documents: bool

    @property
    def by_token(self) -> Mask:
        """The rules without the pattern, which the tables know."""
        return dataclasses.replace(self.mask, pattern=None)

    @property
    def quarters(self) -> bool:
        """Whether blocks of the pattern are smaller than tiles."""
        return self.mask.pattern is not None and self.mask.pattern.block % ROWS > 0


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
        rounds: how often all tiles are visited, for several heads.
        by_keys: whether rows are keys, and columns queries.
    """

    body: Callable[..., None]
    name: str
    rules: Rules
    columns: int
    slots: int
    copies: int
    rounds: int = 1
    by_keys: bool = False

    def __call__(
        self, heads: int, inputs: Sequence[Array], tables: Visits, documents: Documents | None, out: Any, scratch: list
    ) -> Any:
        """Run the kernel over all rows of `heads` heads.

        Args:
            inputs: arrays, the first one [B, T, ...]. out: shapes and dtypes of the results.
            scratch: shared memory and barriers besides those of slots.
        """
        batch, length = inputs[0].shape[:2]

        def run(*refs):
            arrays, (order, span, *rest) = refs[: len(inputs)], refs[len(inputs) :]
            ids, (*rest, full, empty) = (rest[:2], rest[2:]) if self.rules.documents else (None, rest)
            self.body(Block.here(self, length // ROWS, order, span, ids, full, empty), *arrays, *rest)

        run.__name__ = self.name
        kernel = plgpu.kernel(
            run,
            out_type=out,
            scratch_types=[
                *scratch,
                plgpu.Barrier(num_arrivals=self.copies, num_barriers=self.slots),
                plgpu.Barrier(num_arrivals=WORKERS, num_barriers=self.slots),
            ],
            grid=(batch, heads, length // ROWS),
            grid_names=("b", "h", "tile"),
            num_threads=WORKERS + 1,
            thread_name="thread",
            compiler_params=compiler_params(),
            interpret=gpu_interpreter(),
        )
        return kernel(*inputs, *tables, *(documents or ()))


def compiler_params() -> plgpu.CompilerParams:
    """Manual barriers, layouts as written, and the hardware's exponentials."""
    from jax.experimental.mosaic.gpu.core import LoweringSemantics

    return plgpu.CompilerParams(
        approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=LoweringSemantics.Lane
    )


@dataclasses.dataclass(frozen=True)
class Block:
    """Inside a kernel: one warpgroup of one block.

    Attributes:
        kernel: its sizes.
        order, span: `Visits` in global memory. ids: documents of the rows and of the columns, or None.
        full, empty: barriers that signal that a slot is filled, and that all have read it.
        b, h, tile, thread: of the batch, head, tile of rows, and warpgroup.
    """

    kernel: Kernel
    order: Any
    span: Any
    ids: tuple[Any, Any] | None
    full: Any
    empty: Any
    b: Array
    h: Array
    tile: Array
    thread: Array

    @classmethod
    def here(cls, kernel: Kernel, tiles: int, order: Any, span: Any, ids: Any, full: Any, empty: Any) -> "Block":
        """The warpgroup that runs. `ids` are documents of queries and of keys; `tiles` the number of tiles of rows."""
        b, h, tile, thread = (lax.axis_index(name) for name in ("b", "h", "tile", "thread"))
        if not kernel.by_keys:
            tile = tiles - 1 - tile  # with a causal mask the last queries have the most work; they begin first
        ids = ids[::-1] if ids is not None and kernel.by_keys else ids
        return cls(kernel, order, span, ids, full, empty, b, h, tile, thread)

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

    @property
    def count(self) -> Array:
        """How many tiles are visited in a round."""
        return self.span[*self.own, 1] - self.span[*self.own, 0]

    def visit(self, step: Array) -> Visit:
        """The visit of a step, of `count` times `rounds`."""
        around, number = jnp.int32(0), step
        if self.kernel.rounds > 1:
            around, number = lax.div(step, self.count), lax.rem(step, self.count)
        entry = self.order[*self.own, self.span[*self.own, 0] + number]
        quarters = lax.shift_right_logical(entry, 2 * self.thread) & 3
        partly = (entry & 2**PARTLY) > 0
        return Visit(lax.shift_right_logical(entry, NUMBER), partly, quarters, around, self.slot(step))

    def slot(self, step: Array) -> Array:
        return lax.rem(step, jnp.int32(self.kernel.slots))

    def run(self, copies: Callable[[Visit], list[tuple[Any, Any]]], work: Callable[[], None]) -> None:
        """Let one warpgroup copy and the others work.

        Args:
            copies: gives, for a visit, pairs of a piece in global memory and the slots that it goes to.
            work: what each of the others does. It calls `visit_all`.
        """

        def copy():
            plgpu.set_max_registers(COPIER_REGISTERS, action="decrease")
            self._copy_all(copies)

        def multiply():
            plgpu.set_max_registers(WORKER_REGISTERS, action="increase")
            work()

        pl.when(self.thread == WORKERS)(copy)
        pl.when(self.thread < WORKERS)(multiply)

    def _copy_all(self, copies: Callable[[Visit], list[tuple[Any, Any]]]) -> None:
        """Fill slots as soon as they are empty."""

        def step(n, _):
            visit = self.visit(n)
            pl.when(n >= self.kernel.slots)(lambda: plgpu.barrier_wait(self.empty.at[visit.slot]))
            for source, buffer in copies(visit):
                plgpu.copy_gmem_to_smem(source, buffer.at[visit.slot], self.full.at[visit.slot])
            return 0

        def drain(n, _):
            plgpu.barrier_wait(self.empty.at[self.slot(n)])
            return 0

        steps = self.count * self.kernel.rounds
        lax.fori_loop(0, steps, step, 0)
        lax.fori_loop(jnp.maximum(steps - self.kernel.slots, 0), steps, drain, 0)  # no barrier ends while it is used

    def visit_all(self, one: Callable[[Visit, Any], Any], sums: Any) -> Any:
        """The sums after all visits; `one(visit, sums)` gives those after one, whose slot it reads."""

        def step(n, sums):
            visit = self.visit(n)
            plgpu.barrier_wait(self.full.at[visit.slot])
            sums = one(visit, sums)
            plgpu.barrier_arrive(self.empty.at[visit.slot])
            return sums

        return lax.fori_loop(0, self.count * self.kernel.rounds, step, sums)

    def where_seen(self, visit: Visit, other: float, *arrays: Array) -> Any:
        """The arrays [rows, columns] where a query sees a key, else `other`; as they are if the tile needs no mask."""
        rules = self.kernel.rules
        if rules.by_token.trivial and not rules.documents and not rules.quarters:
            return arrays

        def masked(*arrays):
            seen = self._seen(visit)
            return tuple(jnp.where(seen, x, other) for x in arrays)

        return lax.cond(visit.partly, masked, lambda *arrays: arrays, *arrays)

    def _seen(self, visit: Visit) -> Array:
        """[rows, columns] bool: whether queries and keys see each other."""
        iota = lambda axis: plgpu.broadcasted_iota(jnp.int32, self.shape, axis, layout=ACCUMULATOR)  # noqa: E731
        i, j = self.row + iota(0), visit.tile * self.columns + iota(1)
        seen: Any = self.kernel.rules.by_token.sees(*((j, i) if self.kernel.by_keys else (i, j)))
        others = []
        if self.ids is not None:
            of_row, of_column = gather(self.ids[0].at[self.b, self.rows], ROW), self.ids[1].at[self.b, self.part(visit)]
            others.append(along(of_row, 0, self.shape) == along(gather(of_column, COLUMN), 1, self.shape))
        if self.kernel.rules.quarters:
            half = lax.shift_right_logical(iota(1), jnp.full_like(i, SIDE.bit_length() - 1))
            others.append((lax.shift_right_logical(jnp.full_like(i, 0) + visit.quarters, half) & 1) > 0)
        for other in others:
            seen = other if seen is None else seen & other
        return seen
