"""Gradients of queries, keys and decays, for each chunk separately, from the states before and after it.

With dP_ij = dy_i . v_j, D the decays inside the chunk, S the state before it and dS the gradient of the state after it,

    dq_i = sum_j D_ij dP_ij k_j + rin_i S dy_i,    dk_j = sum_i D_ij dP_ij q_i + wout_j dS v_j.

One warpgroup computes 64 columns of dq and dk for all value heads that share them, one head after the other. So the
sums over heads are in float32 and always in the same order.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from seqmodels.kernels import lanes
from seqmodels.kernels.linear_attention.mosaic_gpu.tile import SLOTS, decayed
from seqmodels.kernels.linear_attention.mosaic_gpu.walk import VECTORS
from seqmodels.kernels.tensor_cores import ROW, SIDE, along, load, products, shared, zeros

SUMS = 4


def only_of_state(x: jax.Array, vector: Any) -> jax.Array:
    """Rows of x [64, 64] of the tokens whose document is the state's, zeros for others: their product was 0 * state."""
    return jnp.where(along(load(vector, ROW), 0, (SIDE, SIDE)) == 0, 0, x)


class Slots(NamedTuple):
    """Shared memory for what a step reads, `SLOTS` times: tiles [64, 64], and `vectors` as for `walk`."""

    v: Any
    dy: Any
    states: Any
    dstates: Any
    vectors: Any


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Inside the kernel: one chunk and 64 columns of K. A step is 64 columns of V of one head, head by head.

    Attributes:
        group: value heads that share the columns. tiles: steps of each.
        strict: tokens do not see themselves. dtype: of the factors.
        q, k, scores: tiles in shared memory.
        sources: what a step reads, in global memory, by the number of the head and its columns of V.
        slots, full: where to, and the barriers that signal that it is there.
    """

    group: int
    tiles: int
    strict: bool
    dtype: Any
    q: Any
    k: Any
    scores: Any
    sources: Callable[[jax.Array, Any], tuple[Any, ...]]
    slots: Slots
    full: Any

    @property
    def steps(self) -> int:
        return self.group * self.tiles

    def fetch(self, step: jax.Array) -> None:
        """Start the copies of a step."""
        value, slot = pl.ds(lax.rem(step, self.tiles) * SIDE, SIDE), lax.rem(step, SLOTS)
        for source, buffer in zip(self.sources(lax.div(step, self.tiles), value), self.slots, strict=True):
            plgpu.copy_gmem_to_smem(source, buffer.at[slot], self.full.at[slot])

    def refill(self, step: jax.Array) -> None:
        """Fetch into the slot of a step that is done."""
        plgpu.commit_smem()  # all warps have finished with this slot
        pl.when(step + SLOTS < self.steps)(lambda: self.fetch(step + SLOTS))

    def add(self, step: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Add the terms of a step: to dP, to the parts of dq and dk through the states, and to dS . S."""
        dp, dq, dk, corner = sums
        slot = lax.rem(step, SLOTS)
        plgpu.barrier_wait(self.full.at[slot])
        v, dy, states, dstates, vectors = (buffer.at[slot] for buffer in self.slots)
        read, wrote = (
            (load(x) * along(load(vectors.at[row], ROW), 0, (SIDE, SIDE))).astype(self.dtype)
            for x, row in ((dy, 2), (v, 3))
        )
        dp, dq, dk = products(
            (dp, (dy, v.transpose((1, 0)))),
            (dq, (read, states.transpose((1, 0)))),
            (dk, (wrote, dstates.transpose((1, 0)))),
        )
        return dp, dq, dk, corner + jnp.sum(load(states) * load(dstates), axis=1)

    def of_head(self, g: jax.Array) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
        """dq and dk [64, 64] of a head, and its four sums [64], as `keys_gradient` returns them."""
        first, last = g * self.tiles, (g + 1) * self.tiles - 1

        def several(t, sums):
            sums = self.add(first + t, sums)
            self.refill(first + t)
            return sums

        square = (SIDE, SIDE)
        nothing = plgpu.layout_cast(jnp.zeros((SIDE,), jnp.float32), ROW)
        sums = lax.fori_loop(0, self.tiles - 1, several, (zeros(*square), zeros(*square), zeros(*square), nothing))
        dp, dq, dk, corner = self.add(last, sums)
        vectors, slot = self.slots.vectors, lax.rem(last, SLOTS)
        dp = decayed(dp, vectors, slot, False, self.strict).astype(self.dtype)
        dq, dk = (only_of_state(x, vectors.at[slot, row]) for x, row in ((dq, 2), (dk, 3)))
        plgpu.commit_smem()  # all warps have read the scores of the previous head
        self.scores[...] = dp
        self.refill(last)
        dq, dk_near = products((dq, (dp, self.k)), (zeros(*square), (self.scores.transpose((1, 0)), self.q)))
        queries, own = load(self.q), load(self.k)
        sums = [jnp.sum(x, axis=1) for x in (queries * dq, own * dk_near, own * dk)]
        return dq, dk + dk_near, [*sums, corner]


