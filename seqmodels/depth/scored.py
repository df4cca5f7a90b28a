"""Sources of Attention Residuals for blocks that run one by one, each scored once by the queries of all later steps."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from seqmodels.depth.streams import combined, known_mean_square, mean_square, products, stored


@struct.dataclass
class Scored:
    """Complete sources, and one that still grows.

    A complete source never changes. So its norm is computed once, and one matrix product gives its scores for all steps
    that will read it: it is read from memory once for all scores, and once for each mean.

    Attributes:
        vectors: [L, D] float32, for each step of the model the query times the scale of its norm.
        values: complete sources, each [B, T, D] in `dtype`, the lowest first.
        scores: of each complete source those of the steps to come when it was complete, each [B, T] float32.
        growing: [B, T, D], sum of the outputs of the newest source so far; None where it has none yet.
        steps: how often `add` was called. every: calls that make one source. eps: of the norm.
    """

    vectors: jax.Array
    values: tuple[jax.Array, ...]
    scores: tuple[tuple[jax.Array, ...], ...]
    growing: jax.Array | None
    steps: int = struct.field(pytree_node=False)
    every: int = struct.field(pytree_node=False)
    eps: float = struct.field(pytree_node=False)
    dtype: DTypeLike = struct.field(pytree_node=False)

    @classmethod
    def of(cls, x: jax.Array, vectors: jax.Array, every: int, eps: float, dtype: DTypeLike) -> "Scored":
        """The embedding x [B, T, D] as the first source."""
        return cls(vectors, (), (), None, 0, every, eps, dtype)._complete(x)

    def add(self, y: jax.Array) -> "Scored":
        """With y [B, T, D] as a source, or a part of the newest."""
        y = y if self.growing is None else self.growing + y
        added = dataclasses.replace(self, growing=y, steps=self.steps + 1)
        return added._complete(y) if added.steps % self.every == 0 else added

    def _complete(self, whole: jax.Array) -> "Scored":
        """With `whole` [B, T, D] among the complete sources."""
        value = stored(whole, self.dtype)
        square = known_mean_square((value,), jax.lax.stop_gradient(mean_square([whole])))
        vectors = self.vectors[self.steps :].astype(self.dtype)
        scores = products((value,), vectors.T[None]) * jax.lax.rsqrt(square + self.eps)
        apart = tuple(x[0] for x in jax.lax.split(scores, (1,) * len(vectors)))
        return dataclasses.replace(self, values=(*self.values, value), scores=(*self.scores, apart), growing=None)

    def mean(self) -> jax.Array:
        """sum_i a_i v_i of this step, [B, T, D] float32, with a = softmax_i(w . RMSNorm(v_i))."""
        values, scores = self.values, [scores[self.steps - len(self.vectors)] for scores in self.scores]
        if self.growing is not None:
            wide = self.growing.astype(jnp.float32)
            product = jnp.sum(wide * self.vectors[self.steps], axis=-1)  # beside the sum of squares, in one pass
            values, scores = (*values, wide), [*scores, product * jax.lax.rsqrt(mean_square([wide]) + self.eps)]
        weights = jax.nn.softmax(jnp.stack(scores), axis=0)
        return combined(weights, values)
