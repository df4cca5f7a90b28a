"""Gradients of queries, keys and decays, for each chunk separately, from the states before and after it.

With dP_ij = dy_i . v_j, D the decays inside the chunk, S the state before it and dS the gradient of the state after it,

    dq_i = sum_j D_ij dP_ij k_j + rin_i S dy_i,    dk_j = sum_i D_ij dP_ij q_i + wout_j dS v_j.

One warpgroup computes 64 columns of dq and dk for all value heads that share them, one head after the other. So the
sums over heads are in float32 and always in the same order.
"""

import functools
from typing import Any

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
    tiles = values // SIDE
    f32 = jnp.float32

    def body(q_g, k_g, v_g, dy_g, vectors_g, states_g, dstates_g, dq_g, dk_g, sums_g, *scratch):
        q_s, k_s, scores_s, v_s, dy_s, states_s, dstates_s, vectors_s, ready, full = scratch
        b, hk, tile, n = lax.axis_index("b"), lax.axis_index("hk"), lax.axis_index("tile"), lax.axis_index("n")
        time, key = pl.ds(n * SIDE, SIDE), pl.ds(tile * SIDE, SIDE)

        def fetch(step):
            h, value = hk * group + lax.div(step, tiles), pl.ds(lax.rem(step, tiles) * SIDE, SIDE)
            slot = lax.rem(step, SLOTS)
            for source, buffer in (
                (v_g.at[b, time, h, value], v_s),
                (dy_g.at[b, time, h, value], dy_s),
                (states_g.at[b, h, n, key, value], states_s),
                (dstates_g.at[b, h, n, key, value], dstates_s),
                (vectors_g.at[b, h, n], vectors_s),
            ):
                plgpu.copy_gmem_to_smem(source, buffer.at[slot], full.at[slot])

        def head(g, gradients):
            square = (SIDE, SIDE)

            def inputs(t, carry):
                """Add the terms of 64 columns of V: dP, and the parts of dq and dk through the states."""
                dp, dq, dk, corner = carry
                step = g * tiles + t
                slot = lax.rem(step, SLOTS)
                plgpu.barrier_wait(full.at[slot])
                read = (load(dy_s.at[slot]) * along(load(vectors_s.at[slot, 2], ROW), 0, square)).astype(v.dtype)
                wrote = (load(v_s.at[slot]) * along(load(vectors_s.at[slot, 3], ROW), 0, square)).astype(v.dtype)
                dp, dq, dk = products(
                    (dp, (dy_s.at[slot], v_s.at[slot].transpose((1, 0)))),
                    (dq, (read, states_s.at[slot].transpose((1, 0)))),
                    (dk, (wrote, dstates_s.at[slot].transpose((1, 0)))),
                )
                corner += jnp.sum(load(states_s.at[slot]) * load(dstates_s.at[slot]), axis=1)
                return dp, dq, dk, corner

            def refill(t):
                plgpu.commit_smem()  # all warps have finished with this slot
                step = g * tiles + t + SLOTS
                pl.when(step < group * tiles)(lambda: fetch(step))

            def several(t, carry):
                carry = inputs(t, carry)
                refill(t)
                return carry

            nothing = plgpu.layout_cast(jnp.zeros((SIDE,), f32), ROW)
            carry = (zeros(*square), zeros(*square), zeros(*square), nothing)
            carry = lax.fori_loop(0, tiles - 1, several, carry)
            dp, dq, dk, corner = inputs(tiles - 1, carry)
            last = lax.rem((g + 1) * tiles - 1, SLOTS)
            dp = decayed(dp, vectors_s, last, False, strict).astype(v.dtype)
            dq, dk = (only_of_state(x, vectors_s.at[last, row]) for x, row in ((dq, 2), (dk, 3)))
            plgpu.commit_smem()  # all warps have read the scores of the previous head
            scores_s[...] = dp
            refill(tiles - 1)
            dq, dk_near = products((dq, (dp, k_s)), (zeros(*square), (scores_s.transpose((1, 0)), q_s)))
            queries, own = load(q_s), load(k_s)
            sums = [queries * dq, own * dk_near, own * dk]
            for i, total in enumerate([*(jnp.sum(x, axis=1) for x in sums), corner]):
                sums_g[tile, b, hk * group + g, n, i] = total
            return gradients[0] + dq, gradients[1] + dk + dk_near

        plgpu.copy_gmem_to_smem(q_g.at[b, time, hk, key], q_s, ready)
        plgpu.copy_gmem_to_smem(k_g.at[b, time, hk, key], k_s, ready)
        for first in range(min(SLOTS, group * tiles)):
            fetch(jnp.int32(first))
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
