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
        observed: single values may be missing. They are read as 0, and beside each value stands whether it is there:
            the linear layer reads 2 C numbers.
    """

    window_norm: bool = False
    observed: bool = False

    key: ClassVar[str] = "values"
    ids: ClassVar[bool] = False

    @property
    def features(self) -> int:
        """Numbers that make one step."""
        return self.size * (2 if self.observed else 1)

    def setup(self) -> None:
        shape, axes, init = (self.features, self.width), ("channels", "embed"), normal(self.features**-0.5)
        self.kernel = parameter(self, "kernel", shape, axes, init, dtype=self.dtype, group="embedding")
        self.bias = parameter(self, "bias", shape[1:], axes[1:], zeros, group="embedding")

    def __call__(
        self, values: jax.Array, mask: jax.Array | None = None, observed: jax.Array | None = None
    ) -> jax.Array:
        """[B, T, C] to [B, T, D]. Values may be anything, even NaN, where they are padding or not observed.

        Args:
            mask: [B, T] bool, False on padding. observed: [B, T, C] bool, False where a value is missing. None: all are
                there.
        """
        there = real_values(values, mask, observed)
        if self.window_norm:
            mean, deviation = window_scale(values, there)
            values = (values - mean) / deviation
        values = jnp.where(there, values, 0)
        if self.observed:
            values = jnp.concatenate([values, there.astype(values.dtype)], axis=-1)
        x = wide_matmul(self.frames(values).astype(self.dtype), self.kernel) + self.bias
        return x.astype(self.residual_dtype)

    def frames(self, values: jax.Array) -> jax.Array:
        """[B, T, C] to the numbers of each step."""
        return values

    def scale(
        self, values: jax.Array, mask: jax.Array | None = None, observed: jax.Array | None = None
    ) -> tuple[jax.Array | float, jax.Array | float]:
        """Mean and deviation [B, 1, C] of the row's values [B, T, C], if `window_norm` takes them away."""
        if not self.window_norm:
            return 0.0, 1.0
        return window_scale(values, real_values(values, mask, observed))


def real_values(values: jax.Array, mask: jax.Array | None, observed: jax.Array | None) -> jax.Array:
    """[B, T, C] bool: which values are neither padding nor missing; mask [B, T] and observed [B, T, C] or None."""
    there = jnp.ones(values.shape, bool) if observed is None else observed
    return there if mask is None else there & mask[..., None]


def window_scale(values: jax.Array, there: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and deviation [B, 1, C] of a row's values [B, T, C] where `there`; 0 and almost 0 if none is."""
    count = jnp.maximum(there.sum(axis=1, keepdims=True), 1)
    values = jnp.where(there, values, 0.0).astype(jnp.float32)
    mean = values.sum(axis=1, keepdims=True) / count
    squares = jnp.where(there, jnp.square(values - mean), 0.0).sum(axis=1, keepdims=True) / count
    return mean, jnp.sqrt(squares + SMALLEST)
