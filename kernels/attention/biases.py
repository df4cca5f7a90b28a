"""Additive biases of attention's scores: functions of the positions of a query and a key, with weights for each head.

A bias is a static object, equal if its fields are. It says how many weights a head has (`size`), and computes the bias
of one head from them. The weights [H, size] are an argument of `kernels.attention.attention`: fixed numbers, or
parameters, which have gradients. A new one is a class here or elsewhere with the same two members.
"""

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np


class Bias(Protocol):
    """A bias. It is hashable, for it is a static argument of compiled functions."""

    @property
    def size(self) -> int:
        """Weights per head."""

    def __call__(self, weights: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        """The bias of one head.

        Args:
            weights: [size].
            i, j: int32 positions of queries and keys, broadcast against each other.
        """


@dataclasses.dataclass(frozen=True)
class Alibi:
    """-m |i - j| with a slope m for each head: Press et al. 2022, arXiv 2108.12409, section 3. See `alibi_slopes`."""

    size: int = dataclasses.field(default=1, init=False)

    def __call__(self, weights: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        return -weights[0] * abs(i - j)


def alibi_slopes(heads: int) -> np.ndarray:
    """[H, 1] float32: ALiBi's slopes 2^(-8 h / H), h = 1..H, if H is a power of two.

    Otherwise those of the next smaller power of two, and then every second one of the next larger power.
    """
    power = 2 ** int(math.log2(heads))
    slopes = 2.0 ** (-8 / power * np.arange(1, power + 1))
    more = 2.0 ** (-4 / power * np.arange(1, 2 * (heads - power), 2))
    return np.concatenate([slopes, more])[:, None].astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Kerple:
    """-r1 log(1 + r2 |i - j|) with weights r1, r2 > 0: Chi et al. 2022, arXiv 2205.09921, equation 3 (logarithmic)."""

    size: int = dataclasses.field(default=2, init=False)

    def __call__(self, weights: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        return -weights[0] * jnp.log1p(weights[1] * abs(i - j))


@dataclasses.dataclass(frozen=True)
class Sandwich:
    """w sum_k cos((i - j) / 10000^(2k / width)), k = 1..width / 2, with one weight w.

    Chi et al. 2023, arXiv 2212.10356, section 4.
    """

    width: int
    size: int = dataclasses.field(default=1, init=False)

    def __call__(self, weights: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        distance = (i - j).astype(weights.dtype)
        total = jnp.zeros_like(distance)
        for k in range(1, self.width // 2 + 1):
            total += jnp.cos(distance / 10_000 ** (2 * k / self.width))
        return weights[0] * total


@dataclasses.dataclass(frozen=True)
class Buckets:
    """A weight for each bucket of distances, of which the larger half grow by a factor up to `farthest`.

    Raffel et al. 2020, arXiv 1910.10683, section 2.1. With `causal` all buckets are for keys before the query, else the
    second half of them is for keys after it. T5's own code computes the logarithm in float32, as is done here.
    """

    count: int = 32
    farthest: int = 128
    causal: bool = True

    def __post_init__(self) -> None:
        if self.count < 4 or self.count % 4:
            raise ValueError(f"attention: count of buckets must be a multiple of 4, got {self.count}")

    @property
    def size(self) -> int:
        return self.count

    def bucket(self, i: jax.Array, j: jax.Array) -> jax.Array:
        """int32, the bucket of each pair of positions."""
        distance = i - j
        count = self.count if self.causal else self.count // 2
        offset = 0 if self.causal else jnp.where(distance < 0, count, 0)
        distance = jnp.maximum(distance, 0) if self.causal else jnp.abs(distance)
        exact = count // 2
        ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(self.farthest / exact)
        far = jnp.minimum(exact + (ratio * (count - exact)).astype(jnp.int32), count - 1)
        return offset + jnp.where(distance < exact, distance, far)

    def __call__(self, weights: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        return weights[self.bucket(i, j)]
