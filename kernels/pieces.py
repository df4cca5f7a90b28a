"""Pieces of time that are processed in parallel: the state before each piece, from the map that each piece applies.

A piece maps the state before it to factor * state + added. `added` is the state after the piece if it starts from zero.
If a document begins in the piece, the state before it is dropped, whatever it holds: the piece is `fresh`.
"""

import jax
import jax.numpy as jnp

from seqmodels.kernels.segments import forget


def chain(
    factors: jax.Array, added: jax.Array, state: jax.Array, fresh: jax.Array | None = None, reverse: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The state before each piece, and the state after the last piece.

    With `reverse` time runs backwards: the state after each piece, and the state before the first piece.

    Args:
        factors, added: [S, ...] for S pieces; axes of size one are broadcast. The factor of a fresh piece is finite.
        state: [...] before the first piece (with `reverse`, after the last).
        fresh: [S, B] bool, B the first axis of the state: pieces that drop the state. None: none does.

    Returns:
        [S, ...] and [...].
    """

    def step(state, piece):
        factor, added, fresh = piece
        return factor * forget(state, fresh) + added, state

    last, before = jax.lax.scan(step, state, (factors, added, fresh), reverse=reverse)
    return before, last


def chain_unrolled(
    factors: jax.Array, added: jax.Array, state: jax.Array, fresh: jax.Array | None = None, reverse: bool = False
) -> jax.Array:
    """The first result of `chain` for the few pieces of one device. Pieces are the second axis, [B, S, ...]."""
    pieces = added.shape[1]
    states, order = [state], range(pieces - 1)
    for piece in (pieces - 1 - i for i in order) if reverse else order:
        kept = forget(states[-1], None if fresh is None else fresh[:, piece])
        states.append(factors[:, piece] * kept + added[:, piece])
    return jnp.stack(states[::-1] if reverse else states, axis=1)
