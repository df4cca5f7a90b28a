"""Time in pieces that are worked on at once: states before each, from what each piece does to a state.

A piece maps the state before it to factor * state + added, where `added` is the state after it from a start of zeros.
"""

import jax
import jax.numpy as jnp


def chain(factors: jax.Array, added: jax.Array, state: jax.Array, reverse: bool = False) -> tuple[jax.Array, jax.Array]:
    """The state before each piece [S, ...] (with `reverse`, after it), and that after the last (before the first).

    Args:
        factors, added: [S, ...] of S pieces; sizes of one are broadcast. state: [...] before the first piece (with
            `reverse`, after the last).
    """
    last, before = jax.lax.scan(lambda s, piece: (piece[0] * s + piece[1], s), state, (factors, added), reverse=reverse)
    return before, last


def chain_unrolled(factors: jax.Array, added: jax.Array, state: jax.Array, reverse: bool = False) -> jax.Array:
    """The same for the few pieces of one device, without the last state: pieces are the second axis, [B, S, ...]."""
    pieces = added.shape[1]
    states, order = [state], range(pieces - 1)
    for piece in (pieces - 1 - i for i in order) if reverse else order:
        states.append(factors[:, piece] * states[-1] + added[:, piece])
    return jnp.stack(states[::-1] if reverse else states, axis=1)
