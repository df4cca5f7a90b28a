"""DenseSSM's RANK and CARRY: at every token, other layers write into one layer's state.

Both are ablations of READ, which needs only `selective_scan`. Plain XLA: chunks of time run under `jax.checkpoint`, so
that states are kept only at chunk boundaries.
"""

import jax
import jax.numpy as jnp

from seqmodels.kernels.arrays import join_time, split_time, zero_padding
from seqmodels.kernels.segments import forget, resets
from seqmodels.kernels.selective_scan import xla


def _chunked(body, state, tokens, reset, length):
    """Scan `body(state, tokens, reset) -> (state, y)` over chunks of time. The backward pass recomputes each chunk."""
    chunks = split_time((tokens, reset), min(xla.CHUNK["default"], length), time_first=True)
    state, y = jax.lax.scan(lambda state, chunk: jax.checkpoint(body)(state, *chunk), state, chunks)
    return state, join_time(y, length, time_first=True)


def _recurrence(decay, write, state, reset):
    """s_t = decay_t s_{t-1} + write_t over the leading axis, from zero at a reset [T, B] (or None).

    Sequential on CPU, associative elsewhere.
    """

    def sequential(decay, write, state, reset):
        def step(state, token):
            decay, write, reset = token
            state = decay * forget(state, reset) + write
            return state, state

        return jax.lax.scan(step, state, (decay, write, reset))[1]

    return jax.lax.platform_dependent(decay, write, state, reset, cpu=sequential, default=xla.linear_recurrence)


def rank_scan(
    dt: jax.Array,
    A: jax.Array,
    writes: jax.Array,
    B: jax.Array,
    C: jax.Array,
    state: jax.Array,
    segment_ids: jax.Array | None = None,
    initial_segment: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """A state written by several layers: s_t = exp(dt_t A) s_{t-1} + sum_g writes_{t,g} B_{t,g}, y_t = s_t C_t.

    Args:
        dt: [B, T, E] step, after softplus.
        A: [E, N] float32, negative.
        writes: [B, T, G, E] what each layer writes (its dt u), gated.
        B: [B, T, G, N] keys of the writes.
        C: [B, T, N].
        state: [B, E, N] float32.
        segment_ids, initial_segment, mask: as in `selective_scan`.

    Returns:
        y [B, T, E] float32 and the final state.
    """
    dtype = state.dtype
    dt, writes, B, C = (zero_padding(x, mask).astype(dtype) for x in (dt, writes, B, C))

    def body(state, tokens, reset):
        dt, writes, B, C = tokens
        written = jnp.einsum("tbge,tbgn->tbne", writes, B, precision="highest")
        states = _recurrence(xla._decay(dt, A.T), written, state, reset)
        return states[-1], jnp.einsum("tbne,tbn->tbe", states, C, precision="highest")

    reset = resets(segment_ids, initial_segment, mask)
    state, y = _chunked(body, jnp.swapaxes(state, 1, 2), (dt, writes, B, C), reset, dt.shape[1])
    return zero_padding(y, mask), jnp.swapaxes(state, 1, 2)


def carry_scan(
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    gate_channel: jax.Array,
    gate_state: jax.Array,
    projection: jax.Array | None,
    state: jax.Array,
    carried: jax.Array,
    segment_ids: jax.Array | None = None,
    initial_segment: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Fused states carried in time: h_t = exp(dt A) h_{t-1} + (dt u) B + g_t * sum_i P s^i_t, y_t = h_t C_t.

    The states s^i of the other layers are the unfused ones (groups 1..G-1; group 0 is this layer). By linearity
    h = s^0 + c, where c_t = exp(dt A) c_{t-1} + g_t * sum_i P s^i_t is what the other layers have added.

    Args:
        u, dt: [B, T, G, E] input, and step after softplus.
        A: [G, E, N] float32, negative.
        B: [B, T, G, N].
        C: [B, T, N].
        gate_channel: [B, T, S, E], S = 1 (shared) or G - 1.
        gate_state: [B, T, S, N].
        projection: [N, N] P, or None for the identity.
        state: [B, G, E, N] float32, unfused states.
        carried: [B, E, N] float32, c.
        segment_ids, initial_segment, mask: as in `selective_scan`.

    Returns:
        y [B, T, E] float32, the final unfused state [B, E, N] of group 0, and the final c [B, E, N].
    """
    tokens = (u, dt, B, C, gate_channel, gate_state)
    u, dt, B, C, gate_channel, gate_state = (zero_padding(x, mask).astype(state.dtype) for x in tokens)
    A = jnp.swapaxes(A, 1, 2)

    def body(states, tokens, reset):
        state, carried = states
        u, dt, B, C, gate_channel, gate_state = tokens
        decay = xla._decay(dt, A)
        unfused = _recurrence(decay, xla._write(u, dt, B), state, reset)
        others = unfused[:, :, 1:]
        if projection is not None:
            others = jnp.einsum("nk,tbgke->tbgne", projection, others, precision="highest")
        added = jnp.sum(gate_channel[..., None, :] * gate_state[..., None] * others, axis=2)
        extra = _recurrence(decay[:, :, 0], added, carried, reset)
        y = jnp.einsum("tbne,tbn->tbe", unfused[:, :, 0] + extra, C, precision="highest")
        return (unfused[-1], extra[-1]), y

    reset = resets(segment_ids, initial_segment, mask)
    states = (jnp.swapaxes(state, 2, 3), jnp.swapaxes(carried, 1, 2))
    (state, carried), y = _chunked(body, states, (u, dt, B, C, gate_channel, gate_state), reset, u.shape[1])
    return zero_padding(y, mask), jnp.swapaxes(state[:, 0], 1, 2), jnp.swapaxes(carried, 1, 2)
