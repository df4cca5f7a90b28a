"""The filter of a diagonal state space model, of which S4D is one: a product with a Vandermonde matrix.

    K_l = 2 Re sum_n c_n a_n^l          (Gupta et al. 2022, arXiv 2203.14343; Gu et al. 2022, arXiv 2206.11893)

With l = i S + j it is sum_n (c_n a_n^(i S)) a_n^j: a matrix product of two arrays of about sqrt(L) powers each. So no
array of L x N x E is made, neither here nor in the backward pass.
"""

import math

import jax
import jax.numpy as jnp


def diagonal_filter(log_a: jax.Array, c: jax.Array, length: int) -> jax.Array:
    """The filter [L, E] in real numbers.

    Args:
        log_a: [N, E] complex, logarithm of what a state is multiplied with from token to token; one of each conjugate
            pair. In float32 its rounding turns state n by l Im(log_a_n) 6e-8 after l tokens, whatever is computed.
        c: [N, E] complex, product of the readout and the input matrix.
        length: L.
    """
    size = max(math.isqrt(length - 1) + 1, 1)

    def powers(distances):
        return jnp.exp(distances.astype(log_a.real.dtype)[:, None, None] * log_a)

    fine, coarse = powers(jnp.arange(size)), 2 * c * powers(size * jnp.arange(-(-length // size)))
    # Re(x y) = Re x Re y - Im x Im y: one product of real matrices
    left = jnp.concatenate([coarse.real, -coarse.imag], axis=1)
    right = jnp.concatenate([fine.real, fine.imag], axis=1)
    filters = jnp.einsum("ine,jne->ije", left, right, precision=jax.lax.Precision.HIGHEST)
    return filters.reshape(-1, log_a.shape[1])[:length]
