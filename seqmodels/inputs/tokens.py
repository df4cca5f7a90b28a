"""Token ids, looked up in an embedding table."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from seqmodels.inputs.input import Input
from seqmodels.layers.lookup import lookup
from seqmodels.layers.parameter import normal, parameter


class Tokens(Input):
    """Looks up tokens [B, T] int32 in a table [size, D]. The size is that of the padded vocabulary."""

    key: ClassVar[str] = "tokens"
    ids: ClassVar[bool] = True
    at_root: ClassVar[bool] = True

    def setup(self) -> None:
        shape, axes = (self.size, self.width), ("vocab", "embed")
        self.embedding = parameter(self, "embedding", shape, axes, normal(self.std), group="embedding")

    def table(self) -> jax.Array:
        """[size, D], the padded vocabulary."""
        return self.embedding

    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """[B, T] int32 to [B, T, D]. Where the mask is False, ids may be any numbers, also outside the vocabulary."""
        if mask is not None:  # an id outside would be NaN, which gradients of padding would multiply by zero
            tokens = jnp.where(mask, tokens, jnp.clip(tokens, 0, self.size - 1))
        return lookup(self.embedding, tokens).astype(self.residual_dtype)
