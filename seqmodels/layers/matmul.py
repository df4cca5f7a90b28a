"""Matrix products whose result is wider than their factors."""

import jax
import jax.numpy as jnp


def separate_matmuls(x: jax.Array, *weights: jax.Array) -> tuple[jax.Array, ...]:
    """x [B, T, D] times each weight [D, E], as products of their own.

    XLA would make one product of them, and then copy its result apart, which costs more than the product saves.
    Barriers hide that the left factors are the same: one more for each weight, else they would be equal again.
    """
    products = [x @ weights[0]]
    for weight in weights[1:]:
        x = jax.lax.optimization_barrier(x)
        products.append(x @ weight)
    return tuple(products)


@jax.custom_vjp
def wide_matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [B, T, D] times w [D, V] in float32; the gradient of y is rounded to the dtype of x on its way."""
    return jnp.einsum("btd,dv->btv", x, w, preferred_element_type=jnp.float32)


def _wide_matmul_backward(inputs, dy):
    x, w = inputs
    dy = dy.astype(x.dtype)
    return jnp.einsum("btv,dv->btd", dy, w), jnp.einsum("btd,btv->dv", x, dy)


wide_matmul.defvjp(lambda x, w: (wide_matmul(x, w), (x, w)), _wide_matmul_backward)
