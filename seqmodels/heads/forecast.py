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
    values = jnp.where(mask[..., None], values, 0)
    counts = mask[..., None] & ahead(mask, horizon)
    if segment_ids is not None:
        counts &= segment_ids[..., None] == ahead(segment_ids, horizon)
    return jnp.where(counts[..., None], ahead(values, horizon), 0), counts


def ahead(x: jax.Array, horizon: int) -> jax.Array:
    """[B, T, ...] to [B, T, horizon, ...]: at each position those of the next ones, and zeros behind the end."""
    length = x.shape[1]
    padded = jnp.pad(x, ((0, 0), (0, horizon)) + ((0, 0),) * (x.ndim - 2))
    return jnp.stack([padded[:, k : k + length] for k in range(1, horizon + 1)], axis=2)


def known_future(batch: Batch, horizon: int) -> tuple[jax.Array, jax.Array]:
    """Targets [B, T, horizon, C] and which of them count, of the same shape, as `future`, of the arrays of a batch."""
    targets, counts = future(batch["values"], batch["mask"], horizon, batch.get("segment_ids"))
    counts = jnp.broadcast_to(counts[..., None], targets.shape)
    if "observed" in batch:
        counts &= ahead(batch["observed"], horizon)
    return jnp.where(counts, targets, 0), counts


class Forecast(Head):
    """Predictions [B, T, horizon, C] of the next values at every position, trained by the mean squared error.

    Attributes:
        horizon: how many values ahead.
    """

    horizon: int = 1

    target: ClassVar[str] = "values"
    causal: ClassVar[bool] = True

    @staticmethod
    def next_of(outputs: jax.Array) -> jax.Array:
        """The next value [B, T, C] at each position, of predictions [B, T, horizon, C]."""
        return outputs[:, :, 0]

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
            batch: values [B, T, C] float, mask [B, T] bool, and perhaps segment_ids [B, T] int32 and observed [B, T, C]
                bool; a value that is not observed does not count.
        """
        predicted = outputs_of(hidden, batch["mask"])
        targets, counts = known_future(batch, predicted.shape[2])
        error = jnp.where(counts, predicted - targets, 0.0)
        squared, count = jnp.square(error).sum(), jnp.sum(counts, dtype=jnp.float32)
        return squared, jax.lax.stop_gradient(ForecastSums(squared, jnp.abs(error).sum(), count))

    @staticmethod
    def figures(sums: ForecastSums) -> dict[str, jax.Array]:
        """loss: the mean squared error. mae: the mean absolute error."""
        return {"loss": sums.squared / sums.count, "mae": sums.absolute / sums.count}
