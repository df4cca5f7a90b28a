"""Hyper-connections with constrained mixing: mHC (DeepSeek 2025, arXiv 2512.24880) and mHC-lite (arXiv 2601.05732).

The residual stream is n streams X [n, D], all of them the embedding at first. At each step, from the normed streams

    [p, q, R] = RMSNorm(vec X) W,
    pre = sigmoid(a_p p + b_p),    post = 2 sigmoid(a_q q + b_q),    H = mixing(a_r R + b_r),
    u = sum_i pre_i X_i,    y = branches(norm(u)),    X' = H X + post y.

H is doubly stochastic: the identity; the mean of all n! permutations with weights softmax(.) ("lite"); or a positive
matrix after 20 of Sinkhorn's iterations ("sinkhorn"). The last norm reads the mean of the streams.

In a fresh model W is zero and post is 1, so all streams are equal, and the norm takes the size of u away: but for the
norm's epsilon it computes what the plain network computes. b_p is one for a stream drawn at random for each step, else
the streams would get the same gradients and stay equal. H starts with 0.9 on the identity, which is our choice.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike

from seqmodels.depth.connection import Carry, Connection
from seqmodels.depth.streams import added, combined, known_mean_square, mean_square, products, stored
from seqmodels.layers.parameter import parameter, zeros

ITERATIONS = 20  # of Sinkhorn
SHARE = 0.9  # of the identity in H of a fresh model
SCALE = 0.01  # of what depends on the token, in a fresh model


def sinkhorn(logits: jax.Array) -> jax.Array:
    """Doubly stochastic matrices of logits [n, n, ...]: columns and rows of exp(logits) are divided by their sums."""

    def step(logits: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jax.nn.log_softmax(jax.nn.log_softmax(logits, axis=0), axis=1), None

    return jnp.exp(jax.lax.scan(step, logits, length=ITERATIONS)[0])


def permutations(n: int) -> np.ndarray:
    """All permutation matrices [n!, n, n], the identity first."""
    return np.eye(n, dtype=np.float32)[list(itertools.permutations(range(n)))]


def lite(logits: jax.Array, n: int) -> jax.Array:
    """Doubly stochastic matrices [n, n, ...] of logits [n!, ...]: means of all permutations."""
    return jnp.einsum("p...,pij->ij...", jax.nn.softmax(logits, axis=0), permutations(n))


def any_stream(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """An initialiser: one for a stream drawn at random, zero for the others."""
    return jax.nn.one_hot(jax.random.randint(key, (), 0, shape[0]), shape[0], dtype=dtype)


@struct.dataclass
class Streams:
    """The residual streams.

    Attributes:
        values: n arrays [B, T, D] in the model's dtype.
        square: [B, T] float32, mean of the squares of all streams. It is known when they are written.
    """

    values: tuple[jax.Array, ...]
    square: jax.Array

    @classmethod
    def of(cls, values: tuple[jax.Array, ...], square: jax.Array) -> "Streams":
        """Of values in the model's dtype and their mean square, whose own gradient is not used."""
        return cls(values, known_mean_square(values, jax.lax.stop_gradient(square)))


class Hyper(Connection):
    """The carry is the streams; between `enter` and `leave` also what `leave` needs of the coefficients.

    Each stream is an array of its own, in the dtype of the model's activations (`seqmodels.depth.streams`).

    Attributes:
        options: config.model.hyper.
        width: D.
        steps: number of steps of this block; 0 at the end of the model.
        eps: of the norm of the streams.
        dtype: of the model's activations.
    """

    options: Any
    width: int
    steps: int
    eps: float
    dtype: DTypeLike

    @property
    def mixed(self) -> int:
        """How many numbers H is made of."""
        n = self.options.streams
        return {"identity": 0, "lite": math.factorial(n), "sinkhorn": n * n}[self.options.mixing]

    def setup(self) -> None:
        n, mixed = self.options.streams, self.mixed
        self.parts = [self._parameters(i, n, mixed) for i in range(self.steps)]

    def _parameters(self, step: int, n: int, mixed: int) -> dict[str, jax.Array]:
        def vector(name, size, init):
            return parameter(self, f"{name}_{step}", (size,), (None,), init)

        shape, axes = (n, self.width, 2 * n + mixed), (None, "embed", None)
        parts = dict(
            W=parameter(self, f"kernel_{step}", shape, axes, zeros),
            pre=vector("pre_bias", n, any_stream),
            post=vector("post_bias", n, zeros),
            scale=vector("scale", 3 if mixed else 2, nn.initializers.constant(SCALE)),
        )
        if mixed:
            parts["mix"] = vector("mix_bias", mixed, self._identity)
        return parts

    def _identity(self, key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        """Logits that put SHARE on the identity."""
        n, ratio = self.options.streams, SHARE / (1 - SHARE)
        if self.options.mixing == "lite":
            return jnp.zeros(shape, dtype).at[0].set(math.log(ratio * max(shape[0] - 1, 1)))
        return (math.log(ratio * max(n - 1, 1)) * jnp.eye(n, dtype=dtype)).reshape(shape)

    def start(self, x: jax.Array, blocks: Sequence[Any] = ()) -> Carry:
        """Every stream is the embedding."""
        return Streams.of(tuple(stored(x, self.dtype) for _ in range(self.options.streams)), mean_square([x]))

    def enter(self, x: jax.Array, carry: Carry, step: int) -> tuple[jax.Array, Carry]:
        """u [B, T, D], and the carry with post [n, B, T] and the mixing matrix [n, n, B, T]."""
        n, parts = self.options.streams, self.parts[step]
        reciprocal = jax.lax.rsqrt(carry.square + self.eps)
        p, q, r = jnp.split(products(carry.values, parts["W"].astype(self.dtype)) * reciprocal, [n, 2 * n])
        column = {name: value[:, None, None] for name, value in parts.items() if value.ndim == 1}
        pre = jax.nn.sigmoid(column["scale"][0] * p + column["pre"])
        post = 2 * jax.nn.sigmoid(column["scale"][1] * q + column["post"])
        H = None
        if self.options.mixing != "identity":
            logits = column["scale"][2] * r + column["mix"]
            H = lite(logits, n) if self.options.mixing == "lite" else sinkhorn(logits.reshape(n, n, *logits.shape[1:]))
        return stored(combined(pre, carry.values), self.dtype), (carry, post, H)

    def leave(self, x: jax.Array, y: jax.Array, carry: Carry, step: int) -> tuple[jax.Array, Carry]:
        """The new streams. x stays the embedding, which nothing reads."""
        streams, post, H = carry
        wide = tuple(X.astype(jnp.float32) for X in streams.values)
        mixed = wide if H is None else tuple(combined(row, wide) for row in H)
        return x, Streams.of(*added(mixed, post, y.astype(jnp.float32), jnp.dtype(self.dtype)))

    def finish(self, x: jax.Array, carry: Carry) -> jax.Array:
        """The mean of the streams."""
        return (sum(X.astype(jnp.float32) for X in carry.values) / self.options.streams).astype(x.dtype)

    def flops(self) -> float:
        """Operations per token beyond those of W: u, H X and post y."""
        n, mixing = self.options.streams, self.options.mixing != "identity"
        return self.steps * self.width * (4.0 * n + 2.0 * n * n * mixing)
