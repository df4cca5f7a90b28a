"""The values that follow a row, predicted at once."""

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from seqmodels.heads.forecast import Forecast, ForecastSums
from seqmodels.heads.head import Batch
from seqmodels.heads.pooled import Pooled


class Window(Pooled):
    """Predictions [B, horizon, C] of the `size` C channels after a row, trained by the mean squared error.

    Unlike `Forecast`, which predicts from every position, it predicts once, from the whole row; so the blocks may read
    in both directions.

    Attributes:
        horizon: how many values ahead.
    """

    horizon: int = 1

    target: ClassVar[str] = "targets"
    needs: ClassVar[tuple[str, ...]] = ("mask", "values")

    @property
    def outputs(self) -> int:
        """Numbers for each row."""
        return self.horizon * self.size

    def predict(self, pooled: jax.Array) -> jax.Array:
        """Pooled hidden states [..., D] to [..., horizon, C] float32."""
        return super().predict(pooled).reshape(*pooled.shape[:-1], self.horizon, self.size)

    @staticmethod
    def loss(outputs_of: Callable[..., jax.Array], hidden: jax.Array, batch: Batch) -> tuple[jax.Array, ForecastSums]:
        """Sum of squared errors, and the sums.

        Args:
            outputs_of: (hidden, mask, segment_ids, documents, values, observed) -> predictions [B, horizon, C] float32.
            hidden: [B, T, D].
            batch: values [B, T, C], mask [B, T] bool, perhaps observed [B, T, C], and targets [B, horizon, C]; a target
                of NaN does not count.
        """
        units = [batch[name] for name in ("values", "observed") if name in batch]
        predicted, targets = outputs_of(hidden, batch["mask"], None, 0, *units), batch["targets"]
        known = ~jnp.isnan(targets)
        error = jnp.where(known, predicted - jnp.where(known, targets, 0.0), 0.0)
        squared = jnp.square(error).sum()
        count = jnp.sum(known, dtype=jnp.float32)
        return squared, jax.lax.stop_gradient(ForecastSums(squared, jnp.abs(error).sum(), count))

    figures = Forecast.figures
