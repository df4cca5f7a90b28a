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
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from seqmodels.depth.connection import Carry, Connection
from seqmodels.layers.norm import rms_norm
from seqmodels.layers.parameter import parameter, zeros

ITERATIONS = 20  # of Sinkhorn
SHARE = 0.9  # of the identity in H of a fresh model
SCALE = 0.01  # of what depends on the token, in a fresh model


def sinkhorn(logits: jax.Array) -> jax.Array:
    """A doubly stochastic matrix of logits [..., n, n]: rows and columns of exp(logits) are divided by their sums."""

    def step(logits: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jax.nn.log_softmax(jax.nn.log_softmax(logits, axis=-2), axis=-1), None

    return jnp.exp(jax.lax.scan(step, logits, length=ITERATIONS)[0])


def permutations(n: int) -> np.ndarray:
    """All permutation matrices [n!, n, n], the identity first."""
    return np.eye(n, dtype=np.float32)[list(itertools.permutations(range(n)))]


def lite(logits: jax.Array, n: int) -> jax.Array:
    """A doubly stochastic matrix [..., n, n] of logits [..., n!]: a mean of all permutations."""
    return jnp.einsum("...p,pij->...ij", jax.nn.softmax(logits, axis=-1), permutations(n))


def any_stream(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """An initialiser: one for a stream drawn at random, zero for the others."""
    return jax.nn.one_hot(jax.random.randint(key, (), 0, shape[0]), shape[0], dtype=dtype)


class Hyper(Connection):
    """The carry is the streams [B, T, n, D]; between `enter` and `leave` also what `leave` needs of the coefficients.

    Attributes:
        options: config.model.hyper.
        width: D.
        steps: number of steps of this block; 0 at the end of the model.
        eps: of the norm of the streams.
    """

    options: Any
    width: int
    steps: int
    eps: float

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

    def start(self, x: jax.Array) -> Carry:
        """Every stream is the embedding."""
        return jnp.repeat(x[:, :, None], self.options.streams, axis=2)

    def enter(self, x: jax.Array, carry: Carry, step: int) -> tuple[jax.Array, Carry]:
        """u, and the carry with post [B, T, n] and the mixing matrix [B, T, n, n]."""
        streams, n, parts = carry, self.options.streams, self.parts[step]
        flat = streams.reshape(*streams.shape[:2], -1)
        normed = rms_norm(flat, None, self.eps)
        W = parts["W"].reshape(n * self.width, -1).astype(normed.dtype)
        p, q, r = jnp.split((normed @ W).astype(jnp.float32), [n, 2 * n], axis=-1)
        pre = jax.nn.sigmoid(parts["scale"][0] * p + parts["pre"])
        post = 2 * jax.nn.sigmoid(parts["scale"][1] * q + parts["post"])
        H = None
        if self.options.mixing == "lite":
            H = lite(parts["scale"][2] * r + parts["mix"], n)
        elif self.options.mixing == "sinkhorn":
            H = sinkhorn((parts["scale"][2] * r + parts["mix"]).reshape(*r.shape[:2], n, n))
        u = jnp.einsum("btn,btnd->btd", pre, streams.astype(jnp.float32))
        return u.astype(x.dtype), (streams, post, H)

    def leave(self, x: jax.Array, y: jax.Array, carry: Carry, step: int) -> tuple[jax.Array, Carry]:
        """The new streams. x stays the embedding, which nothing reads."""
        streams, post, H = carry
        wide = streams.astype(jnp.float32)
        if H is not None:
            wide = jnp.einsum("btij,btjd->btid", H, wide)
        wide = wide + post[..., None] * y[:, :, None].astype(jnp.float32)
        return x, wide.astype(streams.dtype)

    def finish(self, x: jax.Array, carry: Carry) -> jax.Array:
        """The mean of the streams."""
        return jnp.mean(carry.astype(jnp.float32), axis=2).astype(x.dtype)

    def flops(self) -> float:
        """Operations per token beyond those of W: u, H X and post y."""
        n, mixing = self.options.streams, self.options.mixing != "identity"
        return self.steps * self.width * (4.0 * n + 2.0 * n * n * mixing)
