"""The backward pass: one kernel for the gradient of queries, and one for those of keys and values.

Both compute the weights P again from the saved logarithms of sums, and dS = P * (dO V^T - delta), delta = rowsum(o dO)
(Dao et al. 2022, arXiv 2205.14135, section 3). The first has 128 queries in a block and visits the keys that they see,
the second 128 keys of a head, and visits the queries that see them, of all heads that read this head of keys. So every
sum stays in registers, in a fixed order.
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
from seqmodels.kernels.tensor_cores import COLUMN, ROW, SIDE, along, gather, load, products, shared, zeros

KEYS = {64: 128, 128: 64}  # of a tile that queries visit, by the width of a head
QUERIES = {64: 64, 128: 64}  # of a tile that keys visit
SLOTS = 4  # visited tiles in shared memory


def query_tiles(width: int) -> Tiles:
    """Sizes of the tiles of `queries_gradient`."""
    return Tiles(ROWS, KEYS[width])


def key_tiles(width: int) -> Tiles:
    """Sizes of the tiles of `keys_gradients`."""
    return Tiles(ROWS, QUERIES[width])


@functools.partial(jax.jit, static_argnames="rules")
def queries_gradient(
    q: Array,
    k: Array,
    v: Array,
    do: Array,
    lse: Array,
    delta: Array,
    visits: Visits,
    documents: Documents | None,
    *,
    rules: Rules,
) -> Array:
    """The gradient of q [B, T, H, d].

    Args:
        q, k, v: as for `forward`. do: [B, T, H, d], gradient of o, in the dtype of q.
        lse: [B, H, T] float32, from `forward`. delta: [B, H, T] float32, sum over d of o do.
        visits: those of `query_tiles`.
    """
    batch, length, heads, width = q.shape
    group, tiles, columns = heads // k.shape[2], length // ROWS, KEYS[width]

    def attention_dq(*refs):
        q, k, v, do, lse, delta, order, span, *ids, dq, q_s, do_s, k_s, v_s, loaded, full, empty = refs
        b, h, thread = lax.axis_index("b"), lax.axis_index("h"), lax.axis_index("thread")
        tile = tiles - 1 - lax.axis_index("tile")  # with a causal mask the last have the most work
        own = b if order.shape[0] > 1 else 0
        first = span[own, tile, 0]
        stream = Stream(order.at[own, tile], first, span[own, tile, 1] - first, 1, SLOTS, full, empty)
        row = tile * ROWS + thread * SIDE
        rows, shape = pl.ds(row, SIDE), (SIDE, columns)

        def copy():
            at = lambda n: (b, pl.ds(n * columns, columns), lax.div(h, jnp.int32(group)))  # noqa: E731
            stream.copy(lambda n, _: [(k.at[at(n)], k_s), (v.at[at(n)], v_s)])

        def step(lse_row, delta_row, n, sums):
            slot = stream.slot(n)
            number, partly, _ = stream.at(n)
            plgpu.barrier_wait(full.at[slot])
            scores, dweights = products(
                (zeros(*shape), (q_s.at[thread], k_s.at[slot].transpose((1, 0)))),
                (zeros(*shape), (do_s.at[thread], v_s.at[slot].transpose((1, 0)))),
            )
            weights = jnp.exp2(scores * (rules.scale * LOG2E) - along(lse_row, 0, shape))
            dscores = weights * (dweights - along(delta_row, 0, shape))

            column = number * columns
            documents = (ids[0].at[b, rows], ids[1].at[b, pl.ds(column, columns)]) if ids else None
            (dscores,) = where_seen(rules, partly, (dscores,), 0.0, row, column, documents)
            (sums,) = products((sums, (dscores.astype(k_s.dtype), k_s.at[slot])))
            plgpu.barrier_arrive(empty.at[slot])
            return sums

        def work():
            plgpu.set_max_registers(WORKER_REGISTERS, action="increase")
            for source, buffer in ((q, q_s), (do, do_s)):
                plgpu.copy_gmem_to_smem(source.at[b, rows, h], buffer.at[thread], loaded.at[thread])
            vectors = [gather(x.at[b, h, rows], ROW) for x in (lse, delta)]
            plgpu.barrier_wait(loaded.at[thread])
            sums = lax.fori_loop(0, stream.count, functools.partial(step, *vectors), zeros(SIDE, width))
            plgpu.commit_smem()  # all warps have read q_s
            q_s.at[thread][...] = (sums * rules.scale).astype(dq.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_s.at[thread], dq.at[b, rows, h])
            plgpu.wait_smem_to_gmem(0)

        pl.when(thread == WORKERS)(copy)
        pl.when(thread < WORKERS)(work)

    call = kernel(
        attention_dq,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=[
            shared(WORKERS, SIDE, width, dtype=q.dtype),
            shared(WORKERS, SIDE, width, dtype=q.dtype),
            shared(SLOTS, columns, width, dtype=q.dtype),
            shared(SLOTS, columns, width, dtype=q.dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=WORKERS),
            plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),
            plgpu.Barrier(num_arrivals=WORKERS, num_barriers=SLOTS),
        ],
        grid=(batch, heads, tiles),
        grid_names=("b", "h", "tile"),
    )
    return call(q, k, v, do, lse, delta, *visits, *(documents or ()))


@functools.partial(jax.jit, static_argnames="rules")
def keys_gradients(
    q: Array,
    k: Array,
    v: Array,
    do: Array,
    lse: Array,
    delta: Array,
    visits: Visits,
    documents: Documents | None,
    *,
    rules: Rules,
) -> tuple[Array, Array]:
    """The gradients of k and v [B, T, Hkv, d].

    Args:
        as for `queries_gradient`, but visits: those of `key_tiles`, with `by_keys`.
    """
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    group, tiles, columns = heads // kv_heads, length // ROWS, QUERIES[width]

    def attention_dkv(*refs):
        q, k, v, do, lse, delta, order, span, *ids, dk, dv, k_s, v_s, q_s, do_s, lse_s, delta_s, loaded, full, empty = (
            refs
        )
        b, h, thread = lax.axis_index("b"), lax.axis_index("h"), lax.axis_index("thread")
        tile = lax.axis_index("tile")  # with a causal mask the first have the most work
        own = b if order.shape[0] > 1 else 0
        first = span[own, tile, 0]
        stream = Stream(order.at[own, tile], first, span[own, tile, 1] - first, group, SLOTS, full, empty)
        row = tile * ROWS + thread * SIDE
        rows, shape = pl.ds(row, SIDE), (SIDE, columns)

        def copy():
            def sources(n, around):
                head, part = h * group + around, pl.ds(n * columns, columns)
                vectors = [(x.at[b, head, part], buffer) for x, buffer in ((lse, lse_s), (delta, delta_s))]
                return [(q.at[b, part, head], q_s), (do.at[b, part, head], do_s), *vectors]

            stream.copy(sources)

        def step(n, sums):
            slot = stream.slot(n)
            number, partly, _ = stream.at(n)
            plgpu.barrier_wait(full.at[slot])
            scores, dweights = products(
                (zeros(*shape), (k_s.at[thread], q_s.at[slot].transpose((1, 0)))),
                (zeros(*shape), (v_s.at[thread], do_s.at[slot].transpose((1, 0)))),
            )
            weights = jnp.exp2(scores * (rules.scale * LOG2E) - along(load(lse_s.at[slot], COLUMN), 1, shape))
            dscores = weights * (dweights - along(load(delta_s.at[slot], COLUMN), 1, shape))

            column = number * columns
            documents = (ids[1].at[b, rows], ids[0].at[b, pl.ds(column, columns)]) if ids else None
            both = (weights, dscores)
            weights, dscores = where_seen(rules, partly, both, 0.0, row, column, documents, by_keys=True)
            weights, dscores = weights.astype(do_s.dtype), dscores.astype(q_s.dtype)
            sums = products((sums[0], (dscores, q_s.at[slot])), (sums[1], (weights, do_s.at[slot])))
            plgpu.barrier_arrive(empty.at[slot])
            return tuple(sums)

        def work():
            plgpu.set_max_registers(WORKER_REGISTERS, action="increase")
            for source, buffer in ((k, k_s), (v, v_s)):
                plgpu.copy_gmem_to_smem(source.at[b, rows, h], buffer.at[thread], loaded.at[thread])
            plgpu.barrier_wait(loaded.at[thread])
            sums = lax.fori_loop(0, stream.steps, step, (zeros(SIDE, width), zeros(SIDE, width)))
            plgpu.commit_smem()  # all warps have read k_s and v_s
            for x, buffer, factor in zip(sums, (k_s, v_s), (rules.scale, 1.0), strict=True):
                buffer.at[thread][...] = (x * factor).astype(buffer.dtype)
            plgpu.commit_smem()
            for buffer, result in ((k_s, dk), (v_s, dv)):
                plgpu.copy_smem_to_gmem(buffer.at[thread], result.at[b, rows, h])
            plgpu.wait_smem_to_gmem(0)

        pl.when(thread == WORKERS)(copy)
        pl.when(thread < WORKERS)(work)

    call = kernel(
        attention_dkv,
        out_type=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        scratch_types=[
            shared(WORKERS, SIDE, width, dtype=q.dtype),
            shared(WORKERS, SIDE, width, dtype=q.dtype),
            shared(SLOTS, columns, width, dtype=q.dtype),
            shared(SLOTS, columns, width, dtype=q.dtype),
            plgpu.SMEM((SLOTS, columns), jnp.float32),
            plgpu.SMEM((SLOTS, columns), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=WORKERS),
            plgpu.Barrier(num_arrivals=4, num_barriers=SLOTS),
            plgpu.Barrier(num_arrivals=WORKERS, num_barriers=SLOTS),
        ],
        grid=(batch, kv_heads, tiles),
        grid_names=("b", "h", "tile"),
    )
    return call(q, k, v, do, lse, delta, *visits, *(documents or ()))
