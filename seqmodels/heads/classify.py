"""A class for each row, or for each document of it."""

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from seqmodels.heads.head import Batch
from seqmodels.heads.pooled import Pooled


@struct.dataclass
class ClassifySums:
    """Sums over rows with a label. Scalars, float32."""

    nats: jax.Array  # sum of -log p(label)
    right: jax.Array  # number of rows whose likeliest class is the label
    count: jax.Array  # number of rows


class Classify(Pooled):
    """Logits [B, K] of `size` K classes, trained by cross-entropy on `labels` [B]; a label of -1 does not count.

    With labels [B, S] a row has S documents, and the logits are [B, S, K].
    """

    target: ClassVar[str] = "labels"

    @staticmethod
    def loss(outputs_of: Callable[..., jax.Array], hidden: jax.Array, batch: Batch) -> tuple[jax.Array, ClassifySums]:
        """Sum of -log p(label) in nats, and the sums.

        Args:
            outputs_of: (hidden, mask, segment_ids, documents) -> logits [B, K] float32.
            hidden: [B, T, D].
            batch: labels [B] int32 and mask [B, T] bool; or labels [B, S] and segment_ids [B, T], too.
        """
        labels = batch["labels"]
        if labels.ndim == 1:
            return Classify.cross_entropy(outputs_of(hidden, batch["mask"]), labels)
        logits = outputs_of(hidden, batch["mask"], batch["segment_ids"], labels.shape[1])
        return Classify.cross_entropy(logits, labels)

    @staticmethod
    def cross_entropy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, ClassifySums]:
        """Sum of -log p(label) in nats, and the sums, of logits [..., K] and labels [...]."""
        known = labels >= 0
        log_p = jax.nn.log_softmax(logits, axis=-1)
        chosen = jnp.take_along_axis(log_p, jnp.where(known, labels, 0)[..., None], axis=-1)[..., 0]
        nats = jnp.where(known, -chosen, 0.0).sum()
        right = jnp.sum(known & (jnp.argmax(logits, axis=-1) == labels), dtype=jnp.float32)
        return nats, jax.lax.stop_gradient(ClassifySums(nats, right, jnp.sum(known, dtype=jnp.float32)))

    @staticmethod
    def figures(sums: ClassifySums) -> dict[str, jax.Array]:
        """loss: nats per row. accuracy: share of the rows whose likeliest class is the label."""
        return {"loss": sums.nats / sums.count, "accuracy": sums.right / sums.count}
