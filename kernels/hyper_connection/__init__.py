"""One step of hyper-connections whose streams are not mixed: what is added to them, and what the next step reads.

The residual stream of a token is n streams X [n, D]. With y, the output of the step before, and its weights s,

    X'_i = X_i + s_i y,    c = RMSNorm(vec X') W,    [p, q] = c,
    pre = sigmoid(a_p p + b_p),    post = 2 sigmoid(a_q q + b_q),    u = sum_i pre_i X'_i.

u goes to the norm and the branches of this step, and X', what they return and `post` to the next call. So a step reads
the streams once and writes them once. `seqmodels/depth/hyper.py` has the papers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from seqmodels.kernels import dispatch
from seqmodels.kernels.axes import TOKENS, Layout
from seqmodels.kernels.hyper_connection import mosaic_gpu, reference

BACKENDS = {"reference": reference, "mosaic_gpu": mosaic_gpu}
WINNERS = {"default": ("reference",)}  # a model takes XLA's fusions (hyper.py) unless the kernels are named
IMPLEMENTATIONS = tuple(BACKENDS)
VECTORS = ("scale", "pre_bias", "post_bias")

choose = functools.partial(dispatch.choose, "hyper_connection", BACKENDS, WINNERS)


def axes(**arrays: object) -> Layout:
    """Logical axes of the arrays and results of `hyper_connection`: each token is by itself, and stays whole."""
    streams, row = (*TOKENS, None, None), (*TOKENS, None)
    tokens = dict(streams=streams, y=row, weights=row)
    return Layout(dict(**tokens, matrix=(None,) * 3, **dict.fromkeys(VECTORS, (None,))), (streams, row, row))


def hyper_connection(
    streams: jax.Array,
    y: jax.Array,
    weights: jax.Array,
    matrix: jax.Array,
    scale: jax.Array,
    pre_bias: jax.Array,
    post_bias: jax.Array,
    *,
    eps: float,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One step. All results are differentiable in all arrays.

    Args:
        streams: [B, T, n, D] X, in the dtype in which streams are kept.
        y: [B, T, D] what the branches of the step before returned, in the dtype of the streams.
        weights: [B, T, n] s, of y in each stream, float32. Before the first step they are zero.
        matrix: [n, D, 2 n] W in the dtype of the streams.
        scale: [2] float32, a_p and a_q. pre_bias, post_bias: [n] float32, b_p and b_q.
        eps: of the norm, at least 0.
        implementation: one of `IMPLEMENTATIONS`. None: the fastest that supports the call.

    Returns:
        X' [B, T, n, D] and u [B, T, D] in the dtype of the streams, and post [B, T, n] float32 (float64 for float64
        streams). Sums are float32 (float64), of X' before it is rounded.

    Raises:
        UnsupportedError: the named implementation is unknown or does not support the call.
        ValueError: shapes or dtypes do not fit.
    """
    arrays = dict(streams=streams, y=y, weights=weights, matrix=matrix)
    arrays |= dict(scale=scale, pre_bias=pre_bias, post_bias=post_bias)
    check(**arrays)
    facts = dict(shape=streams.shape, dtype=streams.dtype)

    def call(backend: Any, arrays: dict[str, Any]) -> tuple[jax.Array, jax.Array, jax.Array]:
        return backend.hyper_connection(**arrays, eps=eps)

    return dispatch.dispatch("hyper_connection", BACKENDS, WINNERS, implementation, facts, call, arrays)


def check(streams: jax.Array, **others: jax.Array) -> None:
    """Raise a ValueError unless the arguments fit together."""
    if streams.ndim != 4 or not jnp.issubdtype(streams.dtype, jnp.floating):
        kind = f"{streams.dtype}{list(streams.shape)}"
        raise ValueError(f"hyper_connection: streams are {kind}; allowed: numbers [B, T, n, D]")
    batch, length, count, width = streams.shape
    wide = jnp.result_type(streams, jnp.float32)
    want = dict(
        y=((batch, length, width), streams.dtype),
        weights=((batch, length, count), wide),
        matrix=((count, width, 2 * count), streams.dtype),
        scale=((2,), wide),
        pre_bias=((count,), wide),
        post_bias=((count,), wide),
    )
    for name, (shape, dtype) in want.items():
        if (x := others[name]).shape != shape or x.dtype != dtype:
            allowed = f"allowed with streams {streams.dtype}{list(streams.shape)}: {dtype}{list(shape)}"
            raise ValueError(f"hyper_connection: {name} is {x.dtype}{list(x.shape)}; {allowed}")
