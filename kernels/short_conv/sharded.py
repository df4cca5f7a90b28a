"""The short convolution with time split over devices, for use inside `jax.shard_map`.

A piece of time needs the W - 1 real inputs before it. Each device gathers the last real inputs of all pieces and
combines those of the pieces before its own. A piece may hold fewer than W - 1 real tokens, or none, and a document may
begin inside it. The convolution of the piece starts from the combined inputs. Cost on each of S devices: a gather of
S (W - 1) rows. This is a few per cent of what the device reads for a piece of thousands of tokens.
"""

import jax
import jax.numpy as jnp

from seqmodels.kernels import short_conv as op
from seqmodels.kernels.segments import resets, segment_before


def short_conv(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    axis: str | tuple[str, ...],
    activation: str | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    initial_segment: jax.Array | None = None,
    mask: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As `kernels.short_conv.short_conv` of the whole time; x, segment_ids and mask hold this device's piece of it.

    Args:
        axis: mesh axis (or axes) that time is split over. Pieces follow the order of the axis and have equal lengths.
        initial_state, initial_segment: state and segment before the first piece, the same on every device.
        implementation: implementation of the convolution of each piece.

    Returns:
        y of this device's piece, and the state after the last piece, the same on every device. The enclosing shard_map
        needs check_vma=False. It sums the gradients of arguments that are the same on every device.
    """
    rows = weight.shape[0] - 1
    dtype = jnp.result_type(x, weight, jnp.float32)
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], rows, x.shape[2]), dtype)
    if segment_ids is not None:
        initial_segment = segment_before(segment_ids, initial_segment, mask, axis)
    documents = dict(segment_ids=segment_ids, initial_segment=initial_segment, mask=mask)
    pieces = jax.lax.all_gather(_last_inputs(x, rows, **documents), axis)

    def follow(history, piece):
        own, count, begins = piece
        places = count[:, None] + jnp.arange(rows)
        kept = jnp.take_along_axis(jnp.pad(history, ((0, 0), (0, rows), (0, 0))), places[..., None], axis=1)
        return jnp.where(begins[:, None, None], 0, kept) + own.astype(dtype), history

    end, starts = jax.lax.scan(follow, initial_state.astype(dtype), pieces)
    y, _ = op.short_conv(
        x,
        weight,
        bias,
        activation=activation,
        initial_state=starts[jax.lax.axis_index(axis)],
        implementation=implementation,
        **documents,
    )
    return y, end


def _last_inputs(x, rows, segment_ids, initial_segment, mask):
    """The piece's last real inputs of its last document.

    Returns:
        The inputs [B, W - 1, E], newest last, padded with zeros; their number [B]; and whether their document began in
        this piece [B].
    """
    reset = resets(segment_ids, initial_segment, mask)
    reset = jnp.zeros(x.shape[:2], bool) if reset is None else reset
    begins = jnp.any(reset, axis=1)
    if mask is None:  # then they are the last tokens
        x, reset = x[:, -rows:], reset[:, -rows:]
        mask = jnp.ones(x.shape[:2], bool)
    place = rows - jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1]  # of a real token among the last W - 1 ones
    later_reset = jnp.cumsum(reset[:, ::-1], axis=1)[:, ::-1] - reset
    kept = mask & (place >= 0) & (later_reset == 0)
    chosen = kept[:, None] & (place[:, None] == jnp.arange(rows)[:, None])  # [B, W - 1, T]
    place = jnp.argmax(chosen, axis=-1)  # a product with zeros and ones would spread what is not finite
    inputs = jnp.take_along_axis(x, place[..., None], axis=1)
    inputs = jnp.where(jnp.any(chosen, axis=-1)[..., None], inputs, 0)
    return inputs, jnp.sum(kept, axis=1), begins
