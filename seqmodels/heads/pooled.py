"""One output per row, or per document of it: hidden states are pooled, then multiplied by a matrix."""

import jax
import jax.numpy as jnp

from seqmodels.heads.head import Head
from seqmodels.layers import pooling
from seqmodels.layers.matmul import wide_matmul
from seqmodels.layers.parameter import normal, parameter, zeros


class Pooled(Head):
    """Hidden states to [B, size] float32, or to [B, S, size] for a row of S documents.

    Attributes:
        pool: a name in `pooling.POOLS`. "attention" has a learned query [D]. It starts at zero, so the pool starts as
            the mean.
    """

    pool: str = "mean"

    @property
    def outputs(self) -> int:
        """Numbers for each row."""
        return self.size

    def setup(self) -> None:
        shape, axes, init = (self.width, self.outputs), ("embed", "outputs"), normal(self.width**-0.5)
        self.kernel = parameter(self, "kernel", shape, axes, init, dtype=self.dtype, group="head")
        self.bias = parameter(self, "bias", shape[1:], axes[1:], zeros, group="head")
        self.pool_query = None
        if self.pool == "attention":
            self.pool_query = parameter(self, "pool_query", shape[:1], axes[:1], zeros, group="head")

    def __call__(
        self,
        hidden: jax.Array,
        mask: jax.Array | None = None,
        table: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        documents: int = 0,
    ) -> jax.Array:
        """[B, T, D] and a mask [B, T] (None: all positions are real) to [B, size] float32.

        With `documents` S: to [B, S, size], one output for each of the first S documents of a row, by `segment_ids`
        [B, T].
        """
        mask = jnp.ones(hidden.shape[:2], bool) if mask is None else mask
        if documents:
            return self.predict(pooling.by_document(self.pool, hidden, mask, segment_ids, documents, self.pool_query))
        return self.predict(pooling.whole(self.pool, hidden, mask, self.pool_query))

    def predict(self, pooled: jax.Array) -> jax.Array:
        """Pooled hidden states [..., D] to [..., size] float32."""
        rows = pooled.astype(self.dtype).reshape(-1, 1, self.width)
        return wide_matmul(rows, self.kernel).reshape(*pooled.shape[:-1], -1) + self.bias

    def init_state(self, batch: int) -> pooling.State:
        """The pool of nothing."""
        return pooling.start(self.pool, batch, self.width)

    def extend(
        self,
        state: pooling.State | None,
        hidden: jax.Array,
        mask: jax.Array | None,
        segment_ids: jax.Array | None,
        before: jax.Array | None,
    ) -> pooling.State:
        """The pool of the document that is open at the end of a piece."""
        state = self.init_state(hidden.shape[0]) if state is None else state
        mask = jnp.ones(hidden.shape[:2], bool) if mask is None else mask
        return pooling.carry_on(self.pool, state, hidden, mask, segment_ids, before, self.pool_query)

    def read_out(self, state: pooling.State) -> jax.Array:
        """[B, size] float32 of the document that is open."""
        return self.predict(pooling.finish(self.pool, state))
