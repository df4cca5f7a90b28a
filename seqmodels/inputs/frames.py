"""Frames of numbers: audio features, pixels, sensors, time series."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from seqmodels.inputs.input import Input
from seqmodels.layers.matmul import wide_matmul
from seqmodels.layers.parameter import normal, parameter, zeros


class Frames(Input):
    """Frames [B, T, C] of floats to [B, T, D] by a linear layer with a bias; `size` is C."""

    key: ClassVar[str] = "values"
    ids: ClassVar[bool] = False

    def setup(self) -> None:
        shape, axes, init = (self.size, self.width), ("channels", "embed"), normal(self.size**-0.5)
        self.kernel = parameter(self, "kernel", shape, axes, init, dtype=self.dtype, group="embedding")
        self.bias = parameter(self, "bias", shape[1:], axes[1:], zeros, group="embedding")

    def __call__(self, values: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """[B, T, C] to [B, T, D]. Frames may hold anything, even NaN, where the mask [B, T] is False."""
        if mask is not None:
            values = jnp.where(mask[..., None], values, 0)
        x = wide_matmul(values.astype(self.dtype), self.kernel) + self.bias
        return x.astype(self.residual_dtype)
