"""A class for two documents that stand in one row: do they belong together? (Retrieval in the Long Range Arena.)"""

from collections.abc import Callable
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.heads.classify import Classify, ClassifySums
from seqmodels.heads.head import Batch
from seqmodels.layers import pooling
from seqmodels.layers.matmul import wide_matmul
from seqmodels.layers.parameter import normal, parameter, zeros


class Pair(Classify):
    """Logits [B, K] of a row's first two documents, trained as `Classify`.

    Both are read by the same blocks, which keep documents apart, and pooled to a and b [D]. As in the S4 and S5
    repositories, logits = W gelu(V [a, b, a - b, a * b] + c) + d, with V [4 D, D].
    """

    needs: ClassVar[tuple[str, ...]] = ("mask", "segment_ids")

    def setup(self) -> None:
        super().setup()
        shape, axes = (4 * self.width, self.width), ("mlp", "embed")
        self.mix = parameter(self, "mix", shape, axes, normal(shape[0] ** -0.5), dtype=self.dtype, group="head")
        self.mix_bias = parameter(self, "mix_bias", shape[1:], axes[1:], zeros, group="head")

    def __call__(
        self,
        hidden: jax.Array,
        mask: jax.Array | None = None,
        table: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        documents: int = 2,
    ) -> jax.Array:
        """[B, T, D], a mask [B, T] and segment_ids [B, T] to [B, K] float32."""
        mask = jnp.ones(hidden.shape[:2], bool) if mask is None else mask
        both = pooling.by_document(self.pool, hidden, mask, segment_ids, 2, self.pool_query)
        a, b = both[:, 0], both[:, 1]
        features = jnp.concatenate([a, b, a - b, a * b], axis=-1).astype(self.dtype)[:, None]
        return self.predict(nn.gelu(wide_matmul(features, self.mix)[:, 0] + self.mix_bias, approximate=False))

    def init_state(self, batch: int) -> pooling.State:
        """Nothing: two documents are read in one piece."""
        return {}

    def extend(self, *pieces: object) -> pooling.State:
        """Nothing."""
        return {}

    @staticmethod
    def loss(outputs_of: Callable[..., jax.Array], hidden: jax.Array, batch: Batch) -> tuple[jax.Array, ClassifySums]:
        """Sum of -log p(label) in nats, and the sums.

        Args:
            outputs_of: (hidden, mask, segment_ids, documents) -> logits [B, K] float32.
            hidden: [B, T, D].
            batch: labels [B] int32, mask [B, T] bool and segment_ids [B, T] int32.
        """
        logits = outputs_of(hidden, batch["mask"], batch["segment_ids"], 2)
        return Classify.cross_entropy(logits, batch["labels"])
