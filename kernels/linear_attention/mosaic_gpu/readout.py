"""Readouts of each chunk separately, from the state before it. Used if one warpgroup cannot hold the state in `walk`.

y_i = rin_i x_i S + sum_j exp2(row_i - col_j) (x_i . k_j) v_j, for 64 columns of V, in steps of 64 columns of K.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from seqmodels.kernels import lanes
from seqmodels.kernels.linear_attention.mosaic_gpu.tile import SLOTS, decayed, weighted
from seqmodels.kernels.linear_attention.mosaic_gpu.walk import VECTORS
from seqmodels.kernels.tensor_cores import ROW, SIDE, along, load, products, shared, zeros


@functools.partial(jax.jit, static_argnames=("reverse", "strict", "dtype"))  # traced once per shape, not per layer
def readout(
    x: jax.Array,
    k: jax.Array,
    v: jax.Array,
    vectors: jax.Array,
    states: jax.Array,
    *,
    reverse: bool,
    strict: bool,
    dtype: DTypeLike,
) -> jax.Array:
    """y [B, T, H, V] in dtype, as `walk` makes it; states [B, H, T / 64, K, V] as `walk` saves them."""
    batch, length, key_heads, keys = k.shape
    heads, values = v.shape[2:]
    tiles, square = keys // SIDE, (SIDE, SIDE)

    def body(x_g, k_g, v_g, vectors_g, states_g, y_g, x_s, k_s, states_s, v_s, vectors_s, ready, full):
        b, h = lax.axis_index("b"), lax.div(lax.axis_index("hv"), values // SIDE)
        n, hk = lax.axis_index("n"), lax.div(h, heads // key_heads)
        time, value = pl.ds(n * SIDE, SIDE), pl.ds(lax.rem(lax.axis_index("hv"), values // SIDE) * SIDE, SIDE)

        def fetch(step):
            slot, key = lax.rem(step, SLOTS), pl.ds(step * SIDE, SIDE)
            for source, buffer in (
                (x_g.at[b, time, hk, key], x_s),
                (k_g.at[b, time, hk, key], k_s),
                (states_g.at[b, h, n, key, value], states_s),
            ):
                plgpu.copy_gmem_to_smem(source, buffer.at[slot], full.at[slot])

        def step(i, carry):
            slot = lax.rem(i, SLOTS)
            plgpu.barrier_wait(full.at[slot])
            scores, y = carry
            scores, y = products(
                (scores, (x_s.at[slot], k_s.at[slot].transpose((1, 0)))), (y, (x_s.at[slot], states_s.at[slot]))
            )
            plgpu.commit_smem()  # all warps have finished with this slot
            pl.when(i + SLOTS < tiles)(lambda: fetch(i + SLOTS))
            return scores, y

        plgpu.copy_gmem_to_smem(v_g.at[b, time, h, value], v_s, ready)
        plgpu.copy_gmem_to_smem(vectors_g.at[b, h, n], vectors_s.at[0], ready)
        for first in range(min(SLOTS, tiles)):
            fetch(jnp.int32(first))
        scores, y = lax.fori_loop(0, tiles, step, (zeros(*square), zeros(*square)))
        plgpu.barrier_wait(ready)
        scores = decayed(scores, vectors_s, 0, reverse, strict).astype(v.dtype)
        y = weighted(y, along(load(vectors_s.at[0, 2], ROW), 0, square))
        (y,) = products((y, (scores, v_s)))
        y_g[b, time, h, value] = y.astype(dtype)

    kernel = lanes.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(v.shape, dtype),
        scratch_types=[shared(SLOTS, *square, dtype=v.dtype)] * 3
        + [shared(*square, dtype=v.dtype), plgpu.SMEM((1, VECTORS, SIDE), jnp.float32)]
        + [plgpu.Barrier(num_arrivals=2), plgpu.Barrier(num_barriers=SLOTS, num_arrivals=3)],
        grid=(batch, heads * (values // SIDE), length // SIDE),
        grid_names=("b", "hv", "n"),
    )
    return kernel(x, k, v, vectors, states)
