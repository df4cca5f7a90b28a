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
    gain: jax.Array,
    bias: jax.Array,
    *,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `kernels.hyper_connection.hyper_connection`."""
    new = streams.astype(weights.dtype) + weights[..., None] * y[:, :, None].astype(weights.dtype)
    reciprocal = jax.lax.rsqrt(jnp.mean(jnp.square(new), axis=(2, 3)) + eps)
    products = jnp.einsum("btnd,ndk->btk", new, matrix.astype(weights.dtype), precision="highest")
    p, q = jnp.split(gain * products * reciprocal[..., None] + bias, 2, axis=-1)
    u = jnp.sum(jax.nn.sigmoid(p)[..., None] * new, axis=2)
    return new.astype(streams.dtype), u.astype(streams.dtype), 2 * jax.nn.sigmoid(q)
