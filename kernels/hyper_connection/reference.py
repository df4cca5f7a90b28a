"""The definition of a step of hyper-connections, in float64 if the streams are float64."""

import jax
import jax.numpy as jnp


def supports(**facts: object) -> str | None:
    """Supports every call. XLA reads and writes the streams several times."""
    return None


def hyper_connection(
    streams: jax.Array,
    y: jax.Array,
    weights: jax.Array,
    matrix: jax.Array,
    scale: jax.Array,
    pre_bias: jax.Array,
    post_bias: jax.Array,
    *,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `kernels.hyper_connection.hyper_connection`."""
    new = streams.astype(weights.dtype) + weights[..., None] * y[:, :, None].astype(weights.dtype)
    reciprocal = jax.lax.rsqrt(jnp.mean(jnp.square(new), axis=(2, 3)) + eps)
    products = jnp.einsum("btnd,ndk->btk", new, matrix.astype(weights.dtype), precision="highest")
    p, q = jnp.split(products * reciprocal[..., None], 2, axis=-1)
    pre, post = jax.nn.sigmoid(scale[0] * p + pre_bias), 2 * jax.nn.sigmoid(scale[1] * q + post_bias)
    return new.astype(streams.dtype), jnp.sum(pre[..., None] * new, axis=2).astype(streams.dtype), post
