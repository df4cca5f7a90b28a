"""Softmax attention by `jax.nn.dot_product_attention`, which stores the scores [B, H, T, S] in memory."""

from typing import Any

import jax
import jax.numpy as jnp

from seqmodels.kernels.attention.visible import visible


def supports(platform: str, **facts: object) -> str | None:
    """Why this backend cannot serve the call; None: it can (it always can)."""
    return None


def attention(q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float, **rules: Any) -> jax.Array:
    """See `kernels.attention.attention`."""
    seen = visible((q.shape[1], k.shape[1]), **rules)
    if seen is None:
        return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="xla")
    o = jax.nn.dot_product_attention(q, k, v, mask=seen[:, None], scale=scale, implementation="xla")
    # jax.nn.dot_product_attention returns the mean of all values for a query that sees no key.
    return jnp.where(jnp.any(seen, axis=-1)[..., None, None], o, 0)
