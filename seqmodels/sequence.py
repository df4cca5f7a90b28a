"""Description of a batch's tokens: which are real, and each token's document and position in it."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from seqmodels.kernels.segments import previous_segment, resets


@struct.dataclass
class Sequence:
    """Passed to every mixer beside its input [B, T, D].

    Attributes:
        positions: [B, T] int32, number of real tokens before this one in its document.
        segment_ids: [B, T] int32, document of each token; a change resets the state. None: one document a row.
        mask: [B, T] bool, False on padding. None: every token is real.
        initial_segment: [B] int32, document of the incoming state. None: the document of the first real token.
    """

    positions: jax.Array
    segment_ids: jax.Array | None = None
    mask: jax.Array | None = None
    initial_segment: jax.Array | None = None

    def documents(self) -> dict[str, Any]:
        """The keyword arguments of a kernel that describe packed documents and padding."""
        return dict(segment_ids=self.segment_ids, initial_segment=self.initial_segment, mask=self.mask)


def make_sequence(
    batch: int,
    length: int,
    segment_ids: jax.Array | None = None,
    mask: jax.Array | None = None,
    segment: jax.Array | None = None,
    position: jax.Array | None = None,
) -> tuple[Sequence, jax.Array, jax.Array]:
    """Positions of the tokens, given what came before.

    Args:
        segment_ids, mask: as in `Sequence`.
        segment: [B] int32, document of the last real token so far. None: nothing came before.
        position: [B] int32, number of real tokens of that document so far. None: nothing came before.

    Returns:
        The sequence, and `segment` and `position` after it.

    Raises:
        ValueError: length is 0.
    """
    if not length:
        raise ValueError("the sequence has no tokens: T is 0; allowed: 1 or more")
    real = jnp.ones((batch, length), bool) if mask is None else mask
    before = jnp.zeros((batch,), jnp.int32) if position is None else position
    count = jnp.cumsum(real, axis=1, dtype=jnp.int32) - real  # real tokens before this one in the row
    start = -before[:, None]  # start of the current document, in the same count
    if segment_ids is not None:
        changed = resets(segment_ids, segment, mask)
        assert changed is not None  # it is None only without segment_ids
        start = jax.lax.cummax(jnp.where(changed, count, start), axis=1)
        after = previous_segment(segment_ids, segment, mask)[:, -1]
    else:
        after = jnp.zeros((batch,), jnp.int32) if segment is None else segment
    positions = count - start
    seen = jnp.sum(real, axis=1, dtype=jnp.int32) - jnp.broadcast_to(start, (batch, length))[:, -1]
    return Sequence(positions, segment_ids, mask, segment), after, seen
