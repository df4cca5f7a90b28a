"""Softmax attention written out: the definition that every other backend is tested against."""

import jax
import jax.numpy as jnp

from seqmodels.kernels.attention.arguments import Inputs, Options, Tokens
from seqmodels.kernels.attention.visible import visible


def supports(platform: str, **facts: object) -> str | None:
    """Why this backend cannot serve the call; None: it can (it always can)."""
    return None


def attention(inputs: Inputs, tokens: Tokens, options: Options) -> jax.Array:
    """See `kernels.attention.attention`. Computes in float32, or float64 if an argument is."""
    q, k, v, bias_weights, *_ = inputs
    batch, queries, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    dtype = inputs.accumulator
    heads_by_key = q.astype(dtype).reshape(batch, queries, kv_heads, heads // kv_heads, width)
    products = jnp.einsum("btngd,bsnd->bngts", heads_by_key, k.astype(dtype), precision="highest")
    i = jnp.asarray(tokens.queries(queries).position)[:, :, None]
    j = jnp.asarray(tokens.keys(keys).position)[:, None, :]
    gates, key_gates = (_by_head(x, kv_heads) for x in (inputs.gates, inputs.key_gates))
    scores = options.scores(products, i, j, gates, key_gates, bias_weights)
    seen = visible((queries, keys), options.mask, tokens)
    seen = jnp.ones((1, queries, keys), bool) if seen is None else seen
    seen = seen[:, None, None]  # [B, 1, 1, T, S]
    highest = jnp.max(scores, axis=-1, keepdims=True, where=seen, initial=jnp.finfo(dtype).min)
    shifted = jnp.where(seen, scores - jax.lax.stop_gradient(highest), 0)
    weights = jnp.where(seen, jnp.exp(shifted), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = jnp.where(seen, weights / jnp.where(total > 0, total, 1), 0)  # a query that sees no key gets zero
    o = jnp.einsum("bngts,bsnd->btngd", weights, v.astype(dtype), precision="highest")
    return o.reshape(q.shape).astype(q.dtype)


def _by_head(gates: jax.Array | None, kv_heads: int) -> jax.Array | None:
    """Gates [B, T, H] as [B, Hkv, H / Hkv, T]."""
    if gates is None:
        return None
    batch, length, heads = gates.shape
    return jnp.moveaxis(gates.reshape(batch, length, kv_heads, heads // kv_heads), 1, -1)
