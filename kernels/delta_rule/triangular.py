"""Inverses of unit lower triangular matrices, for the linear systems of the delta rule.

The inverse of [[A, 0], [L, D]] is [[A', 0], [-D' L A', D']] with the inverses A' and D' of the halves. So one function
that inverts both halves together, and calls itself for them, needs log2(C) pairs of matrix products, all in float32. In
contrast to the series 1 - L + L^2 - .., no number in it is much larger than those of the result. Up to 16 rows the
pairs of blocks of one size are joined by two products of the whole matrix.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from seqmodels.kernels.arrays import pad
from seqmodels.kernels.finite import finite_or_zero

SMALL = 16  # products of matrices up to this size are sums of products, which XLA fuses


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def unit_inverse(L: jax.Array, guarded: bool) -> tuple[jax.Array, jax.Array]:
    """The inverse of 1 + L.

    Args:
        L: [..., C, C] strictly lower triangular, finite if `guarded`.
        guarded: put zeros in place of what is not finite because products overflow. Else a row that overflows spoils
            the rows that do not depend on it too, because zero times infinity is NaN.

    Returns:
        T [..., C, C], and [..., C] bool: the rows with such zeros (and with these alone).
    """
    size = L.shape[-1]
    whole = 1 << (size - 1).bit_length()
    T, bad = _inverse(pad(L, {-1: whole, -2: whole}), guarded)
    return T[..., :size, :size], bad[..., :size]


def _inverse(L: jax.Array, guarded: bool) -> tuple[jax.Array, jax.Array]:
    """`unit_inverse` if C is a power of two."""
    size = L.shape[-1]
    if size <= SMALL:
        return _small_inverse(L, guarded)
    half = size // 2
    (first, second), (bad, low_bad) = _inverse(jnp.stack([L[..., :half, :half], L[..., half:, half:]]), guarded)
    middle = _product(L[..., half:, :half], first)
    wrong, middle = _not_finite(middle), (finite_or_zero(middle) if guarded else middle)
    low = -_product(second, middle)
    if guarded:
        low_bad, low = low_bad | wrong | _not_finite(low), finite_or_zero(low)
    upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    lower = jnp.concatenate([low, second], axis=-1)
    return jnp.concatenate([upper, lower], axis=-2), jnp.concatenate([bad, low_bad], axis=-1)


def _small_inverse(L: jax.Array, guarded: bool) -> tuple[jax.Array, jax.Array]:
    """`_inverse` in products of the full size: more work than halves, and fewer steps.

    If T has the inverses of the blocks on the diagonal, and M the part of L that joins each pair of them, then
    T - T M T has the inverses of the pairs.
    """
    row = np.arange(L.shape[-1])
    wrong = ~jnp.isfinite(L) if guarded else jnp.zeros(L.shape, bool)
    L = finite_or_zero(L) if guarded else L
    T = jnp.where(_joins(row), -L, jnp.eye(len(row), dtype=L.dtype))
    for level in range(1, (len(row) - 1).bit_length()):
        middle = _product(jnp.where(_joins(row >> level), L, 0), T)
        joined = T - _product(T, finite_or_zero(middle) if guarded else middle)
        if guarded:
            wrong, joined = wrong | ~jnp.isfinite(middle) | ~jnp.isfinite(joined), finite_or_zero(joined)
        T = joined
    return T, jnp.any(wrong, axis=-1)


def _joins(block: np.ndarray) -> np.ndarray:
    """[C, C] bool: whether the blocks, of the numbers [C], of a row and a column are a pair."""
    return block[:, None] ^ block == 1


def _not_finite(x: jax.Array) -> jax.Array:
    """[..., C] bool: whether a row of x [..., C, C] holds something that is not finite."""
    return jnp.any(~jnp.isfinite(x), axis=-1)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    if x.shape[-1] <= SMALL:
        return jnp.sum(x[..., :, :, None] * y[..., None, :, :], axis=-2)
    return jnp.matmul(x, y, precision="highest")


def _unit_inverse_fwd(L, guarded):
    T, bad = unit_inverse(L, guarded)
    return (T, bad), T


def _unit_inverse_bwd(guarded, T, cotangents):
    finite = finite_or_zero if guarded else lambda x: x
    transposed = jnp.swapaxes(T, -1, -2)
    middle = finite(jnp.matmul(transposed, cotangents[0], precision="highest"))
    return (-jnp.tril(jnp.matmul(middle, transposed, precision="highest"), -1),)


unit_inverse.defvjp(_unit_inverse_fwd, _unit_inverse_bwd)
