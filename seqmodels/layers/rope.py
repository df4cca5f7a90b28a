"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864, section 3.2.2), in both layouts of the pairs."""

import math

import jax
import jax.numpy as jnp


def rope(
    x: jax.Array, positions: jax.Array, theta: float = 10_000.0, rotary: int | None = None, llama3: float = 0.0
) -> jax.Array:
    """Rotate channel i together with channel i + d/2 (Llama) by the angle positions * theta**(-2i/d).

    Args:
        x: [B, T, H, d], d even.
        positions: [B, T] int32.
        rotary: rotate only so many channels, the first, as if the head had no others (GPT-NeoX); None: all d.
        llama3: factor of `stretched`; 0: none.

    Returns:
        Shape and dtype of x. The angles and the rotation are float32 (float64 for float64).
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    rotary = x.shape[-1] if rotary is None else rotary
    half = rotary // 2
    frequency = theta ** (-jnp.arange(half, dtype=dtype) / half)
    frequency = stretched(frequency, llama3) if llama3 else frequency
    angle = positions[:, :, None, None].astype(dtype) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = x[..., :half].astype(dtype), x[..., half:rotary].astype(dtype)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([y.astype(x.dtype) for y in turned] + [x[..., rotary:]], axis=-1)


def stretched(frequency: jax.Array, factor: float, low: float = 1.0, high: float = 4.0, old: int = 8192) -> jax.Array:
    """Frequencies [d/2] for contexts longer than `old` tokens, as in Llama 3.1 (Grattafiori et al. 2024, 2407.21783).

    Wavelengths of more than old / low tokens are multiplied by `factor`, those below old / high are kept. Between them
    the frequency goes from one to the other in a straight line over old / wavelength.
    """
    turns = old * frequency / (2 * math.pi)  # in the old context
    kept = jnp.clip((turns - low) / (high - low), 0, 1)
    return kept * frequency + (1 - kept) * frequency / factor


def rotate_pairs(x: jax.Array, angle: jax.Array) -> jax.Array:
    """Rotate channels 2i and 2i + 1 (neighbours) of x [..., d] by angle [..., d/2].

    Returns:
        Shape and dtype of x. The rotation is float32 (float64 for float64).
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    even, odd = x[..., ::2].astype(dtype), x[..., 1::2].astype(dtype)
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
