"""Token ids, looked up in an embedding table."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.layers.parameter import normal, parameter


class Tokens(nn.Module):
    """Tokens [B, T] int32 to their rows of a table [size, D], whose size is the padded vocabulary.

    Attributes:
        width: D.
        size: rows of the table.
        dtype: of activations; not used, as nothing is multiplied.
        residual_dtype: of the result.
        std: standard deviation of fresh rows.
    """

    width: int
    size: int
    dtype: Any = jnp.float32
    residual_dtype: Any = jnp.float32
    std: float = 0.02

    key: ClassVar[str] = "tokens"
    ids: ClassVar[bool] = True
    at_root: ClassVar[bool] = True

    def setup(self):
        shape, axes = (self.size, self.width), ("vocab", "embed")
        self.table = parameter(self, "embedding", shape, axes, normal(self.std), group="embedding")

    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """[B, T] int32 to [B, T, D]. The mask is not read: the blocks leave padding out."""
        return jnp.take(self.table, tokens, axis=0).astype(self.residual_dtype)
