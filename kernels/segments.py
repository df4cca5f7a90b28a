"""Packed documents and padding, in the form that every kernel uses."""

import jax
import jax.numpy as jnp

from seqmodels.kernels.arrays import expand_to


def previous_segment(segment_ids: jax.Array, initial_segment: jax.Array | None, mask: jax.Array | None) -> jax.Array:
    """Segment of the last real token before each position, and before the end of the sequence.

    Args:
        segment_ids: [B, T] int32.
        initial_segment: [B] int32, segment of the incoming state. None: the segment of the first real token.
        mask: [B, T] bool, False on padding. None: every token is real.

    Returns:
        [B, T + 1] int32; the last column is the segment of the outgoing state.
    """
    batch, length = segment_ids.shape
    if mask is None:
        first = segment_ids[:, :1] if initial_segment is None else initial_segment[:, None]
        return jnp.concatenate([first, segment_ids], axis=1)
    if initial_segment is None:
        first_real = jnp.argmax(mask, axis=1)
        initial_segment = jnp.take_along_axis(segment_ids, first_real[:, None], axis=1)[:, 0]
    last_real = jax.lax.cummax(jnp.where(mask, jnp.arange(1, length + 1), 0), axis=1)
    ids = jnp.concatenate([initial_segment[:, None], segment_ids], axis=1)
    last_real = jnp.concatenate([jnp.zeros((batch, 1), last_real.dtype), last_real], axis=1)
    return jnp.take_along_axis(ids, last_real, axis=1)


def resets(
    segment_ids: jax.Array | None, initial_segment: jax.Array | None, mask: jax.Array | None
) -> jax.Array | None:
    """[B, T] bool: True on a real token whose segment differs from the real token before it. None: no segments."""
    if segment_ids is None:
        return None
    changed = segment_ids != previous_segment(segment_ids, initial_segment, mask)[:, :-1]
    return changed if mask is None else changed & mask


def resets_in_reverse(
    segment_ids: jax.Array | None, initial_segment: jax.Array | None, mask: jax.Array | None
) -> jax.Array | None:
    """As `resets`, if time runs from the last token to the first: initial_segment is that of a state after the last."""
    if segment_ids is None:
        return None
    turned = resets(jnp.flip(segment_ids, 1), initial_segment, None if mask is None else jnp.flip(mask, 1))
    return None if turned is None else jnp.flip(turned, 1)


def forget(state: jax.Array, reset: jax.Array | None) -> jax.Array:
    """`state` [B, ...] (or [T, B, ...]), replaced by zeros where `reset` [B] (or [T, B]) is True.

    A product with zero would keep NaN and infinity, which would reach the next document. None: no resets.
    """
    return state if reset is None else jnp.where(expand_to(reset, state.ndim), 0, state)


def segment_before(
    segment_ids: jax.Array,
    initial_segment: jax.Array | None,
    mask: jax.Array | None,
    axis: str | tuple[str, ...],
    reverse: bool = False,
) -> jax.Array:
    """Segment of the last real token before this device's piece of time. Call it inside shard_map.

    With `reverse` time runs backwards: the segment of the first real token after the piece.

    Args:
        segment_ids, mask: [B, T], this device's piece of time.
        initial_segment: [B] int32, segment of the state before the first piece, or None.
        axis: mesh axis that time is split over, in order.

    Returns:
        [B] int32. If no real token precedes the piece and initial_segment is None, the segment of the piece's own
        first real token.
    """
    if reverse:
        segment_ids, mask = jnp.flip(segment_ids, 1), None if mask is None else jnp.flip(mask, 1)
    around = previous_segment(segment_ids, None, mask)
    real = jnp.ones(segment_ids.shape[:1], bool) if mask is None else jnp.any(mask, axis=1)
    last, real = jax.lax.all_gather((around[:, -1], real), axis)  # [S, B]
    index = jax.lax.axis_index(axis)
    if reverse:
        last, real, index = jnp.flip(last, 0), jnp.flip(real, 0), len(last) - 1 - index
    number = jnp.arange(1, len(last) + 1)[:, None]
    earlier = real & (number <= index)
    ids = jnp.concatenate([around[None, :, 0] if initial_segment is None else initial_segment[None], last])
    return jnp.take_along_axis(ids, jnp.max(jnp.where(earlier, number, 0), axis=0, keepdims=True), axis=0)[0]
