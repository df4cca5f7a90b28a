"""One value per thread: the operations from which the Mosaic GPU kernels are built.

A warpgroup has 128 threads. An array of shape (128,) in the layout `LANES` takes one register of each thread.
Arithmetic on such arrays is plain jax.numpy. This module adds what Pallas lacks: loads and stores of 16 bytes at a
separate offset for each thread, and the hardware's reciprocal. In the interpreter the same functions use indexing and
arithmetic.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from numpy.polynomial import Chebyshev, Polynomial

from seqmodels.kernels.interpreter import gpu_interpreter

Lanes = tuple[jax.Array, ...]  # numbers of each thread: arrays [128], one for each register
THREADS = 128
LANES = plgpu.Layout.WG_STRIDED((THREADS,), vec_size=1)
LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
# Approximates log(1 + e) / e for e in [0, 1] to 1e-7: the polynomial that interpolates it at the Chebyshev nodes
_nearest = Chebyshev.interpolate(lambda e: np.log1p(e) / e, 8, domain=[0, 1])
LOG1P = tuple(_nearest.convert(kind=Polynomial).coef.tolist())

H100_PROCESSORS = 132


def compute_capability() -> float | None:
    """Compute capability of the GPU. None if there is no GPU: when compiling ahead of time, or interpreting."""
    if gpu_interpreter() or jax.default_backend() != "gpu":
        return None
    return float(jax.devices()[0].compute_capability)


def processors() -> int:
    """Multiprocessors of the GPU. Without a GPU (compiling ahead of time, or interpreting), those of an H100."""
    if gpu_interpreter() or jax.default_backend() != "gpu":
        return H100_PROCESSORS
    return jax.devices()[0].core_count


def warpgroups(most: int) -> int:
    """How many warpgroups may store to one array: `most`, or 1 in the interpreter, which stores whole arrays."""
    return 1 if gpu_interpreter() else most


def thread_index() -> jax.Array:
    """[128] int32: the number of each thread in its warpgroup."""
    return plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, (THREADS,), 0), LANES)


def kernel(body: Callable[..., None], **options: Any) -> Callable[..., Any]:
    """`plgpu.kernel` of a body that uses this module's operations; interpreted within the context `interpret`."""
    return plgpu.kernel(body, compiler_params=compiler_params(), interpret=gpu_interpreter(), **options)


def compiler_params() -> plgpu.CompilerParams:
    """One register per thread for each array, and manual barriers: automatic ones around each store cost 25 % more."""
    from jax.experimental.mosaic.gpu.core import LoweringSemantics

    return plgpu.CompilerParams(
        approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=LoweringSemantics.Lane
    )


def in_place(
    kernel: Any, arrays: Iterable[jax.Array], state: jax.Array, out: jax.ShapeDtypeStruct
) -> tuple[jax.Array, jax.Array]:
    """Run a kernel and return its output and the new state, which reuses the memory of `state` if that is donated.

    Args:
        kernel: made by `plgpu.kernel`. Its body gets references to the arrays, to the state, which it updates, and to
            the output.
        arrays: arrays that the kernel only reads. out: shape and dtype of its output.
    """

    def run(refs):
        state, output = refs
        # `fun` leaves out the rule for jax.vmap, because that rule takes no references in jax 0.10
        output[...] = kernel.fun(*arrays, state)

    state, output = pl.run_state(run)((state, jnp.zeros(out.shape, out.dtype)))
    return output, state


def load_vector(ref: Any, offset: jax.Array, width: int, *, at: int = 0) -> Lanes:
    """`width` consecutive elements from each thread's offset.

    Args:
        ref: contiguous reference in shared or global memory.
        offset: [128] int32, elements from the start of ref; a multiple of width.
        width: 1, 2, 4 or 8.
        at: static distance added to offset.

    Returns:
        Tuple of `width` arrays [128] float32.
    """
    if gpu_interpreter():
        flat = ref[...].reshape(-1)
        return tuple(flat[offset + at + i].astype(jnp.float32) for i in range(width))
    return _load_vector(width, at)(ref, offset)


def store_vector(ref: Any, offset: jax.Array, values: Lanes, *, at: int = 0) -> None:
    """The counterpart of `load_vector`: store `values`, a tuple of arrays [128] float32, in ref's dtype."""
    if gpu_interpreter():
        flat = ref[...].reshape(-1)
        for i, value in enumerate(values):
            flat = flat.at[offset + at + i].set(value.astype(flat.dtype))
        ref[...] = flat.reshape(ref.shape)
    else:
        _store_vector(len(values), at)(ref, offset, *values)


def prefetch(ref: Any, offset: jax.Array) -> None:
    """Bring the 128 bytes around each thread's offset of `ref`, in global memory, to the GPU's second cache."""
    if not gpu_interpreter():
        _prefetch()(ref, offset)


