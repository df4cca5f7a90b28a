"""Sums and products of streams [B, T, D], for connections whose cost is the bytes that they move.

A stream is kept in the model's dtype, sums are float32, and each is written out so that XLA computes it in one pass
over the streams. (benchmarks/notes/depth.md)
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def stored(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """x in `dtype`, in memory too, and so is its gradient: XLA would keep it as the float32 that it was made of."""
    return jax.lax.optimization_barrier(x.astype(dtype))


def combined(weights: Sequence[jax.Array] | jax.Array, streams: Sequence[jax.Array]) -> jax.Array:
    """sum_i weights_i streams_i, [B, T, D] float32, of n weights [B, T] and n streams [B, T, D]."""
    return sum(w[..., None] * x.astype(jnp.float32) for w, x in zip(weights, streams, strict=True))


@jax.custom_vjp
def products(streams: tuple[jax.Array, ...], matrices: jax.Array) -> jax.Array:
    """sum_i streams_i matrices_i, [k, B, T] float32, of n streams [B, T, D] and matrices [n, D, k] of their dtype.

    The backward pass takes the gradient in the dtype of the streams, as a matrix product in this dtype does.
    """
    pairs = zip(streams, matrices, strict=True)
    return jnp.moveaxis(
        sum(jnp.einsum("btd,dk->btk", x, W, preferred_element_type=jnp.float32) for x, W in pairs), -1, 0
    )


def _products_forward(streams, matrices):
    return products(streams, matrices), (streams, matrices)


def _products_backward(kept, d):
    streams, matrices = kept
    d = jnp.moveaxis(d, 0, -1).astype(matrices.dtype)
    outs, moves = [jnp.einsum("btk,dk->btd", d, W) for W in matrices], []
    for x in streams:
        moves.append(jnp.einsum("btd,btk->dk", x, d, preferred_element_type=jnp.float32))
        d = jax.lax.optimization_barrier(d)  # or XLA would copy the streams into one, for one product
    return tuple(outs), jnp.stack(moves).astype(matrices.dtype)


products.defvjp(_products_forward, _products_backward)


def mean_square(streams: Sequence[jax.Array]) -> jax.Array:
    """[B, T] float32, mean of the squares of n streams [B, T, D]."""
    return jnp.mean(sum(jnp.square(x.astype(jnp.float32)) for x in streams), axis=-1) / len(streams)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def added(
    streams: tuple[jax.Array, ...], weights: jax.Array, y: jax.Array, dtype: DTypeLike
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """streams_i + weights_i y, kept in `dtype`, and the mean of their squares [B, T], which has no gradient here.

    The gradients of y and the weights [n, B, T] are taken of the streams' gradient before it goes to memory, so XLA can
    compute them in the kernel that writes it.

    Args:
        streams, y: [B, T, D] float32.
    """
    values = [x + w[..., None] * y for x, w in zip(streams, weights, strict=True)]
    return tuple(stored(x, dtype) for x in values), mean_square(values)


def _added_forward(streams, weights, y, dtype):
    return added(streams, weights, y, dtype), (weights, y)


def _added_backward(dtype, kept, gradients):
    weights, y = kept
    wide = [d.astype(jnp.float32) for d in gradients[0]]
    outs = tuple(stored(d, dtype).astype(jnp.float32) for d in gradients[0])
    return outs, jnp.stack([jnp.sum(d * y, axis=-1) for d in wide]), combined(weights, wide)


added.defvjp(_added_forward, _added_backward)


@jax.custom_vjp
def known_mean_square(streams: tuple[jax.Array, ...], known: jax.Array) -> jax.Array:
    """`known` [B, T], with the gradient of `mean_square(streams)` in the streams.

    So it can be computed of what is about to be stored, when nothing needs to be read, and its gradient is added to the
    others where these are.
    """
    return known


def _known_forward(streams, known):
    return known, streams


def _known_backward(streams, d):
    scale = (2 * d / (len(streams) * streams[0].shape[-1]))[..., None]
    return tuple((scale * x.astype(jnp.float32)).astype(x.dtype) for x in streams), jnp.zeros_like(d)


known_mean_square.defvjp(_known_forward, _known_backward)
