"""Sources of Attention Residuals for blocks that run one by one, whose gradients take one pass (kernels/attn_residual).

The steps between two new sources read the same complete ones. Their means are computed together, so that each source is
read once for all of them, and each step adds the growing source as online softmax does. In the backward pass a step
returns only the gradient of what it has read, and each complete source takes all of these together.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from seqmodels.depth.streams import combined, mean_square, stored
from seqmodels.parallel import attn_residual


class Source(NamedTuple):
    """A complete source for each step that will read it, as `kernels.attn_residual` returns it.

    Attributes:
        values: K arrays [B, T, D]. scores, marks: K arrays [B, T].
    """

    values: tuple[jax.Array, ...]
    scores: tuple[jax.Array, ...]
    marks: tuple[jax.Array, ...]


class Mean(NamedTuple):
    """What a step reads of the complete sources: their mean [B, T, D] and the log of the sum [B, T] of the weights."""

    value: jax.Array
    total: jax.Array


@struct.dataclass
class Shared:
    """Complete sources, and one that still grows; as `Scored`.

    Attributes:
        vectors: [L, D] float32, for each step of the model the query times the scale of its norm.
        embedding: [B, T, D], which is all that the first step reads.
        sources: complete sources for later steps, the lowest first.
        means: of the complete sources, for each step that comes before the next one is complete.
        growing: [B, T, D], sum of the outputs of the newest source so far; None where it has none yet.
        steps: how often `add` was called. every: calls that make one source. eps: of the norm.
        implementation: of the operation.
    """

    vectors: jax.Array
    embedding: jax.Array
    sources: tuple[Source, ...]
    means: tuple[Mean, ...]
    growing: jax.Array | None
    steps: int = struct.field(pytree_node=False)
    every: int = struct.field(pytree_node=False)
    eps: float = struct.field(pytree_node=False)
    dtype: DTypeLike = struct.field(pytree_node=False)
    implementation: str = struct.field(pytree_node=False)

    @classmethod
    def of(
        cls, x: jax.Array, vectors: jax.Array, every: int, eps: float, dtype: DTypeLike, implementation: str
    ) -> "Shared":
        """The embedding x [B, T, D] as the first source."""
        none = cls(vectors, x, (), (), None, 0, every, eps, dtype, implementation)
        value = stored(x, dtype)
        return dataclasses.replace(none, embedding=value)._complete(value, mean_square([x]))

    def add(self, y: jax.Array) -> "Shared":
        """With y [B, T, D] as a source, or a part of the newest."""
        y = y if self.growing is None else self.growing + y
        added = dataclasses.replace(self, growing=y, steps=self.steps + 1)
        return added._complete(stored(y, self.dtype), mean_square([y])) if added.steps % self.every == 0 else added

    def _complete(self, value: jax.Array, square: jax.Array) -> "Shared":
        """With `value` [B, T, D] among the complete sources, and its mean square before it was rounded."""
        vectors = self.vectors[max(self.steps, 1) :].astype(self.dtype)
        if not len(vectors):  # in form "delta" nothing reads the last output
            return dataclasses.replace(self, means=(), growing=None)
        *values, scores, marks = attn_residual(
            value, jax.lax.stop_gradient(square), vectors, eps=self.eps, implementation=self.implementation
        )
        source = Source(tuple(values), apart(scores), apart(marks))
        return dataclasses.replace(self, sources=(*self.sources, source), means=(), growing=None)

    def mean(self) -> tuple[jax.Array, "Shared"]:
        """What this step reads, [B, T, D] in `dtype`, and the sources for the next one."""
        if self.steps == 0:
            return self.embedding, self
        step = self.steps - len(self.vectors)  # from the end, as the sources have them
        values, scores, marks = zip(
            *((source.values[step], source.scores[step], source.marks[step]) for source in self.sources), strict=True
        )
        means = self.means or self._means()
        h = read(values, scores, marks, means[0], self.growing, self.vectors[self.steps], self.eps)
        return h, dataclasses.replace(self, means=means[1:])

    def _means(self) -> tuple[Mean, ...]:
        """Of this step and those that come before the next source is complete."""
        last = min(self.steps + self.every - self.steps % self.every, len(self.vectors))
        values, means = [jax.lax.stop_gradient(source.values[-1]) for source in self.sources], []
        for step in range(self.steps - len(self.vectors), last - len(self.vectors)):
            scores = jax.lax.stop_gradient(jnp.stack([source.scores[step] for source in self.sources]))
            total = jax.nn.logsumexp(scores, axis=0)
            means.append(Mean(combined(jnp.exp(scores - total), values).astype(self.dtype), total))
        return jax.lax.optimization_barrier(tuple(means))  # in memory, and computed together


def apart(x: jax.Array) -> tuple[jax.Array, ...]:
    """The rows of an array."""
    return tuple(row[0] for row in jax.lax.split(x, (1,) * len(x)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def read(
    values: tuple[jax.Array, ...],
    scores: tuple[jax.Array, ...],
    marks: tuple[jax.Array, ...],
    mean: Mean,
    growing: jax.Array | None,
    vector: jax.Array,
    eps: float,
) -> jax.Array:
    """h = sum_i a_i v_i of complete sources, of which the mean is known, and a growing one: [B, T, D] in their dtype.

    The gradients of values, scores and marks are the parts that `kernels.attn_residual` says; the mean has none.

    Args:
        values, scores, marks: of complete sources, for this step.
        growing: [B, T, D] float32. vector: [D] float32, this step's.
    """
    return _read_fwd(values, scores, marks, mean, growing, vector, eps)[0]


def _read_fwd(values, scores, marks, mean, growing, vector, eps):
    dtype, total, h = values[0].dtype, mean.total, mean.value
    if growing is not None:
        score, _ = scored(growing, vector, eps)
        total = jnp.logaddexp(mean.total, score)
        h = combined((jnp.exp(mean.total - total), jnp.exp(score - total)), (h, growing))
        h = stored(h, dtype)
    return h, (h, scores, mean, total, growing, vector)


def _read_bwd(eps, kept, g):
    h, scores, mean, total, growing, vector = kept
    g = stored(g, h.dtype)
    wide = g.astype(total.dtype)
    offset = jnp.sum(wide * h.astype(total.dtype), axis=-1)
    weights = tuple(jnp.exp(score - total) for score in scores)
    parts = ((g,) * len(scores), weights, (offset,) * len(scores))
    none = jax.tree.map(jnp.zeros_like, mean)
    if growing is None:
        return *parts, none, None, jnp.zeros_like(vector)
    score, reciprocal = scored(growing, vector, eps)
    weight, v = jnp.exp(score - total), growing.astype(total.dtype)
    dscore = weight * (jnp.sum(wide * v, axis=-1) - offset)
    dproduct = dscore * reciprocal
    dgrowing = combined((weight, -dscore * score * reciprocal**2 / v.shape[-1]), (wide, v))
    dgrowing += dproduct[..., None] * vector
    return *parts, none, dgrowing.astype(growing.dtype), jnp.einsum("bt,btd->d", dproduct, v, precision="highest")


read.defvjp(_read_fwd, _read_bwd)


def scored(growing: jax.Array, vector: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """w . v / rms(v) and 1 / rms(v), [B, T], of a source [B, T, D]."""
    wide = growing.astype(vector.dtype)
    reciprocal = jax.lax.rsqrt(mean_square([wide]) + eps)
    return jnp.sum(wide * vector, axis=-1) * reciprocal, reciprocal
