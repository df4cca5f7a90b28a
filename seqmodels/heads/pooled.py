"""One output per row: hidden states are pooled over the unmasked positions, then multiplied by a matrix."""

import jax
import jax.numpy as jnp

from seqmodels.heads.head import Head
from seqmodels.layers.matmul import wide_matmul
from seqmodels.layers.parameter import normal, parameter, zeros

POOLS = ("mean", "last", "attention")


def mean_pool(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """[B, T, D] and mask [B, T] to the mean over the real positions, [B, D] float32; zeros where there are none."""
    total = jnp.where(mask[..., None], hidden.astype(jnp.float32), 0.0).sum(axis=1)
    return total / jnp.maximum(mask.sum(axis=1), 1)[:, None]


def last_pool(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """[B, T, D] and mask [B, T] to the last real position, [B, D] float32; zeros where there are none."""
    length = mask.shape[1]
    place = length - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    last = jnp.take_along_axis(hidden, place[:, None, None], axis=1)[:, 0]
    return jnp.where(mask.any(axis=1)[:, None], last.astype(jnp.float32), 0.0)


def attention_pool(hidden: jax.Array, mask: jax.Array, query: jax.Array) -> jax.Array:
    """[B, T, D], mask [B, T] and a query [D] to a mean weighted by softmax(hidden query / D^1/2), [B, D] float32.

    Positions that are not real have no weight; rows without a real position are zeros.
    """
    hidden = jnp.where(mask[..., None], hidden.astype(jnp.float32), 0.0)
    scores = hidden @ query / query.shape[0] ** 0.5
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.where(mask, jax.nn.softmax(scores, axis=1), 0.0)
    return jnp.einsum("bt,btd->bd", weights, hidden)


class Pooled(Head):
    """Hidden states to [B, size] float32.

    Attributes:
        pool: a name in POOLS. "attention" has a learned query [D]. It starts at zero, so the pool starts as the mean.
    """

    pool: str = "mean"

    def setup(self) -> None:
        shape, axes, init = (self.width, self.size), ("embed", "outputs"), normal(self.width**-0.5)
        self.kernel = parameter(self, "kernel", shape, axes, init, dtype=self.dtype, group="head")
        self.bias = parameter(self, "bias", shape[1:], axes[1:], zeros, group="head")
        if self.pool == "attention":
            self.pool_query = parameter(self, "pool_query", shape[:1], axes[:1], zeros, group="head")

    def __call__(self, hidden: jax.Array, mask: jax.Array | None = None, table: jax.Array | None = None) -> jax.Array:
        """[B, T, D] and a mask [B, T] (None: all positions are real) to [B, size] float32."""
        mask = jnp.ones(hidden.shape[:2], bool) if mask is None else mask
        if self.pool == "attention":
            pooled = attention_pool(hidden, mask, self.pool_query)
        else:
            pooled = {"mean": mean_pool, "last": last_pool}[self.pool](hidden, mask)
        pooled = pooled.astype(self.dtype)[:, None]
        return wide_matmul(pooled, self.kernel)[:, 0] + self.bias
