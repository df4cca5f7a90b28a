"""The short convolution with time split over devices, for use inside `jax.shard_map`.

A piece of time needs the W - 1 real inputs before it. Each device sends its own last ones, the pieces' are chained (one
may hold fewer real tokens than W - 1, or none, and a document may begin inside it), and the convolution starts from
there. Cost on each of S devices: a gather of S (W - 1) rows, a few per cent of what its piece reads where that has
thousands.
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
    """As `kernels.short_conv.short_conv` of the whole; x, segment_ids and mask hold this device's piece of time.

    Args:
        axis: mesh axis (or axes) that time is split over, pieces in the order of the axis, all of one length.
        initial_state, initial_segment: what comes before the first piece, the same on every device.
        implementation: of the convolution of each piece.

    Returns:
        y of this device's piece, and the state after the last piece, the same on every device. The enclosing shard_map
        needs check_vma=False; it sums the gradients of what is the same on every device.
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
        [B, W - 1, E], the newest last, zeros where there are none; how many [B]; whether their document began here [B].
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
    x = jnp.where(mask[..., None], x, 0)
    inputs = jnp.einsum("brt,bte->bre", chosen.astype(x.dtype), x, precision="highest")
    return inputs, jnp.sum(kept, axis=1), begins