def zeros(count: int) -> Lanes:
    """`count` arrays [128] of float32 zeros."""
    return (plgpu.layout_cast(jnp.zeros((THREADS,), jnp.float32), LANES),) * count


def reciprocal(x: jax.Array) -> jax.Array:
    """1 / x, [128] float32, with an error of one unit in the last place."""
    return 1 / x if gpu_interpreter() else _reciprocal()(x)


def exchange(x: jax.Array, distance: int) -> jax.Array:
    """The x of the thread whose index differs in the bit `distance`, a power of two below 32; [128] float32."""
    if gpu_interpreter():
        return x[jnp.arange(THREADS) ^ distance]
    return _exchange(distance)(x)


def exp(x: jax.Array) -> jax.Array:
    """e^x."""
    return jnp.exp2(x * LOG2E)


def sigmoid(x: jax.Array) -> jax.Array:
    """1 / (1 + e^-x)."""
    return reciprocal(1 + exp(-x))


def softplus(x: jax.Array) -> jax.Array:
    """log(1 + e^x) to float32 precision, as max(x, 0) + log(1 + e) with e = exp(-|x|) <= 1; the log by a polynomial."""
    e = exp(-jnp.abs(x))
    series = jnp.full_like(e, LOG1P[-1])
    for coefficient in LOG1P[-2::-1]:
        series = series * e + coefficient
    return jnp.maximum(x, 0) + e * series


def _scalar(array):
    """The one element that a thread holds of an array."""
    from jaxlib.mlir.dialects import vector

    return vector.extract(array.registers.flat[0], dynamic_position=[], static_position=[0])


def _array(scalar, like):
    """The array in which each thread holds the one element `scalar`."""
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import vector

    registers = like.registers.copy()
    registers.flat[0] = vector.broadcast(ir.VectorType.get((1,), scalar.type), scalar)
    return mgpu.FragmentedArray(_registers=registers, _layout=like.layout, _is_signed=None)


def _pointer(ref, offset, at):
    """Address of the element that a thread reads or writes, and the element type."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir

    dtype = ir.MemRefType(ref.type).element_type
    pointer = utils.getelementptr(utils.memref_ptr(ref), [_scalar(offset)], dtype)
    return (utils.getelementptr(pointer, [at], dtype) if at else pointer), dtype


@functools.cache
def _load_vector(width, at):
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    out = plgpu.ShapeDtypeStruct((THREADS,), jnp.float32, layout=LANES)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), LANES), return_type=(out,) * width)
    def load(ctx, ref, offset):
        pointer, dtype = _pointer(ref, offset, at)
        values = llvm.load(ir.VectorType.get((width,), dtype), pointer)
        f32 = ir.F32Type.get()
        if dtype != f32:
            values = arith.extf(ir.VectorType.get((width,), f32), values)
        pick = (vector.extract(values, dynamic_position=[], static_position=[i]) for i in range(width))
        return tuple(_array(x, offset) for x in pick)

    return load


@functools.cache
def _store_vector(width, at):
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), LANES) + (LANES,) * width)
    def store(ctx, ref, offset, *values):
        pointer, dtype = _pointer(ref, offset, at)
        f32 = ir.F32Type.get()
        packed = vector.from_elements(ir.VectorType.get((width,), f32), [_scalar(v) for v in values])
        if dtype != f32:
            packed = arith.truncf(ir.VectorType.get((width,), dtype), packed)
        llvm.store(packed, pointer)

    return store


@functools.cache
def _prefetch():
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), LANES))
    def fetch(ctx, ref, offset):
        pointer, _ = _pointer(ref, offset, 0)
        address = llvm.ptrtoint(ir.IntegerType.get_signless(64), pointer)
        void = ir.Type.parse("!llvm.void")
        llvm.inline_asm(void, [address], "prefetch.global.L2 [$0];", "l", has_side_effects=True)

    return fetch


@functools.cache
def _exchange(distance):
    from jax.experimental.mosaic.gpu import utils

    out = plgpu.ShapeDtypeStruct((THREADS,), jnp.float32, layout=LANES)

    @plgpu.inline_mgpu(arg_types=(LANES,), return_type=out)
    def swap(ctx, x):
        return _array(utils.shfl_bfly(_scalar(x), distance), x)

    return swap


@functools.cache
def _reciprocal():
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    out = plgpu.ShapeDtypeStruct((THREADS,), jnp.float32, layout=LANES)

    @plgpu.inline_mgpu(arg_types=(LANES,), return_type=out)
    def f(ctx, x):
        value = llvm.inline_asm(ir.F32Type.get(), [_scalar(x)], "rcp.approx.ftz.f32 $0, $1;", "=f,f")
        return _array(value, x)

    return f
