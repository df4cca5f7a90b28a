"""The forward pass: a block has 128 queries of a head, and visits the tiles of keys that they see.

Two warpgroups take turns: while one computes exponentials, the products of the other one run (Shah et al. 2024,
FlashAttention-3, arXiv 2407.08608, section 3.1; jax's sample `attention_mgpu.py` does the same).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from seqmodels.kernels.attention.mosaic_gpu.block import WORKERS, Block, Kernel, Rules, Visit
from seqmodels.kernels.attention.mosaic_gpu.tables import Given, Visits
from seqmodels.kernels.lanes import LOG2E
from seqmodels.kernels.tensor_cores import ROW, SIDE, along, products, shared, zeros

KEYS = 128  # of a tile
SLOTS = {64: 4, 128: 2}  # tiles of keys and values in shared memory, by the width of a head
LOWEST = float(jnp.finfo(jnp.float32).min)


@functools.partial(jax.jit, static_argnames="rules")  # traced once per shape, not per layer
def forward(q: Array, k: Array, v: Array, visits: Visits, given: Given, *, rules: Rules) -> tuple[Array, Array]:
    """o [B, T, H, d], and [B, H, T] float32: the logarithms to base 2 of the sums of exponentials, 0 where it is empty.

    Args:
        q: [B, T, H, d], k, v: [B, T, Hkv, d]; T is a multiple of 128.
        visits: of tiles of `KEYS` keys.
    """
    batch, length, heads, width = q.shape
    body = functools.partial(attention, heads // k.shape[2])
    kernel = Kernel(body, "attention", rules, KEYS, SLOTS[width], copies=2, own=1)
    tile = shared(kernel.slots, KEYS, width, dtype=q.dtype)
    scratch = [
        shared(WORKERS, 2, SIDE, width, dtype=q.dtype),
        plgpu.SMEM((WORKERS, SIDE), jnp.float32),
        tile,
        tile,
        plgpu.Barrier(num_arrivals=WORKERS),
    ]
    lse = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
    return kernel(heads, (q, k, v), visits, given, (jax.ShapeDtypeStruct(q.shape, q.dtype), lse), scratch)


def attention(group: int, block: Block, *refs: Any) -> None:
    """The kernel. `group`: heads that share a head of keys."""
    q, k, v, o, lse, q_s, lse_s, k_s, v_s, turn = refs
    thread = block.thread

    def own(here):
        return [(q.at[here.b, here.rows, here.h], q_s.at[thread, here.half])]

    def visited(here, visit):
        at = here.b, here.part(visit), lax.div(here.h, jnp.int32(group))
        return [(k.at[at], k_s), (v.at[at], v_s)]

    def take_turn():
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    def work(here):
        pl.when((thread == 1) & (here.n == 0))(take_turn)
        own_q, own_lse, rows = q_s.at[thread, here.half], lse_s.at[thread], here.rows
        empty = (plgpu.layout_cast(jnp.full((SIDE,), x, jnp.float32), ROW) for x in (LOWEST, 0))
        one = functools.partial(attend, here, own_q, k_s, v_s, take_turn)
        values, highest, total = here.visit_all(one, (zeros(SIDE, o.shape[-1]), *empty))
        pl.when((thread == 0) & (here.n == here.mine - 1))(take_turn)
        some = total > 0
        total = jnp.where(some, total, 1.0)
        own_q[...] = (values * along(jnp.where(some, 1 / total, 0.0), 0, values.shape)).astype(o.dtype)
        own_lse[...] = jnp.where(some, highest + jnp.log2(total), 0.0)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own_q, o.at[here.b, rows, here.h])
        plgpu.copy_smem_to_gmem(own_lse, lse.at[here.b, here.h, rows])

    block.run(own, visited, work)


def attend(
    block: Block, q_s: Any, k_s: Any, v_s: Any, take_turn: Any, visit: Visit, sums: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array]:
    """Add a tile of keys to the sums of this warpgroup's queries: values [64, d], the highest score and the total [64].

    Scores are logarithms to base 2. A query that has seen nothing has the highest score `LOWEST` and the total 0.
    """
    values, before, total = sums
    factor = block.kernel.rules.scale * LOG2E
    start = zeros(*block.shape), (q_s, k_s.at[visit.slot].transpose((1, 0)))
    (scores,) = products(start, meanwhile=take_turn)
    (scores,) = block.where_seen(visit, -jnp.inf, scores)
    highest = jnp.maximum(before, jnp.max(scores, axis=1) * factor)
    weights = jnp.exp2(scores * factor - along(highest, 0, scores.shape))
    fading = jnp.exp2(before - highest)
    values, total = values * along(fading, 0, values.shape), total * fading + jnp.sum(weights, axis=1)
    # the other one waits for this to be done; the compiler must not move it behind the barrier
    values, highest, total, factors = lax.optimization_barrier((values, highest, total, weights.astype(v_s.dtype)))
    take_turn()
    (values,) = products((values, (factors, v_s.at[visit.slot])))
    return values, highest, total
