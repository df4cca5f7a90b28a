"""The next values of a series, from each of its positions."""

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from seqmodels.heads.head import Batch, Head
from seqmodels.layers.matmul import wide_matmul
from seqmodels.layers.parameter import normal, parameter, zeros


@struct.dataclass
class ForecastSums:
    """Sums over the predicted values that count. Scalars, float32."""

    squared: jax.Array  # sum of squared errors
    absolute: jax.Array  # sum of absolute errors
    count: jax.Array  # number of values


def future(
    values: jax.Array, mask: jax.Array, horizon: int, segment_ids: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The `horizon` values after each position, and which of them count.

    Args:
        values: [B, T, C]; may hold anything where the mask is False.
        mask: [B, T] bool, True on real positions.
        segment_ids: [B, T] int32; a value of another segment does not count. None: each row is one.

    Returns:
        targets [B, T, horizon, C], 0 where they do not count; and counts [B, T, horizon] bool, True if the position and
        the predicted position are both in the row, real, and in the same segment.
    """
    length = values.shape[1]
    values = jnp.where(mask[..., None], values, 0)

    def later(x, steps):  # position t gets the value at t + steps; zeros at the end
        return jnp.pad(x[:, steps:], ((0, 0), (0, min(steps, length))) + ((0, 0),) * (x.ndim - 2))

    steps = range(1, horizon + 1)
    counts = jnp.stack([mask & later(mask, k) for k in steps], axis=2)
    if segment_ids is not None:
        counts &= jnp.stack([segment_ids == later(segment_ids, k) for k in steps], axis=2)
    targets = jnp.stack([later(values, k) for k in steps], axis=2)
    return jnp.where(counts[..., None], targets, 0), counts


class Forecast(Head):
    """Predictions [B, T, horizon, C] of the next values at every position, trained by the mean squared error.

    Attributes:
        horizon: how many values ahead.
    """

    horizon: int = 1

    target: ClassVar[str] = "values"
    causal: ClassVar[bool] = True

    def setup(self) -> None:
        shape, axes, init = (self.width, self.horizon * self.size), ("embed", "outputs"), normal(self.width**-0.5)
        self.kernel = parameter(self, "kernel", shape, axes, init, dtype=self.dtype, group="head")
        self.bias = parameter(self, "bias", shape[1:], axes[1:], zeros, group="head")

    def __call__(self, hidden: jax.Array, mask: jax.Array | None = None, table: jax.Array | None = None) -> jax.Array:
        """[B, T, D] to [B, T, horizon, C] float32. Hidden states where the mask is False may be anything."""
        if mask is not None:
            hidden = jnp.where(mask[..., None], hidden, 0)
        y = wide_matmul(hidden.astype(self.dtype), self.kernel) + self.bias
        return y.reshape(*hidden.shape[:2], self.horizon, self.size)

    @staticmethod
    def loss(outputs_of: Callable[..., jax.Array], hidden: jax.Array, batch: Batch) -> tuple[jax.Array, ForecastSums]:
        """Sum of squared errors, and the sums.

        Args:
            outputs_of: (hidden, mask) -> predictions [B, T, horizon, C] float32.
            hidden: [B, T, D].
            batch: values [B, T, C] float, mask [B, T] bool and perhaps segment_ids [B, T] int32.
        """
        predicted, mask = outputs_of(hidden, batch["mask"]), batch["mask"]
        targets, counts = future(batch["values"], mask, predicted.shape[2], batch.get("segment_ids"))
        error = jnp.where(counts[..., None], predicted - targets, 0.0)
        squared = jnp.square(error).sum()
        count = jnp.sum(counts, dtype=jnp.float32) * predicted.shape[3]
        return squared, jax.lax.stop_gradient(ForecastSums(squared, jnp.abs(error).sum(), count))

    @staticmethod
    def figures(sums: ForecastSums) -> dict[str, jax.Array]:
        """loss: the mean squared error. mae: the mean absolute error."""
        return {"loss": sums.squared / sums.count, "mae": sums.absolute / sums.count}
