"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864, section 3.2.2), in both layouts of the pairs."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from seqmodels.kernels.arrays import computed_once


def rope(
    x: jax.Array,
    positions: jax.Array,
    theta: float = 10_000.0,
    *,
    rotary: int | None = None,
    frequency: ArrayLike | None = None,
    scale: float = 1.0,
    interleaved: bool = False,
) -> jax.Array:
    """Rotate channel i together with channel i + d/2 (Llama) by the angle positions * theta**(-2i/d).

    Args:
        x: [B, T, H, d], d even.
        positions: [B, T] int32, or float32.
        rotary: rotate only so many channels, the first, as if the head had no others (GPT-NeoX); None: all d.
        frequency: [d/2] (of the rotated channels) radians a token, in place of theta**(-2i/d).
        scale: a factor of the rotated channels.
        interleaved: rotate channel 2i together with channel 2i + 1, as in the paper and in GPT-J.

    Returns:
        Shape and dtype of x. The angles and the rotation are float32 (float64 for float64).
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    rotary = x.shape[-1] if rotary is None else rotary
    half = rotary // 2
    frequency = theta ** (-jnp.arange(half, dtype=dtype) / half) if frequency is None else jnp.asarray(frequency, dtype)
    angle = positions[:, :, None, None].astype(dtype) * frequency
    if interleaved:
        turned = [rotate_pairs(x[..., :rotary], angle, scale)]
    else:
        # No slices and no concatenation of the halves: a CPU's gradient of these is slow.
        cos, sin = computed_once(tuple(scale * f(angle)[..., None, :] for f in (jnp.cos, jnp.sin)))
        halves = x[..., :rotary].astype(dtype).reshape(*x.shape[:-1], 2, half)
        sign = jnp.array([[-1], [1]], dtype)
        turned = [(halves * cos + jnp.flip(halves, -2) * (sign * sin)).reshape(*x.shape[:-1], rotary)]
    return jnp.concatenate([y.astype(x.dtype) for y in turned] + [x[..., rotary:]], axis=-1)


def rotate_pairs(x: jax.Array, angle: jax.Array, scale: float = 1.0) -> jax.Array:
    """Rotate channels 2i and 2i + 1 (neighbours) of x [..., d] by angle [..., d/2]. scale: a factor of the result.

    Returns:
        Shape and dtype of x. The rotation is float32 (float64 for float64).
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    cos, sin = scale * jnp.cos(angle), scale * jnp.sin(angle)
    even, odd = x[..., ::2].astype(dtype), x[..., 1::2].astype(dtype)
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
