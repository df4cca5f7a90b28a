"""Decays in the form that the kernels read: for each chunk a few vectors over its tokens.

All decays are computed from sums of log2 decays inside one chunk, so no sum is over more than 64 tokens. The beginning
of a document is represented by a decay too small for float32: 2^-200 is exactly 0. Its exponent is finite, so it causes
no NaN in any gradient.
"""

import math

import jax.numpy as jnp
from jax import Array, lax

from seqmodels.kernels.finite import finite_or_zero
from seqmodels.kernels.lanes import LOG2E
from seqmodels.kernels.pieces import chain_unrolled
from seqmodels.kernels.tensor_cores import SIDE

FORGET = -200.0  # log2 of a decay that is 0 in float32
LEAST = -150.0  # least log2 of any other decay: also 0 in float32, and sums over a chunk are accurate to a thousandth


def exponents(log_decay: Array | None, reset: Array | None, shape: tuple[int, int, int], length: int) -> Array:
    """Log2 decays by chunk: [B, H, T' / 64, 64] float32, with T' = length and zeros after T.

    Args:
        log_decay: [B, T, H] float32, or None. reset: [B, T] bool, where documents begin, or None. shape: (B, T, H).
    """
    batch, tokens, heads = shape
    g = jnp.zeros(shape) if log_decay is None else jnp.maximum(log_decay * LOG2E, LEAST)
    if reset is not None:
        g = jnp.where(reset[..., None], FORGET, g)
    g = jnp.pad(jnp.swapaxes(g, 1, 2), ((0, 0), (0, 0), (0, length - tokens)))
    return g.reshape(batch, heads, length // SIDE, SIDE)


def vectors(g: Array, scale: float, strict: bool) -> tuple[Array, Array]:
    """The argument `vectors` of `walk`, for the forward and the backward direction.

    Args:
        g: [B, H, N, 64], result of `exponents`. scale: of the readout, above 0. strict: token t reads before it decays.

    Returns:
        Two arrays [B, H, N, 5, 64] float32: row, column, rin, wout, keep.
    """
    triangle = jnp.tril(jnp.ones((SIDE, SIDE)))
    write = total(triangle, g)  # log2 of the decay from before the chunk to after token t
    read = write
    if strict:  # a document's first token reads before its own decay, but must not see the document before
        read = jnp.pad(write[..., :-1], ((0, 0),) * 3 + ((1, 0),)) + jnp.where(g == FORGET, FORGET, 0)
    read = read + math.log2(scale)
    end = write[..., -1:]
    rin, wout = jnp.exp2(read), jnp.exp2(end - write)
    keep = jnp.broadcast_to(jnp.exp2(end), g.shape)
    return jnp.stack([read, write, rin, wout, keep], -2), jnp.stack([-write, -read, wout, rin, keep], -2)


def spoilt_reads(vectors: Array, spoilt: Array | None) -> Array:
    """`vectors` [B, H, N, 5, 64] with which the outputs of the `spoilt` tokens, [B, N, 64] bool or None, are NaN."""
    if spoilt is None:
        return vectors
    reads = jnp.array([True, False, True, False, False])[:, None]  # row and rin
    return jnp.where(spoilt[:, None, :, None] & reads, jnp.nan, vectors)


def total(matrix: Array, x: Array) -> Array:
    """sum_j matrix[i, j] x[..., j] in float32."""
    return jnp.einsum("ij,...j->...i", matrix, x, precision=lax.Precision.HIGHEST)


def gradient(sums: Array, keep: Array, strict: bool) -> Array:
    """Gradient of the log decays: [B, H, N, 64], for natural logarithms.

    The decay of token t scales the contributions of the chunk's tokens before t, and of the state before the chunk. It
    scales their contributions to the reads from token t on (with `strict`, after t) and to the state after the chunk.

    Args:
        sums: [K / 64, B, H, N, 4, 64], result of `keys_gradient`. keep: [B, H, N, 64].
    """
    *of_tokens, corner = jnp.moveaxis(jnp.sum(sums, axis=0), -2, 0)
    read, near, far = (finite_or_zero(x) for x in of_tokens)
    ones = jnp.ones((SIDE, SIDE))
    later, after, before = jnp.triu(ones), jnp.triu(ones, 1), jnp.tril(ones, -1)
    through = jnp.where(keep[..., :1] == 0, 0, keep[..., :1] * jnp.sum(corner, axis=-1, keepdims=True))
    return total(after if strict else later, read) - total(later, near) + total(before, far) + through


def starts(initial_state: Array, ends: Array, g: Array, pieces: int, reverse: bool = False) -> Array:
    """The state before (with `reverse`, after) each stretch of time: [B, S, H, K, V] float32.

    Args:
        initial_state: [B, H, K, V] before the first (with `reverse`, after the last) stretch.
        ends: [B, S, H, K, V], the state after (with `reverse`, before) each stretch from a start of zeros.
        g: [B, H, N, 64], result of `exponents`. pieces: S.
    """
    batch, heads = g.shape[:2]
    g = g.reshape(batch, heads, pieces, -1)
    kept = jnp.swapaxes(jnp.exp2(jnp.sum(g, axis=-1)), 1, 2)[..., None, None]
    return chain_unrolled(kept, ends, initial_state, jnp.any(g == FORGET, axis=(1, 3)), reverse)
