"""Kernels in which the 32 threads of a warp share the channels of a token.

Its sums over channels are exchanges in the warp, and warps share nothing: there is no shared memory and no barrier.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from seqmodels.kernels import lanes
from seqmodels.kernels.lanes import THREADS, Lanes, load_vector, store_vector

WARP = 32  # threads
LINE = 128  # bytes that the caches fetch


class Share(NamedTuple):
    """What a warp has at once: tokens, and a thread's bytes of a token in one load."""

    tokens: int
    bytes: int


def launch(
    body: Callable[..., None], out: Sequence[jax.ShapeDtypeStruct], tokens: int, share: Share
) -> Callable[..., Any]:
    """The kernel of a body, in blocks of four warps."""
    blocks = -(-tokens // (share.tokens * (THREADS // WARP)))
    return lanes.kernel(body, out_type=tuple(out), grid=(blocks,), grid_names=("block",))


class Warp:
    """Inside a kernel: the tokens and the channels of each thread.

    Attributes:
        lane: [128] int32, number of the thread in its warp.
        tokens: arrays [128] int32. Behind the last token it is the last one again: several warps then write the same
            numbers.
    """

    def __init__(self, share: Share, tokens: int, width: int, dtype: DTypeLike) -> None:
        self.width, most = width, share.bytes // jnp.dtype(dtype).itemsize
        self.vector = next(n for n in (8, 4, 2, 1) if n <= most and width % (n * WARP) == 0)
        thread = lanes.thread_index()
        self.lane = thread & (WARP - 1)
        first = (lax.axis_index("block") * (THREADS // WARP) + (thread >> 5)) * share.tokens
        self.tokens = [jnp.minimum(first + j, tokens - 1) for j in range(share.tokens)]

    def prefetch(self, *refs: Any) -> None:
        """Start to bring what arrays [M, .., D] have of the tokens to the second cache: a round has too few loads."""
        for token in self.tokens:
            for ref in refs:
                size = math.prod(ref.shape[1:])
                line = LINE // jnp.dtype(ref.dtype).itemsize
                for first in range(0, size, WARP * line):
                    lanes.prefetch(ref, token * size + jnp.minimum(first + self.lane * line, size - 1))

    def rounds(self, part: Callable[[jax.Array, Any], Any], carry: Any) -> Any:
        """Apply `part(channel, carry)` to all channels; a thread has `vector` of them at once, from `channel` on."""
        size = WARP * self.vector

        def step(index, carry):
            return part(index * size + self.lane * self.vector, carry)

        return lax.fori_loop(0, self.width // size, step, carry)

    def load(self, ref: Any, offset: jax.Array) -> Lanes:
        """The thread's numbers of an array, `vector` arrays [128] float32."""
        return load_vector(ref, offset, self.vector)

    def scalars(self, ref: Any, row: jax.Array, size: int) -> list[jax.Array]:
        """A row of an array [.., size], as arrays [128] float32."""
        return [load_vector(ref, row * size, 1, at=i)[0] for i in range(size)]

    def store_scalars(self, ref: Any, row: jax.Array, values: Sequence[jax.Array]) -> None:
        """The counterpart of `scalars`; all threads of the warp have the same values."""
        for i, value in enumerate(values):
            store_vector(ref, row * len(values), (value,), at=i)


def across(x: jax.Array) -> jax.Array:
    """The sum over the threads of a warp, in each of them."""
    distance = WARP // 2
    while distance:
        x, distance = x + lanes.exchange(x, distance), distance // 2
    return x


def plus(x: Lanes, factor: jax.Array, y: Lanes) -> Lanes:
    """x + factor y."""
    return tuple(a + factor * b for a, b in zip(x, y, strict=True))


def dot(a: Lanes, b: Lanes, total: jax.Array) -> jax.Array:
    """total + sum_j a_j b_j."""
    for x, y in zip(a, b, strict=True):
        total = total + x * y
    return total


def combined(weights: Sequence[jax.Array], streams: Sequence[Lanes]) -> Lanes:
    """sum_i weights_i streams_i."""
    total = tuple(weights[0] * x for x in streams[0])
    for weight, x in zip(weights[1:], streams[1:], strict=True):
        total = plus(total, weight, x)
    return total
