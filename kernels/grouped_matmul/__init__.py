"""Products of rows, sorted by group, with one matrix for each group: the experts of a mixture."""

import functools
import logging
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from seqmodels.kernels import dispatch
from seqmodels.kernels.axes import Layout
from seqmodels.kernels.grouped_matmul import mosaic_gpu, mosaic_tpu, reference, xla

logger = logging.getLogger(__name__)

BACKENDS = {"reference": reference, "xla": xla, "mosaic_gpu": mosaic_gpu, "mosaic_tpu": mosaic_tpu}
WINNERS = {"cuda": ("mosaic_gpu", "xla"), "default": ("xla",)}  # by platform, fastest first as measured on an H200
IMPLEMENTATIONS = tuple(BACKENDS)


LAYOUT = Layout(dict(x=(None, None), w=(None, None, None), sizes=(None,)), ((None, None),))


def axes(**arrays: object) -> Layout:
    """Logical axes of the arrays and of the result of `grouped_matmul`: all stay whole.

    Which rows a device has depends on the values of `sizes`. So a caller on a mesh calls it inside a shard_map.
    """
    return LAYOUT


def grouped_matmul(x: jax.Array, w: jax.Array, sizes: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """y_r = x_r w_g for every row r of group g. The first sizes[0] rows are group 0, the next sizes[1] are group 1...

    Args:
        x: [M, K], rows sorted by group.
        w: [X, K, N] in the dtype of x, one matrix for each group.
        sizes: [X] int32, rows of each group, 0 or more, whose sum is at most M. What rows beyond the sum hold, even
            NaN, reaches no result and no gradient.
        implementation: one of `IMPLEMENTATIONS`. None: the fastest on the platform.

    Returns:
        y [M, N] in the dtype of x, summed in float32 (float64 for float64 arguments); zero in rows beyond the sum.
        Differentiable in x and w. The gradient of x is zero in rows beyond the sum, that of w is zero for a group
        without rows.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        seqmodels.kernels.dispatch.UnsupportedError: the named implementation cannot serve.
    """
    facts = check(x, w, sizes)
    if implementation is None and "cuda" in dispatch.platforms():
        name, why = choose("cuda", **facts)
        if name == "xla":
            warn_of_expansion(why, *w.shape, x.shape[0], x.dtype.itemsize)
    return dispatch.dispatch(
        "grouped_matmul", BACKENDS, WINNERS, implementation, facts, product, x, w, sizes.astype(jnp.int32)
    )


choose = functools.partial(dispatch.choose, "grouped_matmul", BACKENDS, WINNERS)


def check(x: jax.Array, w: jax.Array, sizes: jax.Array) -> dict[str, Any]:
    """Raise a ValueError unless the arguments fit together; return the static facts of the call."""
    if x.ndim != 2 or w.ndim != 3 or w.shape[1] != x.shape[1]:
        raise ValueError(f"grouped_matmul: x must be [M, K] and w [X, K, N], got {x.shape} and {w.shape}")
    if sizes.shape != w.shape[:1]:
        raise ValueError(f"grouped_matmul: sizes must be [{w.shape[0]}], one for each matrix, got {sizes.shape}")
    if not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise ValueError(f"grouped_matmul: sizes must be integers, got {sizes.dtype}")
    if x.dtype != w.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"grouped_matmul: x and w must have one floating dtype, got {x.dtype} and {w.dtype}")
    (rows, inner), (groups, _, outer) = x.shape, w.shape
    return dict(rows=rows, inner=inner, outer=outer, groups=groups, dtype=x.dtype)


@functools.cache
def warn_of_expansion(why: str, groups: int, inner: int, outer: int, rows: int, itemsize: int) -> None:
    """Log, once for each shape, what XLA's implementation costs on a GPU, as compiled for an H100 by jax 0.11.2."""
    gib = groups * itemsize / 2**30
    backward = max(rows * (inner + outer), outer * (rows + inner)) * gib  # both factors of one of the two products
    logger.warning(
        "grouped_matmul of %d rows and %d matrices %d x %d: XLA on a GPU multiplies every row with every matrix, which "
        "takes %d times the operations, and about %.1f GiB forward and %.1f backward (%s)",
        *(rows, groups, inner, outer, groups, rows * inner * gib, backward, why),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(backend: ModuleType, x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """`grouped_matmul` by one backend, whose other two products are the gradients."""
    return backend.grouped_matmul(x, w, sizes)


def _product_fwd(backend, x, w, sizes):
    return product(backend, x, w, sizes), (x, w, sizes)


def _product_bwd(backend, inputs, dy):
    x, w, sizes = inputs
    return backend.transposed(dy, w, sizes), backend.weight_gradient(x, dy, sizes), None


product.defvjp(_product_fwd, _product_bwd)
