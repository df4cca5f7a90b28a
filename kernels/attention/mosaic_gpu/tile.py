"""What the kernels share: sizes, tiles that are copied while others are multiplied, and the mask inside a tile."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from seqmodels.kernels.attention.masks import Mask
from seqmodels.kernels.interpreter import gpu_interpreter
from seqmodels.kernels.tensor_cores import ACCUMULATOR, COLUMN, ROW, SIDE, along, gather

WORKERS = 2  # warpgroups that multiply; each has 64 rows of a tile
ROWS = WORKERS * SIDE
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
    def masks(self) -> bool:
        """Whether there may be tiles that are seen in part: patterns see tiles of tokens as a whole."""
        return self.documents or not dataclasses.replace(self.mask, pattern=None).trivial


@dataclasses.dataclass(frozen=True)
class Stream:
    """Inside a kernel: the tiles that a block visits, one after another, through slots of shared memory.

    Attributes:
        order: the block's row [M] of `Visits.order`, in global memory.
        first, count: place of the first visit, and how many there are.
        rounds: how often all are visited, for several heads.
        slots: of shared memory. full, empty: barriers that signal that a slot is filled, and that all have read it.
    """

    order: Any
    first: Array
    count: Array
    rounds: int
    slots: int
    full: Any
    empty: Any

    @property
    def steps(self) -> Array:
        return self.count * self.rounds

    def at(self, step: Array) -> tuple[Array, Array, Array]:
        """Number of a step's tile, whether it needs a mask, and the round."""
        number, around = (step, jnp.int32(0)) if self.rounds == 1 else (lax.rem(step, self.count), self.round(step))
        entry = self.order[self.first + number]
        return lax.shift_right_logical(entry, jnp.int32(1)), (entry & 1) == 1, around

    def round(self, step: Array) -> Array:
        return lax.div(step, self.count)

    def slot(self, step: Array) -> Array:
        return lax.rem(step, jnp.int32(self.slots))

    def copy(self, sources: Callable[[Array, Array], list[tuple[Any, Any]]]) -> None:
        """Fill slots as soon as they are empty: the work of one warpgroup.

        Args:
            sources: `sources(tile, round)` gives pairs of a piece in global memory and its slots in shared memory.
        """
        plgpu.set_max_registers(COPIER_REGISTERS, action="decrease")

        def step(n, _):
            slot = self.slot(n)
            pl.when(n >= self.slots)(lambda: plgpu.barrier_wait(self.empty.at[slot]))
            tile, _, around = self.at(n)
            for source, buffer in sources(tile, around):
                plgpu.copy_gmem_to_smem(source, buffer.at[slot], self.full.at[slot])
            return 0

        def drain(n, _):
            plgpu.barrier_wait(self.empty.at[self.slot(n)])
            return 0

        lax.fori_loop(0, self.steps, step, 0)
        lax.fori_loop(jnp.maximum(self.steps - self.slots, 0), self.steps, drain, 0)  # no barrier ends while it is used


def compiler_params() -> plgpu.CompilerParams:
    """Manual barriers, layouts as written, and the hardware's exponentials."""
    from jax.experimental.mosaic.gpu.core import LoweringSemantics

    return plgpu.CompilerParams(
        approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=LoweringSemantics.Lane
    )


def kernel(body: Callable[..., None], **options: Any) -> Callable[..., Any]:
    """`plgpu.kernel` of warpgroups that multiply and one that copies, whose number is the axis "thread"."""
    threads: Any = dict(num_threads=WORKERS + 1, thread_name="thread")
    return plgpu.kernel(body, compiler_params=compiler_params(), interpret=gpu_interpreter(), **threads, **options)


def where_seen(
    rules: Rules,
    partly: Array,
    arrays: tuple[Array, ...],
    other: float,
    row: Array,
    column: Array,
    ids: tuple[Any, Any] | None,
    *,
    by_keys: bool = False,
) -> Any:
    """The arrays [rows, columns] where a query sees a key, else `other`; as they are unless the tile needs a mask.

    Args:
        partly: whether it does.
        row, column: positions of the first row and column. Rows are queries, or with `by_keys`, keys.
        ids: documents of the rows and of the columns, in global memory.
    """
    if not rules.masks:
        return arrays

    def masked(*arrays):
        visible = seen(rules, arrays[0].shape, row, column, ids, by_keys)
        return tuple(jnp.where(visible, x, other) for x in arrays)

    return lax.cond(partly, masked, lambda *arrays: arrays, *arrays)


def seen(
    rules: Rules, shape: tuple[int, int], row: Array, column: Array, ids: tuple[Any, Any] | None, by_keys: bool
) -> Array:
    """[rows, columns] bool: whether queries and keys see each other by positions and documents; not by the pattern."""
    i, j = (
        start + plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=ACCUMULATOR)
        for axis, start in ((0, row), (1, column))
    )
    visible: Any = dataclasses.replace(rules.mask, pattern=None).sees(*((j, i) if by_keys else (i, j)))
    if ids is None:
        return visible
    of_row, of_column = gather(ids[0], ROW), gather(ids[1], COLUMN)
    same = along(of_row, 0, shape) == along(of_column, 1, shape)
    return same if visible is None else visible & same
