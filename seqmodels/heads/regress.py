"""Numbers for each row, or for each document of it."""

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from seqmodels.heads.head import Batch
from seqmodels.heads.pooled import Pooled


@struct.dataclass
class RegressSums:
    """Sums over targets that are numbers. Scalars, float32."""

    squared: jax.Array  # sum of squared errors
    count: jax.Array  # number of targets


class Regress(Pooled):
    """Predictions [B, R] of `size` R targets, trained by the mean squared error; a target of NaN does not count.

    With targets [B, S, R] a row has S documents, and so have the predictions.
    """

    target: ClassVar[str] = "targets"

    @staticmethod
    def loss(outputs_of: Callable[..., jax.Array], hidden: jax.Array, batch: Batch) -> tuple[jax.Array, RegressSums]:
        """Sum of squared errors, and the sums.

        Args:
            outputs_of: (hidden, mask, segment_ids, documents) -> predictions [B, R] float32.
            hidden: [B, T, D].
            batch: targets [B, R] float32 and mask [B, T] bool; or targets [B, S, R] and segment_ids [B, T], too.
        """
        targets = batch["targets"]
        more = () if targets.ndim == 2 else (batch["segment_ids"], targets.shape[1])
        predicted = outputs_of(hidden, batch["mask"], *more)
        known = ~jnp.isnan(targets)
        # The target is replaced before the difference is taken; otherwise a NaN would reach the gradient.
        error = jnp.where(known, predicted - jnp.where(known, targets, 0.0), 0.0)
        squared = jnp.square(error).sum()
        return squared, jax.lax.stop_gradient(RegressSums(squared, jnp.sum(known, dtype=jnp.float32)))

    @staticmethod
    def figures(sums: RegressSums) -> dict[str, jax.Array]:
        """loss: the mean squared error."""
        return {"loss": sums.squared / sums.count}
