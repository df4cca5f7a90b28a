"""The outputs of the steps below, for connections across depth that read all of them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Listed:
    """Sources as separate arrays, for blocks that run one by one.

    Attributes:
        values: each [B, T, D], the lowest first.
        steps: how often `add` was called.
    """

    values: tuple[jax.Array, ...]
    steps: int = struct.field(pytree_node=False, default=0)

    def add(self, y: jax.Array, every: int = 1) -> "Listed":
        """With y [B, T, D] as the newest source; between multiples of `every` calls it is added to the newest one."""
        if self.steps % every == 0:
            return Listed((*self.values, y), self.steps + 1)
        return Listed((*self.values[:-1], self.values[-1] + y), self.steps + 1)

    @property
    def count(self) -> int:
        """Number of sources so far."""
        return len(self.values)

    def known(self) -> jax.Array:
        """[S] bool: which of the sources are there."""
        return jnp.ones(self.count, bool)

    def mix(self, weights: jax.Array) -> jax.Array:
        """sum_s weights[s] source_s, [B, T, D] in float32, of weights [S, B, T] or [S, 1, 1]."""
        return sum(w[..., None] * v.astype(jnp.float32) for w, v in zip(weights, self.values, strict=True))


@struct.dataclass
class Buffered:
    """Sources in one array with room for all that will come, for a scan over blocks, whose carry has one structure.

    Attributes:
        values: [S, B, T, D], zero where there is no source yet.
        steps: [] int32, how often `add` was called.
        count: [] int32, number of sources so far.
    """

    values: jax.Array
    steps: jax.Array
    count: jax.Array

    def add(self, y: jax.Array, every: int = 1) -> "Buffered":
        """As `Listed.add`."""
        count = self.count + (self.steps % every == 0)
        return Buffered(self.values.at[count - 1].add(y), self.steps + 1, count)

    def known(self) -> jax.Array:
        """As `Listed.known`."""
        return jnp.arange(len(self.values)) < self.count

    def products(self, vector: jax.Array) -> jax.Array:
        """Product of each source with a vector [D] and its mean square, float32: [2, S, B, T]."""
        wide = self.values.astype(jnp.float32)
        return jnp.stack([wide @ vector, jnp.mean(wide * wide, axis=-1)])

    def mix(self, weights: jax.Array) -> jax.Array:
        """As `Listed.mix`."""
        weights = jnp.broadcast_to(weights, self.values.shape[:-1])
        return jnp.einsum("sbt,sbtd->btd", weights, self.values.astype(jnp.float32))


Sources = Listed | Buffered


def empty(x: jax.Array, room: int) -> Buffered:
    """No source yet, with room for as many as a scan over blocks will have, each like x [B, T, D]."""
    none = jnp.zeros((), jnp.int32)
    return Buffered(jnp.zeros((room, *x.shape), x.dtype), none, none)


def first(x: jax.Array, room: int = 0) -> Any:
    """Sources of which x [B, T, D] is the first. room: number of sources that a scan over blocks will have; else 0."""
    if not room:
        return Listed((x,))
    none = empty(x, room)
    return Buffered(none.values.at[0].set(x), none.steps, jnp.ones((), jnp.int32))
