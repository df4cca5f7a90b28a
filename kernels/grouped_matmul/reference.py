"""Grouped products, one group after another over all rows: the definition against which all others are tested."""

import jax
import jax.numpy as jnp

from seqmodels.kernels.grouped_matmul.groups import bounds


def supports(platform: str, **facts: object) -> str | None:
    """Why this backend cannot serve the call; None: it can (it always can)."""
    return None


def grouped_matmul(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """See `kernels.grouped_matmul.grouped_matmul`. Computes in at least float32, including float64."""

    def group(y, arrays):
        matrix, start, end = arrays
        own = _rows(x, start, end)
        return jnp.where(own, _dot(jnp.where(own, x, 0), matrix), y), None

    y = jnp.zeros((x.shape[0], w.shape[2]), jnp.result_type(x, jnp.float32))
    y, _ = jax.lax.scan(group, y, (w, *bounds(sizes)))
    return y.astype(x.dtype)


def transposed(dy: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """The gradient of x [M, K], given that of y [M, N]: the product with the transposed matrices."""
    return grouped_matmul(dy, jnp.swapaxes(w, 1, 2), sizes)


def weight_gradient(x: jax.Array, dy: jax.Array, sizes: jax.Array) -> jax.Array:
    """The gradient of w [X, K, N], given x [M, K] and the gradient of y [M, N]: a sum over each group's rows."""

    def group(place):
        own = _rows(x, *place)
        return _dot(jnp.where(own, x, 0).T, jnp.where(own, dy, 0)).astype(x.dtype)

    return jax.lax.map(group, bounds(sizes))


def _rows(x, start, end):
    """[M, 1] bool: which rows of x are in the group."""
    row = jnp.arange(x.shape[0])[:, None]
    return (row >= start) & (row < end)


def _dot(a, b):
    return jnp.dot(a, b, precision="highest", preferred_element_type=jnp.result_type(a, jnp.float32))
