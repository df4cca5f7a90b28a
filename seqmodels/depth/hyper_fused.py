"""Hyper-connections of streams that are not mixed, each step in one operation (`kernels/hyper_connection`).

The parameters and the equations are those of `Hyper`. What the branches return is added to the streams when the next
step reads them, so that they are read and written once, also in a scan over blocks.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from seqmodels.depth.connection import Carry
from seqmodels.depth.hyper import Hyper
from seqmodels.depth.streams import stored
from seqmodels.parallel import hyper_connection


@struct.dataclass
class Pending:
    """Streams to which the output of the last step is still to be added.

    Attributes:
        streams: [B, T, n, D] in the model's dtype.
        y: [B, T, D] in the model's dtype, what the branches returned. weights: [B, T, n] float32, of y in each stream.
    """

    streams: jax.Array
    y: jax.Array
    weights: jax.Array


class FusedHyper(Hyper):
    """The carry is `Pending`; between `enter` and `leave` it is the streams and the weights of what is to come.

    Attributes:
        implementation: of the operation.
    """

    implementation: str | None = None

    def start(self, x: jax.Array, blocks: Sequence[Any] = ()) -> Carry:
        """Every stream is the embedding, and nothing is to be added."""
        x, n = stored(x, self.dtype), self.options.streams
        streams = jnp.broadcast_to(x[:, :, None], (*x.shape[:2], n, x.shape[2]))
        return Pending(streams, jnp.zeros_like(x), jnp.zeros((*x.shape[:2], n), jnp.float32))

    def enter(self, x: jax.Array, carry: Carry, step: int) -> tuple[jax.Array, Carry]:
        """u [B, T, D], and the carry with `post` [B, T, n]."""
        parts = self.parts[step]
        new, u, post = hyper_connection(
            carry.streams,
            carry.y,
            carry.weights,
            parts["W"].astype(self.dtype),
            parts["scale"],
            parts["pre"],
            parts["post"],
            eps=self.eps,
            implementation=self.implementation,
        )
        return u, (new, post)

    def leave(self, x: jax.Array, y: jax.Array, carry: Carry, step: int) -> tuple[jax.Array, Carry]:
        """What is to be added to the streams. x stays the embedding, which nothing reads."""
        streams, post = carry
        return x, Pending(streams, stored(y, self.dtype), post)

    def finish(self, x: jax.Array, carry: Carry) -> jax.Array:
        """The mean of the streams, and of what is to be added to them."""
        mean = jnp.mean(carry.streams.astype(jnp.float32), axis=2)
        share = jnp.mean(carry.weights, axis=-1, keepdims=True)
        return (mean + share * carry.y.astype(jnp.float32)).astype(x.dtype)
