"""Token shift (Peng et al. 2023, arXiv 2305.13048, section 3.1.1): each token is mixed with the one before it."""

import jax
import jax.numpy as jnp

from seqmodels.layers.parameter import Init
from seqmodels.parallel import short_conv
from seqmodels.sequence import Sequence


def token_shift(
    x: jax.Array, last: jax.Array, seq: Sequence, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """The real token before each one in its document, [B, T, D] in the dtype of x; zero before the first.

    It is a short convolution over two tokens, which knows documents, padding and devices.

    Args:
        x: [B, T, D], zero on padding.
        last: [B, 1, D] float32, the last real token before x.
        implementation: of `short_conv`.

    Returns:
        The tokens before, and the last real token of x, [B, 1, D] float32.
    """
    before = jnp.zeros((2, x.shape[2]), jnp.float32).at[0].set(1)
    return short_conv(x, before, initial_state=last, implementation=implementation, **seq.documents())


def mix(x: jax.Array, before: jax.Array, share: jax.Array) -> jax.Array:
    """share x_t + (1 - share) x_{t-1}, with `share` [D] of x and `before` [B, T, D]."""
    return before + share * (x - before)


def ramp(power: float, added: float = 0.0) -> Init:
    """Fresh shares: (i / D)^power + added in channel i of D, as in the authors' code. Low powers look less back."""
    return lambda key, shape, dtype=jnp.float32: (jnp.arange(shape[0], dtype=dtype) / shape[0]) ** power + added
