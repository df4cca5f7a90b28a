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
from seqmodels.kernels.attention.mosaic_gpu.tables import Given, Visits
from seqmodels.kernels.lanes import LOG2E
from seqmodels.kernels.tensor_cores import COLUMN, ROW, SIDE, along, gather, load, products, shared, zeros

KEYS = {64: 128, 128: 64}  # of a tile that queries visit, by the width of a head
QUERIES = {64: 64, 128: 64}  # of a tile that keys visit
SLOTS = {64: 4, 128: 3}  # visited tiles in shared memory


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
def queries_gradient(arrays: Arrays, visits: Visits, given: Given, *, rules: Rules) -> Array:
    """The gradient of q [B, T, H, d]. `visits` are of tiles of `KEYS` keys."""
    q, heads, width = arrays.q, *arrays.q.shape[2:]
    body = functools.partial(attention_dq, heads // arrays.k.shape[2])
    kernel = Kernel(body, "attention_dq", rules, KEYS[width], SLOTS[width], copies=2, own=2)
    own, tile = (shared(*n, width, dtype=q.dtype) for n in ((WORKERS, 2, SIDE), (kernel.slots, KEYS[width])))
    out = jax.ShapeDtypeStruct(q.shape, q.dtype)
    return kernel(heads, arrays, visits, given, out, [own, own, tile, tile])


def attention_dq(group: int, block: Block, *refs: Any) -> None:
    """The kernel. `group`: heads that share a head of keys."""
    q, k, v, do, lse, delta, dq, q_s, do_s, k_s, v_s = refs
    thread, rules = block.thread, block.kernel.rules

    def own(here):
        return [(x.at[here.b, here.rows, here.h], y.at[thread, here.half]) for x, y in ((q, q_s), (do, do_s))]

    def visited(here, visit):
        at = here.b, here.part(visit), lax.div(here.h, jnp.int32(group))
        return [(k.at[at], k_s), (v.at[at], v_s)]

    def add(here, lse, delta, visit, sums):
        keys, values = k_s.at[visit.slot], v_s.at[visit.slot]
        scores, dweights = products(
            (zeros(*here.shape), (q_s.at[thread, here.half], keys.transpose((1, 0)))),
            (zeros(*here.shape), (do_s.at[thread, here.half], values.transpose((1, 0)))),
        )
        weights = jnp.exp2(scores * (rules.scale * LOG2E) - along(lse, 0, here.shape))
        (dscores,) = here.where_seen(visit, 0.0, weights * (dweights - along(delta, 0, here.shape)))
        (sums,) = products((sums, (dscores.astype(k_s.dtype), keys)))
        return sums

    def work(here):
        vectors = [gather(x.at[here.b, here.h, here.rows], ROW) for x in (lse, delta)]
        sums = here.visit_all(functools.partial(add, here, *vectors), zeros(SIDE, dq.shape[-1]))
        plgpu.commit_smem()  # all warps have read q_s
        result = q_s.at[thread, here.half]
        result[...] = (sums * rules.scale).astype(dq.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(result, dq.at[here.b, here.rows, here.h])

    block.run(own, visited, work)


@functools.partial(jax.jit, static_argnames="rules")
def keys_gradients(arrays: Arrays, visits: Visits, given: Given, *, rules: Rules) -> tuple[Array, Array]:
    """The gradients of k and v [B, T, Hkv, d]. `visits` are `by_keys`, of tiles of `QUERIES` queries."""
    k, kv_heads, width = arrays.k, *arrays.k.shape[2:]
    group, columns = arrays.q.shape[2] // kv_heads, QUERIES[width]
    body = functools.partial(attention_dkv, group)
    sizes: Any = dict(copies=4, own=2, rounds=group, by_keys=True, stays=width == 64)
    kernel = Kernel(body, "attention_dkv", rules, columns, SLOTS[width], **sizes)
    own, tile = (shared(*n, width, dtype=k.dtype) for n in ((WORKERS, 2, SIDE), (kernel.slots, columns)))
    vector = plgpu.SMEM((kernel.slots, columns), jnp.float32)
    out = (jax.ShapeDtypeStruct(k.shape, k.dtype),) * 2
    return kernel(kv_heads, arrays, visits, given, out, [own, own, tile, tile, vector, vector])


def attention_dkv(group: int, block: Block, *refs: Any) -> None:
    """The kernel. `group`: heads that share a head of keys."""
    q, k, v, do, lse, delta, dk, dv, k_s, v_s, q_s, do_s, lse_s, delta_s = refs
    thread, rules = block.thread, block.kernel.rules

    def own(here):
        return [(x.at[here.b, here.rows, here.h], y.at[thread, here.half]) for x, y in ((k, k_s), (v, v_s))]

    def visited(here, visit):
        part, head = here.part(visit), here.h * group + visit.round
        tiles = [(x.at[here.b, part, head], buffer) for x, buffer in ((q, q_s), (do, do_s))]
        return tiles + [(x.at[here.b, head, part], buffer) for x, buffer in ((lse, lse_s), (delta, delta_s))]

    def add(here, visit, sums):
        q, do, lse, delta = (x.at[visit.slot] for x in (q_s, do_s, lse_s, delta_s))
        scores, dweights = products(
            (zeros(*here.shape), (k_s.at[thread, here.half], q.transpose((1, 0)))),
            (zeros(*here.shape), (v_s.at[thread, here.half], do.transpose((1, 0)))),
        )
        weights = jnp.exp2(scores * (rules.scale * LOG2E) - along(load(lse, COLUMN), 1, here.shape))
        dscores = weights * (dweights - along(load(delta, COLUMN), 1, here.shape))
        weights, dscores = (x.astype(q_s.dtype) for x in here.where_seen(visit, 0.0, weights, dscores))
        return tuple(products((sums[0], (dscores, q)), (sums[1], (weights, do))))

    def work(here):
        sums = here.visit_all(functools.partial(add, here), (zeros(SIDE, dk.shape[-1]), zeros(SIDE, dv.shape[-1])))
        plgpu.commit_smem()  # all warps have read k_s and v_s
        for x, factor, buffer in zip(sums, (rules.scale, 1.0), (k_s, v_s), strict=True):
            buffer.at[thread, here.half][...] = (x * factor).astype(buffer.dtype)
        plgpu.commit_smem()
        for buffer, result in ((k_s, dk), (v_s, dv)):
            plgpu.copy_smem_to_gmem(buffer.at[thread, here.half], result.at[here.b, here.rows, here.h])

    block.run(own, visited, work)
