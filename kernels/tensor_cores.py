"""Products by the tensor cores of Hopper GPUs: tiles in shared memory as they read them, and in registers."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from seqmodels.kernels.interpreter import gpu_interpreter

SIDE = 64  # rows of a warpgroup, and columns of a tile: 128 bytes of 16-bit numbers, one swizzle

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


def along(vector: Array, axis: int, shape: tuple[int, ...]) -> Array:
    """Broadcast a vector [shape[axis]] over the other axis."""
    return lax.broadcast_in_dim(vector, shape, (axis,))
