"""Tiles of 64 x 64 numbers in shared memory, in the layout that the tensor cores read."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from seqmodels.kernels.interpreter import gpu_interpreter

SIDE = 64  # tokens of a chunk, and columns of a tile: 128 bytes of 16-bit numbers, one swizzle
SLOTS = 2  # chunks in shared memory: one in use, one being copied

ACCUMULATOR = plgpu.Layout.WGMMA
ROW = plgpu.Layout.WGMMA.reduce(1)  # layout of a vector with a number for each row of a tile
COLUMN = plgpu.Layout.WGMMA.reduce(0)

_index = inspect.signature(plgpu.load).parameters.get("idx")
INDEXED = _index is not None and _index.default is inspect.Parameter.empty  # in jax 0.10


def shared(*shape: int, dtype: DTypeLike) -> Any:
    """An array in shared memory. wgmma takes its last two axes as the left or right operand, transposed or not."""
    transforms = (plgpu.TilingTransform((8, SIDE)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=() if gpu_interpreter() else transforms)


def zeros(rows: int, columns: int) -> Array:
    """[rows, columns] float32 in registers."""
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), ACCUMULATOR)


def products(*sums: tuple[Array, tuple[Any, Any]], meanwhile: Callable[[], None] = lambda: None) -> Sequence[Array]:
    """Several matrix products by the tensor cores, which run at the same time.

    Args:
        sums: pairs of an accumulator [M, N], float32 in registers, and the factors (left [M, K], right [K, N]) of the
            product that is added to it. The left factor is in registers or shared memory, the right in shared memory.
        meanwhile: called while the products run. It must not write to their factors.

    Returns:
        The accumulators.
    """
    if gpu_interpreter():
        meanwhile()
        return [x + jnp.dot(a[...], b[...], preferred_element_type=jnp.float32) for x, (a, b) in sums]

    def run(accumulators):
        for accumulator, (_, (a, b)) in zip(accumulators, sums, strict=True):
            plgpu.wgmma(accumulator, a, b)
        meanwhile()

    return pl.run_state(run)(tuple(plgpu.ACC.init(x) for x, _ in sums))


def load(ref: Any, layout: Any = ACCUMULATOR) -> Array:
    """Load a reference in shared memory into registers, as float32."""
    if layout is ACCUMULATOR:
        return plgpu.layout_cast(ref[...], layout).astype(jnp.float32)
    return gather(ref, layout).astype(jnp.float32)


def gather(ref: Any, layout: Any = ACCUMULATOR) -> Array:
    """Load a reference in any memory and with any layout into registers, in as many loads as needed."""
    index = dict(idx=()) if INDEXED else {}
    return plgpu.load(ref, **index, layout=layout, optimized=False)


def along(vector: Array, axis: int, shape: tuple[int, int]) -> Array:
    """Broadcast a vector [shape[axis]] over the other axis."""
    return lax.broadcast_in_dim(vector, shape, (axis,))


def decayed(x: Array, vectors: Any, slot: Array | int, reverse: bool, strict: bool) -> Array:
    """x [64, 64] times exp2(row_i - column_j) where i sees j, else zero, even if x is infinite or NaN there.

    Token i sees the tokens before it (with `reverse`, after it), and itself unless `strict`. It does not see those of
    another document, where the decay is exactly zero.
    """
    shape = (SIDE, SIDE)
    row, column = load(vectors.at[slot, 0], ROW), load(vectors.at[slot, 1], COLUMN)
    i = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=ACCUMULATOR)
    j = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=ACCUMULATOR)
    if reverse:
        i, j = j, i
    decay = jnp.exp2(along(row, 0, shape) - along(column, 1, shape))
    return jnp.where((i > j if strict else i >= j) & (decay != 0), x * decay, 0)


def weighted(x: Array, weight: Array) -> Array:
    """x times `weight`, of the same shape or a number; zero where the weight is, even if x is infinite or NaN there."""
    return jnp.where(weight == 0, 0, x * weight)
