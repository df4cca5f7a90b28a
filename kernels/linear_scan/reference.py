"""The definition of the linear scan: one token after the other, in float64 if an argument is float64."""

import jax
import jax.numpy as jnp


def supports(**facts: object) -> str | None:
    """Supports every call, slowly."""
    return None


def linear_scan(
    log_decay: jax.Array,
    x: jax.Array,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    initial_segment: jax.Array | None,
    mask: jax.Array | None,
    *,
    reverse: bool,
) -> tuple[jax.Array, jax.Array]:
    """As `kernels.linear_scan.linear_scan`, with one axis of channels and padding set to zero."""
    batch, length, _ = x.shape
    accumulator = initial_state.dtype
    if segment_ids is None:
        segment_ids = jnp.zeros((batch, length), jnp.int32)
    if mask is None:
        mask = jnp.ones((batch, length), bool)

    def step(carry, token):
        state, segment, known = carry
        decay, x, new_segment, real = token
        kept = ~known | (segment == new_segment)
        new = decay * jnp.where(kept[:, None], state, 0) + x
        state = jnp.where(real[:, None], new, state)
        return (state, jnp.where(real, new_segment, segment), known | real), state

    known = jnp.full((batch,), initial_segment is not None)
    segment = jnp.zeros((batch,), jnp.int32) if initial_segment is None else initial_segment
    tokens = (jnp.exp(log_decay.astype(accumulator)), x.astype(accumulator), segment_ids, mask)
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    (state, _, _), h = jax.lax.scan(step, (initial_state, segment, known), tokens, reverse=reverse)
    return jnp.moveaxis(h, 0, 1).astype(x.dtype), state
