"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864, section 3.2.2), in the half-split layout of Llama."""

import jax.numpy as jnp


def rope(x, positions, theta: float = 10_000.0):
    """Rotate channel i together with channel i + d/2 by the angle positions * theta**(-2i/d).

    Args:
        x: [B, T, H, d], d even.
        positions: [B, T] int32.

    Returns:
        As x; the angles and the rotation are float32 (float64 for float64).
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=dtype) / half)
    angle = positions[:, :, None, None].astype(dtype) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = x[..., :half].astype(dtype), x[..., half:].astype(dtype)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
