"""A source of Attention Residuals that K later steps read, and its gradient in one pass.

Step k reads h_k = sum_i a_ki v_i, a_k = softmax_i(l_ki), with scores l_ki = w_k . v_i / rms(v_i). With g_k the gradient
of h_k, and d_k = g_k . h_k, that of a source v (without its index) is

    sum_k a_k g_k + sum_k (b_k / rms(v)) w_k - (sum_k b_k l_k) / (D rms(v)^2) v,    b_k = a_k (g_k . v - d_k).

So it takes g_k, which all sources of step k share, and two numbers of each token and step. XLA's code for jax's own
derivatives reads every g_k twice, for g_k . v and for the sum. Therefore the results of this operation take *parts* of
gradients as their gradients: what reads the source (`seqmodels/depth/attnres_fused.py`) returns g_k as the gradient of
the source, a_k as that of the score, and d_k as that of `marks`, which are zero and are there for nothing else.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from seqmodels.kernels import dispatch
from seqmodels.kernels.attn_residual import mosaic_gpu, reference
from seqmodels.kernels.axes import TOKENS, Layout

BACKENDS = {"reference": reference, "mosaic_gpu": mosaic_gpu}
WINNERS = {"default": ("reference",)}  # a model takes plain sums (scored.py) unless the kernel is named
IMPLEMENTATIONS = tuple(BACKENDS)

choose = functools.partial(dispatch.choose, "attn_residual", BACKENDS, WINNERS)


def axes(*, vectors: Any, **others: object) -> Layout:
    """Logical axes of the arrays and results of `attn_residual`: each token is by itself, and stays whole."""
    row, scores = (*TOKENS, None), (None, *TOKENS)
    arrays = dict(value=row, mean_square=TOKENS, vectors=(None, None))
    return Layout(arrays, (*[row] * vectors.shape[0], scores, scores))


def attn_residual(
    value: jax.Array,
    mean_square: jax.Array,
    vectors: jax.Array,
    *,
    eps: float,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """The source for each step that will read it. Gradients of the results are the parts said above.

    Args:
        value: [B, T, D] v.
        mean_square: [B, T] float32, of v before it was rounded. Its gradient is part of v's, and zero here.
        vectors: [K, D] w_k in the dtype of v: the query of each step times the scale of its norm.
        eps: added to the mean square, at least 0.
        implementation: one of `IMPLEMENTATIONS`, for the gradient. None: the fastest that supports the call.

    Returns:
        K times v [B, T, D], for each step; l [K, B, T] and marks [K, B, T], float32 (float64 for float64 sources).

    Raises:
        UnsupportedError: the named implementation is unknown or does not support the call.
        ValueError: shapes or dtypes do not fit.
    """
    arrays = dict(value=value, mean_square=mean_square, vectors=vectors)
    check(**arrays)
    facts = dict(shape=(*value.shape, len(vectors)), dtype=value.dtype)

    def call(backend: Any, arrays: dict[str, Any]) -> tuple[jax.Array, ...]:
        return backend.attn_residual(**arrays, eps=eps)

    return dispatch.dispatch("attn_residual", BACKENDS, WINNERS, implementation, facts, call, arrays)


def check(value: jax.Array, **others: jax.Array) -> None:
    """Raise a ValueError unless the arguments fit together."""
    if value.ndim != 3 or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"attn_residual: value is {value.dtype}{list(value.shape)}; allowed: numbers [B, T, D]")
    batch, length, width = value.shape
    steps = others["vectors"].shape[0] if others["vectors"].ndim else 0
    want = dict(
        mean_square=((batch, length), jnp.result_type(value, jnp.float32)),
        vectors=((max(steps, 1), width), value.dtype),
    )
    for name, (shape, dtype) in want.items():
        if (x := others[name]).shape != shape or x.dtype != dtype:
            allowed = f"allowed with value {value.dtype}{list(value.shape)}: {dtype}{list(shape)}"
            raise ValueError(f"attn_residual: {name} is {x.dtype}{list(x.shape)}; {allowed}")
