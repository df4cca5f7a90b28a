"""Grouped products as Pallas Mosaic GPU kernels, for Hopper: wgmma on tiles that TMA copies to shared memory."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from seqmodels.kernels import lanes
from seqmodels.kernels.arrays import pad, round_up
from seqmodels.kernels.grouped_matmul.mosaic_gpu import products
from seqmodels.kernels.grouped_matmul.mosaic_gpu.pipeline import ROWS, SIDE
from seqmodels.kernels.interpreter import gpu_interpreter

DTYPES = ("bfloat16", "float16")


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
    if platform != "cuda" and not gpu_interpreter():
        return "it needs an NVIDIA GPU"
    if (capability := lanes.compute_capability() or 9) != 9:
        return f"it needs an NVIDIA GPU of compute capability 9.0 (Hopper), this one has {capability}"
    if jnp.dtype(dtype).name not in DTYPES:
        return f"x is {jnp.dtype(dtype).name}; it takes {', '.join(DTYPES)}"
    if inner % SIDE or outer % SIDE or not inner * outer:
        return f"the matrices are {inner} x {outer}; it takes multiples of {SIDE}"
    if not 0 < rows < 2**31 or not groups:
        return f"x has {rows} rows and {groups} groups; it takes from 1 on"
    return None


def grouped_matmul(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """See `kernels.grouped_matmul.grouped_matmul`. Sums in float32."""
    return _by_rows(x, w, sizes, transposed=False)


def transposed(dy: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """The gradient of x [M, K], given that of y [M, N]: the product with the transposed matrices."""
    return _by_rows(dy, w, sizes, transposed=True)


def weight_gradient(x: jax.Array, dy: jax.Array, sizes: jax.Array) -> jax.Array:
    """The gradient of w [X, K, N], given x [M, K] and the gradient of y [M, N]: a sum over each group's rows."""
    call = jax.custom_batching.sequential_vmap(products.by_groups)
    rows = max(round_up(x.shape[0], products.ALIGNED), SIDE)
    return call(pad(x, {0: rows}), pad(dy, {0: rows}), sizes)


def _by_rows(x, w, sizes, transposed):
    call = jax.custom_batching.sequential_vmap(functools.partial(products.by_rows, transposed=transposed))
    rows = x.shape[0]
    return call(pad(x, {0: max(rows, ROWS)}), w, sizes)[:rows]
