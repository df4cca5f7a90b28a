"""Ids over a small alphabet, such as the four bases of DNA."""

from typing import ClassVar

import jax

from seqmodels.inputs.input import Input
from seqmodels.layers.matmul import wide_matmul
from seqmodels.layers.parameter import normal, parameter


class OneHot(Input):
    """Ids [B, T] to [B, T, D] by a linear layer without a bias; an id outside the alphabet becomes the zero vector.

    So an unknown base, such as the N of DNA, adds nothing to the stream. `Tokens` would have a row for it.
    """

    key: ClassVar[str] = "tokens"
    ids: ClassVar[bool] = True

    def setup(self) -> None:
        shape, axes = (self.size, self.width), ("channels", "embed")
        self.kernel = parameter(self, "kernel", shape, axes, normal(self.std), dtype=self.dtype, group="embedding")

    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """[B, T] int32 to [B, T, D]. The mask is not used, because the blocks ignore padding."""
        letters = jax.nn.one_hot(tokens, self.size, dtype=self.dtype)  # all zeros outside the alphabet
        return wide_matmul(letters, self.kernel).astype(self.residual_dtype)
