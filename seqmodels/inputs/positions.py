"""Positions that are added to a model's input: learned, or sinusoids (Vaswani et al. 2017, arXiv 1706.03762)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.layers.parameter import normal, parameter
from seqmodels.layers.positions import sinusoids


class Positions(nn.Module):
    """A vector for each position in a document.

    Attributes:
        width: D. kind: "learned" or "sinusoidal".
        size: positions in the table of learned vectors; a token at a later position gets NaN.
        std: standard deviation of fresh vectors.
    """

    width: int
    kind: str
    size: int = 0
    std: float = 0.02

    @nn.compact
    def __call__(self, positions: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """positions [B, T] int32 to [B, T, D] float32. mask [B, T] bool is False on padding, whose vector is finite."""
        if mask is not None:
            positions = jnp.where(mask, positions, 0)
        if self.kind == "sinusoidal":
            return sinusoids(positions, self.width)
        shape, axes = (self.size, self.width), (None, "embed")
        table = parameter(self, "table", shape, axes, normal(self.std), group="embedding")
        return jnp.take(table, positions, axis=0, mode="fill", fill_value=jnp.nan)
