"""The filter of a diagonal state space model, of which S4D is one: a product with a Vandermonde matrix.

    K_l = 2 Re sum_n c_n a_n^l          (Gupta et al. 2022, arXiv 2203.14343; Gu et al. 2022, arXiv 2206.11893)

With l = i S + j it is sum_n (c_n a_n^(i S)) a_n^j: a matrix product of two arrays of about sqrt(L) powers each. So no
array of L x N x E is made, neither here nor in the backward pass.
"""

import math

import jax
import jax.numpy as jnp


def powers(a: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """a^0, .., a^(count - 1) [count, ...], and a^count [...], by doubling: it needs no logarithm, so a may be 0."""
    table, next_power = jnp.ones_like(a)[None], a
    while len(table) < count:
        table, next_power = jnp.concatenate([table, table * next_power]), next_power * next_power
    if len(table) > count:
        return table[:count], table[count]
    return table, next_power


def diagonal_filter(a: jax.Array, c: jax.Array, length: int) -> jax.Array:
    """The filter [L, E] in real numbers.

    Args:
        a: [N, E] complex, what each state is multiplied with from token to token; one of each conjugate pair.
        c: [N, E] complex, product of the readout and the input matrix.
        length: L.
    """
    size = max(math.isqrt(length - 1) + 1, 1)
    fine, step = powers(a, size)
    coarse, _ = powers(step, -(-length // size))
    coarse = 2 * c * coarse
    # Re(x y) = Re x Re y - Im x Im y: one product of real matrices
    left = jnp.concatenate([coarse.real, -coarse.imag], axis=1)
    right = jnp.concatenate([fine.real, fine.imag], axis=1)
    filters = jnp.einsum("ine,jne->ije", left, right, precision=jax.lax.Precision.HIGHEST)
    return filters.reshape(-1, a.shape[1])[:length]
