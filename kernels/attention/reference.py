"""Softmax attention written out: the definition that every other backend is tested against."""

from typing import Any

import jax
import jax.numpy as jnp

from seqmodels.kernels.attention.visible import visible


def supports(platform: str, **facts: object) -> str | None:
    """Why this backend cannot serve the call; None: it can (it always can)."""
    return None


def attention(q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float, **rules: Any) -> jax.Array:
    """See `kernels.attention.attention`. Computes in float32, or float64 if an argument is."""
    batch, queries, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    dtype = jnp.result_type(q, k, v, jnp.float32)
    grouped = q.astype(dtype).reshape(batch, queries, kv_heads, heads // kv_heads, width)
    scores = scale * jnp.einsum("btngd,bsnd->bngts", grouped, k.astype(dtype), precision="highest")
    seen = visible((queries, keys), **rules)
    seen = jnp.ones((1, queries, keys), bool) if seen is None else seen
    seen = seen[:, None, None]  # [B, 1, 1, T, S]
    highest = jnp.max(scores, axis=-1, keepdims=True, where=seen, initial=jnp.finfo(dtype).min)
    shifted = jnp.where(seen, scores - jax.lax.stop_gradient(highest), 0)
    weights = jnp.where(seen, jnp.exp(shifted), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = jnp.where(seen, weights / jnp.where(total > 0, total, 1), 0)  # a query that sees no key gets zero
    o = jnp.einsum("bngts,bsnd->btngd", weights, v.astype(dtype), precision="highest")
    return o.reshape(q.shape).astype(q.dtype)
