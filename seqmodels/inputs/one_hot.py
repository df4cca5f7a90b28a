"""Ids over a small alphabet, such as the four bases of DNA."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.layers.matmul import wide_matmul
from seqmodels.layers.parameter import normal, parameter


class OneHot(nn.Module):
    """Ids [B, T] to [B, T, D] by a linear layer without a bias; an id outside the alphabet becomes the zero vector.

    So an unknown base, such as the N of DNA, says nothing. Tokens would have a row for it.

    Attributes:
        width: D.
        size: letters of the alphabet, which have the ids 0 to size - 1.
        dtype: of the matrix product.
        residual_dtype: of the result.
        std: standard deviation of fresh weights.
    """

    width: int
    size: int
    dtype: Any = jnp.float32
    residual_dtype: Any = jnp.float32
    std: float = 0.02

    key: ClassVar[str] = "tokens"
    ids: ClassVar[bool] = True
    at_root: ClassVar[bool] = False

    def setup(self):
        shape, axes = (self.size, self.width), ("channels", "embed")
        self.kernel = parameter(self, "kernel", shape, axes, normal(self.std), dtype=self.dtype, group="embedding")
        self.table = None

    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """[B, T] int32 to [B, T, D]. The mask is not read: the blocks leave padding out."""
        letters = jax.nn.one_hot(tokens, self.size, dtype=self.dtype)  # all zeros outside the alphabet
        return wide_matmul(letters, self.kernel).astype(self.residual_dtype)