@functools.partial(jax.jit, static_argnames="strict")  # traced once per shape, not per layer
def keys_gradient(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    dy: jax.Array,
    vectors: jax.Array,
    states: jax.Array,
    dstates: jax.Array,
    *,
    strict: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q and k, and the sums from which the gradients of the decays are computed.

    Args:
        q, k: [B, T, Hk, K]. v, dy: [B, T, H, V]. vectors: as for `walk`.
        states: [B, H, T / 64, K, V], the state before each chunk.
        dstates: the gradient of the state after each chunk. strict: tokens do not see themselves.

    Returns:
        dq, dk, and sums [K / 64, B, H, T / 64, 4, 64] float32. The four sums for each 64 columns of K are: q . dq of
        each token; k . dk of each token through the chunk's reads; k . dk of each token through the state after the
        chunk; and dS . S of each column.
    """
    batch, length, key_heads, keys = k.shape
    heads, values = v.shape[2:]
    group = heads // key_heads
    f32 = jnp.float32

    def body(q_g, k_g, v_g, dy_g, vectors_g, states_g, dstates_g, dq_g, dk_g, sums_g, *scratch):
        q_s, k_s, scores_s, *slots, ready, full = scratch
        b, hk, tile, n = lax.axis_index("b"), lax.axis_index("hk"), lax.axis_index("tile"), lax.axis_index("n")
        time, key = pl.ds(n * SIDE, SIDE), pl.ds(tile * SIDE, SIDE)

        def sources(g, value):
            h = hk * group + g
            tokens, state = (b, time, h, value), (b, h, n, key, value)
            return v_g.at[tokens], dy_g.at[tokens], states_g.at[state], dstates_g.at[state], vectors_g.at[b, h, n]

        chunk = Chunk(group, values // SIDE, strict, v.dtype, q_s, k_s, scores_s, sources, Slots(*slots), full)

        def head(g, gradients):
            dq, dk, sums = chunk.of_head(g)
            for i, total in enumerate(sums):
                sums_g[tile, b, hk * group + g, n, i] = total
            return gradients[0] + dq, gradients[1] + dk

        plgpu.copy_gmem_to_smem(q_g.at[b, time, hk, key], q_s, ready)
        plgpu.copy_gmem_to_smem(k_g.at[b, time, hk, key], k_s, ready)
        for first in range(min(SLOTS, chunk.steps)):
            chunk.fetch(jnp.int32(first))
        plgpu.barrier_wait(ready)
        dq, dk = lax.fori_loop(0, group, head, (zeros(SIDE, SIDE), zeros(SIDE, SIDE)))
        plgpu.commit_smem()
        q_s[...] = dq.astype(q.dtype)
        k_s[...] = dk.astype(k.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_s, dq_g.at[b, time, hk, key])
        plgpu.copy_smem_to_gmem(k_s, dk_g.at[b, time, hk, key])
        plgpu.wait_smem_to_gmem(0)

    sds, slots = jax.ShapeDtypeStruct, shared(SLOTS, SIDE, SIDE, dtype=v.dtype)
    tile = shared(SIDE, SIDE, dtype=v.dtype)
    kernel = lanes.kernel(
        body,
        out_type=(
            sds(q.shape, q.dtype),
            sds(k.shape, k.dtype),
            sds((keys // SIDE, batch, heads, length // SIDE, SUMS, SIDE), f32),
        ),
        scratch_types=[tile] * 3
        + [slots] * 4
        + [plgpu.SMEM((SLOTS, VECTORS, SIDE), f32), plgpu.Barrier(num_arrivals=2)]
        + [plgpu.Barrier(num_barriers=SLOTS, num_arrivals=5)],
        grid=(batch, key_heads, keys // SIDE, length // SIDE),
        grid_names=("b", "hk", "tile", "n"),
    )
    return kernel(q, k, v, dy, vectors, states, dstates)
