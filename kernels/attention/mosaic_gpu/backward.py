"""The backward pass: one kernel for the gradient of queries, and one for those of keys and values.

Both compute the weights P again from the saved logarithms of sums, and dS = P * (dO V^T - delta), delta = rowsum(o dO)
(Dao et al. 2022, arXiv 2205.14135, section 3). In the first a block has 128 queries and visits the keys that they see.
In the second it has 128 keys of a head and visits the queries that see them, of all heads that read this head of keys.
So every sum stays in registers, in a fixed order.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from seqmodels.kernels.attention.mosaic_gpu.block import WORKERS, Block, Kernel, Rules
from seqmodels.kernels.attention.mosaic_gpu.tables import Documents, Visits
from seqmodels.kernels.lanes import LOG2E
from seqmodels.kernels.tensor_cores import COLUMN, ROW, SIDE, along, gather, load, products, shared, zeros

KEYS = {64: 128, 128: 64}  # of a tile that queries visit, by the width of a head
QUERIES = {64: 64, 128: 64}  # of a tile that keys visit
SLOTS = 4  # visited tiles in shared memory


class Arrays(NamedTuple):
    """What both kernels read.

    Attributes:
        q, do: [B, T, H, d], do the gradient of o. k, v: [B, T, Hkv, d]. All of one dtype; T is a multiple of 128.
        lse: [B, H, T] float32, from `forward`. delta: [B, H, T] float32, sum over d of o do.
    """

    q: Array
    k: Array
    v: Array
    do: Array
    lse: Array
    delta: Array


@functools.partial(jax.jit, static_argnames="rules")
def queries_gradient(arrays: Arrays, visits: Visits, documents: Documents | None, *, rules: Rules) -> Array:
    """The gradient of q [B, T, H, d]. `visits` are of tiles of `KEYS` keys."""
    q, heads, width = arrays.q, *arrays.q.shape[2:]
    body = functools.partial(attention_dq, heads // arrays.k.shape[2])
    kernel = Kernel(body, "attention_dq", rules, KEYS[width], SLOTS, copies=2)
    own, tile = shared(WORKERS, SIDE, width, dtype=q.dtype), shared(SLOTS, KEYS[width], width, dtype=q.dtype)
    scratch = [own, own, tile, tile, plgpu.Barrier(num_arrivals=2, num_barriers=WORKERS)]
    return kernel(heads, arrays, visits, documents, jax.ShapeDtypeStruct(q.shape, q.dtype), scratch)


def attention_dq(group: int, block: Block, *refs: Any) -> None:
    """The kernel. `group`: heads that share a head of keys."""
    q, k, v, do, lse, delta, dq, q_s, do_s, k_s, v_s, loaded = refs
    b, h, thread, rows, rules = block.b, block.h, block.thread, block.rows, block.kernel.rules
    q_s, do_s, loaded = (x.at[thread] for x in (q_s, do_s, loaded))

    def copies(visit):
        at = b, block.part(visit), lax.div(h, jnp.int32(group))
        return [(k.at[at], k_s), (v.at[at], v_s)]

    def add(lse, delta, visit, sums):
        scores, dweights = products(
            (zeros(*block.shape), (q_s, k_s.at[visit.slot].transpose((1, 0)))),
            (zeros(*block.shape), (do_s, v_s.at[visit.slot].transpose((1, 0)))),
        )
        weights = jnp.exp2(scores * (rules.scale * LOG2E) - along(lse, 0, block.shape))
        (dscores,) = block.where_seen(visit, 0.0, weights * (dweights - along(delta, 0, block.shape)))
        (sums,) = products((sums, (dscores.astype(k_s.dtype), k_s.at[visit.slot])))
        return sums

    def work():
        for source, buffer in ((q, q_s), (do, do_s)):
            plgpu.copy_gmem_to_smem(source.at[b, rows, h], buffer, loaded)
        vectors = [gather(x.at[b, h, rows], ROW) for x in (lse, delta)]
        plgpu.barrier_wait(loaded)
        sums = block.visit_all(functools.partial(add, *vectors), zeros(SIDE, dq.shape[-1]))
        plgpu.commit_smem()  # all warps have read q_s
        q_s[...] = (sums * rules.scale).astype(dq.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_s, dq.at[b, rows, h])
        plgpu.wait_smem_to_gmem(0)

    block.run(copies, work)


@functools.partial(jax.jit, static_argnames="rules")
def keys_gradients(arrays: Arrays, visits: Visits, documents: Documents | None, *, rules: Rules) -> tuple[Array, Array]:
    """The gradients of k and v [B, T, Hkv, d]. `visits` are `by_keys`, of tiles of `QUERIES` queries."""
    k, kv_heads, width = arrays.k, *arrays.k.shape[2:]
    group, columns = arrays.q.shape[2] // kv_heads, QUERIES[width]
    body = functools.partial(attention_dkv, group)
    kernel = Kernel(body, "attention_dkv", rules, columns, SLOTS, copies=4, rounds=group, by_keys=True)
    own, tile = shared(WORKERS, SIDE, width, dtype=k.dtype), shared(SLOTS, columns, width, dtype=k.dtype)
    vector = plgpu.SMEM((SLOTS, columns), jnp.float32)
    scratch = [own, own, tile, tile, vector, vector, plgpu.Barrier(num_arrivals=2, num_barriers=WORKERS)]
    return kernel(kv_heads, arrays, visits, documents, (jax.ShapeDtypeStruct(k.shape, k.dtype),) * 2, scratch)


def attention_dkv(group: int, block: Block, *refs: Any) -> None:
    """The kernel. `group`: heads that share a head of keys."""
    q, k, v, do, lse, delta, dk, dv, k_s, v_s, q_s, do_s, lse_s, delta_s, loaded = refs
    b, h, thread, rows, rules = block.b, block.h, block.thread, block.rows, block.kernel.rules
    k_s, v_s, loaded = (x.at[thread] for x in (k_s, v_s, loaded))

    def copies(visit):
        part, head = block.part(visit), h * group + visit.round
        tiles = [(x.at[b, part, head], buffer) for x, buffer in ((q, q_s), (do, do_s))]
        return tiles + [(x.at[b, head, part], buffer) for x, buffer in ((lse, lse_s), (delta, delta_s))]

    def add(visit, sums):
        q, do, lse, delta = (x.at[visit.slot] for x in (q_s, do_s, lse_s, delta_s))
        scores, dweights = products(
            (zeros(*block.shape), (k_s, q.transpose((1, 0)))),
            (zeros(*block.shape), (v_s, do.transpose((1, 0)))),
        )
        weights = jnp.exp2(scores * (rules.scale * LOG2E) - along(load(lse, COLUMN), 1, block.shape))
        dscores = weights * (dweights - along(load(delta, COLUMN), 1, block.shape))
        weights, dscores = (x.astype(q_s.dtype) for x in block.where_seen(visit, 0.0, weights, dscores))
        return tuple(products((sums[0], (dscores, q)), (sums[1], (weights, do))))

    def work():
        for source, buffer in ((k, k_s), (v, v_s)):
            plgpu.copy_gmem_to_smem(source.at[b, rows, h], buffer, loaded)
        plgpu.barrier_wait(loaded)
        sums = block.visit_all(add, (zeros(SIDE, dk.shape[-1]), zeros(SIDE, dv.shape[-1])))
        plgpu.commit_smem()  # all warps have read k_s and v_s
        k_s[...] = (sums[0] * rules.scale).astype(dk.dtype)
        v_s[...] = sums[1].astype(dv.dtype)
        plgpu.commit_smem()
        for buffer, result in ((k_s, dk), (v_s, dv)):
            plgpu.copy_smem_to_gmem(buffer, result.at[b, rows, h])
        plgpu.wait_smem_to_gmem(0)

    block.run(copies, work)
