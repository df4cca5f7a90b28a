"""Weight matrices with names for their axes."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp


def matrix(
    module: nn.Module, name: str, shape: Sequence[int], axes: Sequence[str], std: float = 0.02, dtype=None
) -> jax.Array:
    """Declare a float32 parameter of logical `axes`, normal with standard deviation `std`, and give it as `dtype`."""
    init = nn.with_logical_partitioning(nn.initializers.normal(std), tuple(axes))
    return module.param(name, init, tuple(shape), jnp.float32).astype(dtype or jnp.float32)


def residual_std(layers: int, std: float = 0.02) -> float:
    """Standard deviation of a projection onto the residual stream, which `layers` layers of two branches write to.

    Radford et al. 2019 (GPT-2), section 2.3.
    """
    return std / (2 * layers) ** 0.5
