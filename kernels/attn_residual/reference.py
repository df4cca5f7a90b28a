"""The definition of a source and of its gradient, in float64 if the source is float64."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def supports(**facts: object) -> str | None:
    """Supports every call. XLA reads the gradients of what reads the source twice."""
    return None


def attn_residual(value: jax.Array, mean_square: jax.Array, vectors: jax.Array, *, eps: float) -> tuple[jax.Array, ...]:
    """See `kernels.attn_residual.attn_residual`."""
    return source(gradient, eps, value, mean_square, vectors)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def source(
    gradient: Callable[..., tuple[jax.Array, jax.Array]],
    eps: float,
    value: jax.Array,
    mean_square: jax.Array,
    vectors: jax.Array,
) -> tuple[jax.Array, ...]:
    """The results; `gradient` is the function below, or one like it."""
    return _source_fwd(gradient, eps, value, mean_square, vectors)[0]


def _source_fwd(gradient, eps, value, mean_square, vectors):
    wide = mean_square.dtype
    precision = "highest" if value.dtype == wide else None
    products = jnp.einsum("btd,kd->kbt", value, vectors, precision=precision, preferred_element_type=wide)
    reciprocal = jax.lax.rsqrt(mean_square + eps)
    scores = products * reciprocal
    kept = dict(value=value, scores=scores, reciprocal=reciprocal, vectors=vectors)
    return (*[value] * len(vectors), scores, jnp.zeros_like(scores)), kept


def _source_bwd(gradient, eps, kept, parts):
    *reads, weights, offsets = parts
    value, wide = kept["value"], weights.dtype
    dvalue, dproducts = gradient(**kept, reads=tuple(reads), weights=weights, offsets=offsets)
    precision = "highest" if value.dtype == wide else None
    dvectors = jnp.einsum("kbt,btd->kd", dproducts, value, precision=precision, preferred_element_type=wide)
    return dvalue, jnp.zeros_like(kept["reciprocal"]), dvectors.astype(value.dtype)


source.defvjp(_source_fwd, _source_bwd)


def gradient(
    value: jax.Array,
    scores: jax.Array,
    reciprocal: jax.Array,
    vectors: jax.Array,
    reads: tuple[jax.Array, ...],
    weights: jax.Array,
    offsets: jax.Array,
) -> tuple[Any, Any]:
    """Gradients of the source [B, T, D] and of its products with `vectors` [K, B, T], in the dtype of the source.

    Args:
        value: [B, T, D] v. scores: [K, B, T] l. reciprocal: [B, T], 1 / rms(v). vectors: [K, D] w.
        reads: K arrays [B, T, D], gradients g_k of what the steps have read.
        weights, offsets: [K, B, T], a_k and d_k.
    """
    dtype, wide = value.dtype, weights.dtype
    v = value.astype(wide)
    through = jnp.stack([jnp.sum(g.astype(wide) * v, axis=-1) for g in reads])
    dscores = weights * (through - offsets)
    dproducts = dscores * reciprocal
    total = sum(a[..., None] * g.astype(wide) for a, g in zip(weights, reads, strict=True))
    total += jnp.einsum("kbt,kd->btd", dproducts, vectors.astype(wide), precision="highest")
    norm = jnp.sum(dscores * scores, axis=0) * reciprocal**2 / value.shape[-1]
    return (total - norm[..., None] * v).astype(dtype), dproducts.astype(dtype)
