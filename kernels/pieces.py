"""Pieces of time that are processed in parallel: the state before each piece, from the map that each piece applies.

A piece maps the state before it to factor * state + added. `added` is the state after the piece if it starts from zero.
"""

import jax
import jax.numpy as jnp


def chain(factors: jax.Array, added: jax.Array, state: jax.Array, reverse: bool = False) -> tuple[jax.Array, jax.Array]:
    """The state before each piece, and the state after the last piece.

    With `reverse` time runs backwards: the state after each piece, and the state before the first piece.

    Args:
        factors, added: [S, ...] for S pieces; axes of size one are broadcast.
        state: [...] before the first piece (with `reverse`, after the last).

    Returns:
        [S, ...] and [...].
    """
    last, before = jax.lax.scan(lambda s, piece: (piece[0] * s + piece[1], s), state, (factors, added), reverse=reverse)
    return before, last


def chain_unrolled(factors: jax.Array, added: jax.Array, state: jax.Array, reverse: bool = False) -> jax.Array:
    """The first result of `chain` for the few pieces of one device. Pieces are the second axis, [B, S, ...]."""
    pieces = added.shape[1]
    states, order = [state], range(pieces - 1)
    for piece in (pieces - 1 - i for i in order) if reverse else order:
        states.append(factors[:, piece] * states[-1] + added[:, piece])
    return jnp.stack(states[::-1] if reverse else states, axis=1)
