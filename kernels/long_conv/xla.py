"""The long convolution in plain XLA: halves of halves, each by a fast Fourier transform.

A block of 2 h tokens is two halves of h tokens. What the first half adds to the second is a convolution of h tokens
with 2 h taps, whose h outputs come from one transform of 2 h points. What each half adds to itself is found in the same
way, down to blocks of BLOCK tokens, whose taps are few enough to be summed one by one. So a level costs a transform of
all T tokens, and there are log2(T / BLOCK) levels, where one transform of 2 T points would do for the bare sum. For
this price

- nothing of a later token enters an earlier one, not even by rounding;
- documents are exact: of the first half only the document at the border counts, and only for its tokens in the second.
  They are selected, so that what is not finite stays in its document;
- memory is that of some arrays [B, T, E] a level; nothing is quadratic in T.
"""

import functools

import jax
import jax.numpy as jnp

from seqmodels.kernels.arrays import pad, round_up

BLOCK = 32


def supports(**facts: object) -> str | None:
    """Supports every call on every platform."""
    return None


def long_conv(x: jax.Array, weight: jax.Array, document: jax.Array | None) -> jax.Array:
    """As `kernels.long_conv.reference.long_conv`."""
    y = _within_blocks(x, weight, document)
    half = BLOCK
    while half < x.shape[1]:
        y = y + _into_second_half(half, x, weight, document)
        half *= 2
    return y


def _blocks(x: jax.Array, size: int, fill: int = 0) -> jax.Array:
    """[B, T, ...] as [B, T / size, size, ...], with `fill` behind the end."""
    x = pad(x, {1: round_up(x.shape[1], size)}, fill)
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])


def _within_blocks(x: jax.Array, weight: jax.Array, document: jax.Array | None) -> jax.Array:
    """What the tokens of each block add to this block, tap by tap: [B, T, E]."""
    place, count = jnp.arange(x.shape[1]) % BLOCK, min(BLOCK, len(weight))

    @jax.checkpoint
    def add(y, tap):
        k, w = tap
        same = jnp.broadcast_to(place >= k, x.shape[:2])
        if document is not None:
            same = same & (document == jnp.roll(document, k, axis=1))
        return y + w * jnp.where(same[..., None], jnp.roll(x, k, axis=1), 0), None

    return jax.lax.scan(add, weight[0] * x, (jnp.arange(1, count), weight[1:count]))[0]


# The transforms are computed again in the backward pass: they are larger than x.
@functools.partial(jax.checkpoint, static_argnums=(0,))
def _into_second_half(half: int, x: jax.Array, weight: jax.Array, document: jax.Array | None) -> jax.Array:
    """What the first `half` tokens of each block of twice as many add to the others: [B, T, E], zero for the first."""
    size, (batch, length, channels) = 2 * half, x.shape
    first, border = _blocks(x, size)[:, :, :half], None
    if document is not None:
        numbers = _blocks(document, size, -1)
        border = (numbers == numbers[:, :, half : half + 1])[..., None]
        first = jnp.where(border[:, :, :half], first, 0)
    taps = pad(weight[:size], {0: size})
    spectrum = jnp.fft.rfft(first, size, axis=2) * jnp.fft.rfft(taps, axis=0)
    second = jnp.fft.irfft(spectrum, size, axis=2)[:, :, half:]
    if border is not None:
        second = jnp.where(border[:, :, half:], second, 0)
    y = jnp.concatenate([jnp.zeros_like(second), second], axis=2)
    return y.reshape(batch, -1, channels)[:, :length]
