"""The definition of the delta rule: one token after the other, in float64 if an argument is float64."""

import jax
import jax.numpy as jnp


def supports(**facts: object) -> str | None:
    """Supports every call, slowly."""
    return None


def delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    a: jax.Array | None,
    b: jax.Array,
    log_decay: jax.Array | None,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    initial_segment: jax.Array | None,
    mask: jax.Array | None,
    *,
    scale: float,
    read: str,
    chunk: int | None,
) -> tuple[jax.Array, jax.Array]:
    """As `kernels.delta_rule.delta_rule`, with padding set to zero.

    log_decay is zero on padding, too, so the mask matters only for the segment_ids.
    """
    batch, length, heads, _ = v.shape
    a = k if a is None else a
    accumulator = jnp.result_type(q, k, v, a, b, jnp.float32)
    if log_decay is None:
        log_decay = jnp.zeros((batch, length, heads), accumulator)
    decay = jnp.exp(log_decay if log_decay.ndim == 4 else log_decay[..., None])
    if segment_ids is None:
        segment_ids = jnp.zeros((batch, length), jnp.int32)
    if mask is None:
        mask = jnp.ones((batch, length), bool)
    q, k, a, b = (jnp.repeat(x.astype(accumulator), heads // x.shape[2], axis=2) for x in (q, k, a, b))

    def step(carry, token):
        state, segment, known = carry
        q, k, v, a, b, decay, new_segment, real = token
        kept = ~known | (segment == new_segment)
        old = jnp.where(kept[:, None, None, None], state, 0)
        seen = jnp.einsum("bhk,bhkv->bhv", b, old, precision="highest")
        new = decay[..., None] * old - a[..., None] * seen[..., None, :] + k[..., None] * v[..., None, :]
        y = scale * jnp.einsum("bhk,bhkv->bhv", q, new if read == "inclusive" else old, precision="highest")
        state = jnp.where(real[:, None, None, None], new, state)
        return (state, jnp.where(real, new_segment, segment), known | real), y

    known = jnp.full((batch,), initial_segment is not None)
    segment = jnp.zeros((batch,), jnp.int32) if initial_segment is None else initial_segment
    tokens = (q, k, v.astype(accumulator), a, b, decay, segment_ids, mask)
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    (state, _, _), y = jax.lax.scan(step, (initial_state.astype(accumulator), segment, known), tokens)
    return jnp.moveaxis(y, 0, 1).astype(v.dtype), state
