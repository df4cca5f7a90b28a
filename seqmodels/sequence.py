"""Description of a batch's tokens: which are real, and each token's document and position in it."""

import dataclasses
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
        steps: [B, T] float32, time from the token before to this one, 1 being the distance of the tokens in training;
            the first token of a document may have any, usually 1 (`seqmodels.data.times`). None: 1 everywhere.
        rescale: factor of all steps, those that are not given included (`config.model.rescale`).
    """

    positions: jax.Array
    segment_ids: jax.Array | None = None
    mask: jax.Array | None = None
    initial_segment: jax.Array | None = None
    steps: jax.Array | None = None
    rescale: float = struct.field(pytree_node=False, default=1.0)

    def documents(self) -> dict[str, Any]:
        """The keyword arguments of a kernel that describe packed documents and padding."""
        return dict(segment_ids=self.segment_ids, initial_segment=self.initial_segment, mask=self.mask)

    def stretch(self, own: float = 1.0) -> float | jax.Array:
        """The factor of step sizes dt: a number, or [B, T, 1] float32 where tokens differ. `own` is a branch's own."""
        factor = own * self.rescale
        return factor if self.steps is None else factor * self.steps[..., None]


def make_sequence(
    batch: int,
    length: int,
    segment_ids: jax.Array | None = None,
    mask: jax.Array | None = None,
    segment: jax.Array | None = None,
    position: jax.Array | None = None,
    steps: jax.Array | None = None,
    rescale: float = 1.0,
) -> tuple[Sequence, jax.Array, jax.Array]:
    """Positions of the tokens, given what came before.

    Args:
        segment_ids, mask, steps, rescale: as in `Sequence`. Steps of padding may be anything.
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
    if steps is not None:
        steps = jnp.where(real, steps.astype(jnp.float32), 1)  # a NaN of padding would reach the gradient of dt
    return Sequence(positions, segment_ids, mask, segment, steps, rescale), after, seen


def reversed_in_time(seq: Sequence) -> Sequence:
    """The same tokens in reverse order, each document by itself, as a new one without a state.

    The step of a token is now the time to the token after it, and 1 at the last token of a document: what was the
    step of its first token is not used.
    """
    segment_ids, mask = (None if x is None else x[:, ::-1] for x in (seq.segment_ids, seq.mask))
    batch, length = seq.positions.shape
    turned = make_sequence(batch, length, segment_ids, mask, rescale=seq.rescale)[0]
    if seq.steps is None:
        return turned
    steps = token_before(seq.steps[:, ::-1], mask)
    return dataclasses.replace(turned, steps=jnp.where(turned.positions == 0, 1, steps))


def token_before(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """x [B, T] at the last real token before each; the first column where there is none."""
    length = x.shape[1]
    if mask is None:
        return jnp.concatenate([x[:, :1], x[:, :-1]], axis=1)
    last = jax.lax.cummax(jnp.where(mask, jnp.arange(length), 0), axis=1)
    return jnp.take_along_axis(x, jnp.concatenate([jnp.zeros_like(last[:, :1]), last[:, :-1]], axis=1), axis=1)
