"""Keeps infinity and NaN of one document from the other documents of its row, in operations that are matrix products.

Such a product is a sum over the tokens of several documents, and tokens of other documents have the weight zero. But
zero times infinity is NaN. So the factors are made finite first (`finite_or_zero`), and every result that depends on
what was not finite is made NaN afterwards (`spoil`). Both leave gradients as they are: so neither saves a mask for the
backward pass, and NaN in a gradient is not hidden.
"""

import functools
import math

import jax
import jax.numpy as jnp

from seqmodels.kernels.arrays import expand_to

LOWEST = -1e30  # in place of -inf, the logarithm of a decay of zero; sums over a row stay finite


def finite_decay(log_decay: jax.Array) -> jax.Array:
    """Logarithms of decays with `LOWEST` in place of -inf: a finite number, whose product with zero is zero."""
    return jnp.maximum(log_decay, LOWEST)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def finite_or_zero(x: jax.Array, limit: float = math.inf) -> jax.Array:
    """x, with zeros in place of NaN and of what is not below `limit` in absolute value: infinity by default."""
    return jnp.where(jnp.abs(x) < limit, x, 0)


finite_or_zero.defvjp(lambda x, limit: (finite_or_zero(x, limit), None), lambda limit, _, dy: (dy,))


@jax.custom_vjp
def spoil(x: jax.Array, spoilt: jax.Array) -> jax.Array:
    """x [B, T, ...] (or [B, ...]), with NaN where `spoilt` [B, T] (or [B]) is True."""
    return jnp.where(expand_to(spoilt, x.ndim), jnp.nan, x)


spoil.defvjp(lambda x, spoilt: (spoil(x, spoilt), None), lambda _, dy: (dy, None))


def not_finite(x: jax.Array, limit: float = math.inf) -> jax.Array:
    """[B, T] bool: whether something in a token of x [B, T, ...] is NaN or not below `limit` in absolute value."""
    return jnp.any(~(jnp.abs(x) < limit), axis=range(2, x.ndim))


def spoilt_so_far(bad: jax.Array, reset: jax.Array) -> jax.Array:
    """[B, T] bool: whether a token of the same document, up to and including each token, is `bad` [B, T].

    A document begins where `reset` [B, T] is True.
    """
    count = jnp.cumsum(bad, axis=1, dtype=jnp.int32)
    before = jax.lax.cummax(jnp.where(reset, count - bad, 0), axis=1)  # of the documents before
    return count > before
