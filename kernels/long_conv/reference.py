"""The definition of the long convolution: one tap after the other, in float64 if an argument is float64."""

import jax
import jax.numpy as jnp


def supports(**facts: object) -> str | None:
    """Supports every call, slowly."""
    return None


def long_conv(x: jax.Array, weight: jax.Array, document: jax.Array | None) -> jax.Array:
    """y_t = sum_k weight_k x_{t - k} over the tokens of one document.

    Args:
        x: [B, T, E]; weight: [L, E] with L at most T.
        document: [B, T] int32, the number of each token's document, which rises. None: one document.
    """
    time = jnp.arange(x.shape[1])

    def add(y, tap):
        k, w = tap
        earlier, same = jnp.roll(x, k, axis=1), time >= k
        if document is not None:
            same = same & (document == jnp.roll(document, k, axis=1))
        return y + w * jnp.where(jnp.broadcast_to(same, x.shape[:2])[..., None], earlier, 0), None

    return jax.lax.scan(add, jnp.zeros_like(x), (jnp.arange(len(weight)), weight))[0]
