"""The definition of linear attention: one token after the other, in float64 if an argument is float64."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def supports(**facts: object) -> str | None:
    """Supports every call, slowly."""
    return None


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None,
    bonus: jax.Array | None,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    initial_segment: jax.Array | None,
    mask: jax.Array | None,
    *,
    scale: float,
    read: str,
    chunk: int | None,
    dtype: DTypeLike,
) -> tuple[jax.Array, jax.Array]:
    """As `kernels.linear_attention.linear_attention`, with padding set to zero and the normaliser as a column of v.

    y is in `dtype`. log_decay is zero on padding, too, so the mask matters only for the segment_ids.
    """
    (batch, length, heads, _), keys = v.shape, k.shape[3]
    accumulator = jnp.result_type(q, k, v, jnp.float32)
    if log_decay is None:
        log_decay = jnp.zeros(heads, accumulator)
    if log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay, (batch, length, heads))
    decay = jnp.exp(log_decay if log_decay.ndim == 4 else log_decay[..., None])
    if segment_ids is None:
        segment_ids = jnp.zeros((batch, length), jnp.int32)
    if mask is None:
        mask = jnp.ones((batch, length), bool)
    q, k = (jnp.repeat(x.astype(accumulator), heads // x.shape[2], axis=2) for x in (q, k))
    bonus = jnp.zeros((heads, keys), accumulator) if bonus is None else bonus.astype(accumulator)

    def step(carry, token):
        state, segment, known = carry
        q, k, v, decay, new_segment, real = token
        kept = ~known | (segment == new_segment)
        old = jnp.where(kept[:, None, None, None], state, 0)
        write = k[..., None] * v[..., None, :]
        new = decay[..., None] * old + write
        seen = new if read == "inclusive" else old + bonus[..., None] * write
        y = scale * jnp.einsum("bhk,bhkv->bhv", q, seen, precision="highest")
        state = jnp.where(real[:, None, None, None], new, state)
        return (state, jnp.where(real, new_segment, segment), known | real), y

    known = jnp.full((batch,), initial_segment is not None)
    segment = jnp.zeros((batch,), jnp.int32) if initial_segment is None else initial_segment
    tokens = (q, k, v.astype(accumulator), decay, segment_ids, mask)
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    (state, _, _), y = jax.lax.scan(step, (initial_state.astype(accumulator), segment, known), tokens)
    return jnp.moveaxis(y, 0, 1).astype(dtype), state
