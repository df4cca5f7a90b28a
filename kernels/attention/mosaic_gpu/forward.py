"""The forward pass: each block has 128 queries of a head, and visits the tiles of keys that they see.

Two warpgroups have 64 queries each. They take turns: while one computes exponentials, the other one's products run
(Shah et al. 2024, FlashAttention-3, arXiv 2407.08608, section 3.1; as in jax's sample attention_mgpu.py). A third one
copies keys and values.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from seqmodels.kernels.attention.mosaic_gpu.tables import Documents, Tiles, Visits
from seqmodels.kernels.attention.mosaic_gpu.tile import (
    ROWS,
    WORKER_REGISTERS,
    WORKERS,
    Rules,
    Stream,
    kernel,
    where_seen,
)
from seqmodels.kernels.lanes import LOG2E
from seqmodels.kernels.tensor_cores import ROW, SIDE, along, products, shared, zeros

KEYS = 128  # of a tile
SLOTS = {64: 4, 128: 2}  # tiles of keys and values in shared memory, by the width of a head
LOWEST = float(jnp.finfo(jnp.float32).min)
TILES = Tiles(ROWS, KEYS)


@functools.partial(jax.jit, static_argnames="rules")  # traced once per shape, not per layer
def forward(
    q: Array, k: Array, v: Array, visits: Visits, documents: Documents | None, *, rules: Rules
) -> tuple[Array, Array]:
    """o [B, T, H, d], and [B, H, T] float32: the logarithms to base 2 of the sums of exponentials, 0 where it is empty.

    Args:
        q: [B, T, H, d], k, v: [B, T, Hkv, d]; T is a multiple of 128.
        visits: those of `TILES`.
    """
    batch, length, heads, width = q.shape
    group, slots, tiles = heads // k.shape[2], SLOTS[width], length // ROWS
    factor = rules.scale * LOG2E

    def attention(*refs):
        q, k, v, order, span, *ids, o, lse, q_s, lse_s, k_s, v_s, loaded, full, empty, turn = refs
        b, h, thread = lax.axis_index("b"), lax.axis_index("h"), lax.axis_index("thread")
        tile = tiles - 1 - lax.axis_index("tile")  # with a causal mask the last have the most work
        own = b if order.shape[0] > 1 else 0
        first = span[own, tile, 0]
        stream = Stream(order.at[own, tile], first, span[own, tile, 1] - first, 1, slots, full, empty)
        row = tile * ROWS + thread * SIDE

        def copy():
            at = lambda n: (b, pl.ds(n * KEYS, KEYS), lax.div(h, jnp.int32(group)))  # noqa: E731
            stream.copy(lambda n, _: [(k.at[at(n)], k_s), (v.at[at(n)], v_s)])

        def take_turn():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def step(n, carry):
            sums, highest, total = carry
            slot = stream.slot(n)
            number, partly, _ = stream.at(n)
            plgpu.barrier_wait(full.at[slot])
            keys = k_s.at[slot].transpose((1, 0))
            (scores,) = products((zeros(SIDE, KEYS), (q_s.at[thread], keys)), meanwhile=take_turn)

            column = number * KEYS
            documents = (ids[0].at[b, pl.ds(row, SIDE)], ids[1].at[b, pl.ds(column, KEYS)]) if ids else None
            (scores,) = where_seen(rules, partly, (scores,), -jnp.inf, row, column, documents)
            before, highest = highest, jnp.maximum(highest, jnp.max(scores, axis=1) * factor)
            weights = jnp.exp2(scores * factor - along(highest, 0, scores.shape))
            fading = jnp.exp2(before - highest)
            sums, total = sums * along(fading, 0, sums.shape), total * fading + jnp.sum(weights, axis=1)
            weights = weights.astype(v_s.dtype)
            # what the other one waits for is done; the compiler must not move it behind the barrier
            sums, highest, total, weights = lax.optimization_barrier((sums, highest, total, weights))
            take_turn()
            (sums,) = products((sums, (weights, v_s.at[slot])))
            plgpu.barrier_arrive(empty.at[slot])
            return sums, highest, total

        def work():
            plgpu.set_max_registers(WORKER_REGISTERS, action="increase")
            plgpu.copy_gmem_to_smem(q.at[b, pl.ds(row, SIDE), h], q_s.at[thread], loaded.at[thread])
            plgpu.barrier_wait(loaded.at[thread])
            pl.when(thread == 1)(take_turn)
            start = (plgpu.layout_cast(jnp.full((SIDE,), x, jnp.float32), ROW) for x in (LOWEST, 0))
            sums, highest, total = lax.fori_loop(0, stream.count, step, (zeros(SIDE, width), *start))
            pl.when(thread == 0)(take_turn)
            some = total > 0
            inverse = jnp.where(some, 1 / jnp.where(some, total, 1.0), 0.0)
            q_s.at[thread][...] = (sums * along(inverse, 0, sums.shape)).astype(o.dtype)
            lse_s.at[thread][...] = jnp.where(some, highest + jnp.log2(jnp.where(some, total, 1.0)), 0.0)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_s.at[thread], o.at[b, pl.ds(row, SIDE), h])
            plgpu.copy_smem_to_gmem(lse_s.at[thread], lse.at[b, h, pl.ds(row, SIDE)])
            plgpu.wait_smem_to_gmem(0)

        pl.when(thread == WORKERS)(copy)
        pl.when(thread < WORKERS)(work)

    call = kernel(
        attention,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ),
        scratch_types=[
            shared(WORKERS, SIDE, width, dtype=q.dtype),
            plgpu.SMEM((WORKERS, SIDE), jnp.float32),
            shared(slots, KEYS, width, dtype=q.dtype),
            shared(slots, KEYS, width, dtype=q.dtype),
            plgpu.Barrier(num_barriers=WORKERS),
            plgpu.Barrier(num_arrivals=2, num_barriers=slots),
            plgpu.Barrier(num_arrivals=WORKERS, num_barriers=slots),
            plgpu.Barrier(num_arrivals=WORKERS),
        ],
        grid=(batch, heads, tiles),
        grid_names=("b", "h", "tile"),
    )
    return call(q, k, v, *visits, *(documents or ()))
