"""Grouped products by `jax.lax.ragged_dot_general`, which XLA lowers.

On a TPU that is a grouped product. On a CPU and a GPU XLA multiplies all rows with the matrices of all groups, and
masks: X times the operations, and X copies of the rows in memory.
"""

import jax
import jax.numpy as jnp
from jax.lax import RaggedDotDimensionNumbers

from seqmodels.kernels.finite import finite_or_zero, spoil
from seqmodels.kernels.grouped_matmul.groups import bounds, real_rows


def supports(platform: str, **facts: object) -> str | None:
    """Why this backend cannot serve the call; None: it can (it always can)."""
    return None


def grouped_matmul(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """See `kernels.grouped_matmul.grouped_matmul`. Sums in float32 (float64 for float64 arguments)."""
    return _by_rows(x, w, sizes, contracted=1)


def transposed(dy: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """The gradient of x [M, K], given that of y [M, N]: the product with the transposed matrices."""
    return _by_rows(dy, w, sizes, contracted=2)


def weight_gradient(x: jax.Array, dy: jax.Array, sizes: jax.Array) -> jax.Array:
    """The gradient of w [X, K, N], given x [M, K] and the gradient of y [M, N]: a sum over each group's rows."""
    numbers = RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[])
    dy, (start, end) = real_rows(dy, sizes), bounds(sizes)
    dw = _ragged_dot(real_rows(x, sizes), finite_or_zero(dy), sizes, numbers)
    # XLA multiplies the rows of other groups with zero, so what is not finite would reach all matrices
    bad = jnp.pad(jnp.cumsum(jnp.any(~jnp.isfinite(dy), axis=1), dtype=jnp.int32), (1, 0))
    return spoil(dw, bad[end] > bad[start])


def _by_rows(x, w, sizes, contracted):
    """The product of every row with its group's matrix over the axis `contracted` of w."""
    numbers = RaggedDotDimensionNumbers(
        (((1,), (contracted,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )
    # jax leaves open what the result is in rows of no group
    return real_rows(_ragged_dot(real_rows(x, sizes), w, sizes, numbers), sizes)


def _ragged_dot(a, b, sizes, numbers):
    wide = jnp.result_type(a, jnp.float32)
    precision = None if a.dtype.itemsize == 2 else "highest"  # otherwise a GPU or TPU may round float32 first
    y = jax.lax.ragged_dot_general(a, b, sizes, numbers, precision=precision, preferred_element_type=wide)
    return y.astype(a.dtype)
