"""Frames of numbers: audio features, pixels, sensors, time series."""

from typing import ClassVar

import jax
import jax.numpy as jnp

from seqmodels.inputs.input import Input
from seqmodels.layers.matmul import wide_matmul
from seqmodels.layers.parameter import normal, parameter, zeros

SMALLEST = 1e-5  # variance that is added to a window's own


class Frames(Input):
    """Frames [B, T, C] of floats to [B, T, D] by a linear layer with a bias; `size` is C.

    Attributes:
        window_norm: a row's values less their mean, over their deviation, channel by channel; and what the head
            predicts is scaled back (RevIN without its parameters, Kim et al. 2022). The whole row must be there.
    """

    window_norm: bool = False

    key: ClassVar[str] = "values"
    ids: ClassVar[bool] = False

    @property
    def features(self) -> int:
        """Numbers that make one step."""
        return self.size

    def setup(self) -> None:
        shape, axes, init = (self.features, self.width), ("channels", "embed"), normal(self.features**-0.5)
        self.kernel = parameter(self, "kernel", shape, axes, init, dtype=self.dtype, group="embedding")
        self.bias = parameter(self, "bias", shape[1:], axes[1:], zeros, group="embedding")

    def __call__(self, values: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """[B, T, C] to [B, T, D]. Frames may hold anything, even NaN, where the mask [B, T] is False."""
        if self.window_norm:
            mean, deviation = window_scale(values, mask)
            values = (values - mean) / deviation
        if mask is not None:
            values = jnp.where(mask[..., None], values, 0)
        x = wide_matmul(self.frames(values).astype(self.dtype), self.kernel) + self.bias
        return x.astype(self.residual_dtype)

    def frames(self, values: jax.Array) -> jax.Array:
        """[B, T, C] to the numbers of each step."""
        return values

    def restore(self, predicted: jax.Array, values: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Predictions [B, H, C] in the units of the row's values [B, T, C], where `window_norm` took these away."""
        if not self.window_norm:
            return predicted
        mean, deviation = window_scale(values, mask)
        return predicted * deviation + mean


def window_scale(values: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Mean and deviation [B, 1, C] of a row's real values [B, T, C]; 0 and almost 0 where there are none."""
    real = jnp.ones(values.shape[:2], bool) if mask is None else mask
    count = jnp.maximum(real.sum(axis=1), 1)[:, None, None]
    values = jnp.where(real[..., None], values, 0.0).astype(jnp.float32)
    mean = values.sum(axis=1, keepdims=True) / count
    squares = jnp.where(real[..., None], jnp.square(values - mean), 0.0).sum(axis=1, keepdims=True) / count
    return mean, jnp.sqrt(squares + SMALLEST)
