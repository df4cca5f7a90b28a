"""The definition of the selective scan: one token after the other, in float64 if the inputs are float64."""

import jax
import jax.numpy as jnp


def supports(**facts: object) -> str | None:
    """Supports every call, slowly."""
    return None


def selective_scan(
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None,
    z: jax.Array | None,
    dt_bias: jax.Array | None,
    weights: jax.Array | None,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    initial_segment: jax.Array | None,
    mask: jax.Array | None,
    dt_softplus: bool,
) -> tuple[jax.Array, jax.Array]:
    """As `kernels.selective_scan.selective_scan`, with the group axis present and padding set to zero."""
    batch, length, groups, width = u.shape
    dtype = jnp.promote_types(jnp.float32, u.dtype)
    if segment_ids is None:
        segment_ids = jnp.zeros((batch, length), jnp.int32)
    if mask is None:
        mask = jnp.ones((batch, length), bool)
    if weights is None:
        weights = jnp.ones((batch, length, 1, width), dtype)
    weights = jnp.broadcast_to(weights, (batch, length, groups - 1, width)) if groups > 1 else weights[:, :, :0]
    weights = jnp.concatenate([jnp.ones((batch, length, 1, width), dtype), weights.astype(dtype)], axis=2)
    dt = dt.astype(dtype) + (0 if dt_bias is None else dt_bias.astype(dtype))
    dt = jax.nn.softplus(dt) if dt_softplus else dt

    def step(carry, token):
        state, segment, known = carry
        u, dt, B, C, w, new_segment, real = token
        kept = ~known | (segment == new_segment)
        old = jnp.where(kept[:, None, None, None], state, 0)
        new = jnp.exp(dt[..., None] * A.astype(dtype)) * old + (dt * u)[..., None] * B[:, :, None, :]
        state = jnp.where(real[:, None, None, None], new, state)
        y = jnp.sum(w * jnp.einsum("bgen,bgn->bge", state, C), axis=1)
        return (state, jnp.where(real, new_segment, segment), known | real), y

    known = jnp.full((batch,), initial_segment is not None)
    segment = jnp.zeros((batch,), jnp.int32) if initial_segment is None else initial_segment
    tokens = (u.astype(dtype), dt, B.astype(dtype), C.astype(dtype), weights, segment_ids, mask)
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    (state, _, _), y = jax.lax.scan(step, (initial_state.astype(dtype), segment, known), tokens)
    y = jnp.moveaxis(y, 0, 1)
    if D is not None:
        y = y + D.astype(dtype) * u[:, :, 0].astype(dtype)
    if z is not None:
        y = y * jax.nn.silu(z.astype(dtype))
    return y.astype(u.dtype), state
