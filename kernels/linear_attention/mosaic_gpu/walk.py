"""One warpgroup walks through time with the state [K, 64] of 64 columns of V in its registers.

Of each chunk it reads the state, adds what tokens of the chunk say to each other, and updates the state:

    y_i = rin_i x_i S + sum_j exp2(row_i - col_j) (x_i . k_j) v_j,    S <- keep S + sum_j k_j wout_j v_j^T.

Walked forwards with queries for x it is the operation. Walked backwards with keys for x, queries for k and dy for v it
is the gradient of v, with S the gradient of the state.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from seqmodels.kernels import lanes
from seqmodels.kernels.linear_attention.mosaic_gpu.tile import (
    ROW,
    SIDE,
    SLOTS,
    along,
    decays,
    gather,
    load,
    products,
    shared,
    zeros,
)

VECTORS = 5  # row, column, rin, wout, keep


@functools.partial(jax.jit, static_argnames=("reverse", "strict", "save", "dtype"))  # traced once a shape, not a layer
def walk(x, k, v, vectors, initial_state, *, reverse, strict, save, dtype):
    """Chunks of time one after the other.

    Args:
        x: [B, T, Hk, K] reads the state, or None: only states are wanted.
        k: [B, T, Hk, K], v: [B, T, H, V]; T, K and V multiples of 64.
        vectors: [B, H, T / 64, 5, 64] float32; the last one, keep, repeated.
        initial_state: [B, S, H, K, V] float32: before (with `reverse`, after) each of S equal stretches of time, which
            are walked at once.
        reverse: from the last chunk to the first. strict: tokens do not see themselves.
        save: return states.
        dtype: of y.

    Returns:
        (y [B, T, H, V] or None, state after each stretch as initial_state,
        state [B, H, T / 64, K, V] before each chunk (with `reverse`, after it) in v's dtype, or None).
    """
    batch, length, key_heads, keys = k.shape
    heads, values = v.shape[2:]
    stretches = initial_state.shape[1]
    chunks = length // SIDE // stretches
    staged = x is not None and dtype == v.dtype  # y goes by way of shared memory
    rows = keys if x is not None else next(r for r in (128, 192, 64) if keys % r == 0)  # of the state, in a block

    def body(*refs):
        refs = list(refs)
        x_g = refs.pop(0) if x is not None else None
        k_g, v_g, vectors_g, initial_g = (refs.pop(0) for _ in range(4))
        y_g = refs.pop(0) if x is not None else None
        final_g = refs.pop(0)
        saved_g = refs.pop(0) if save else None
        x_s = refs.pop(0) if x is not None else None
        k_s, v_s, weighted_s, state_s, vectors_s, full = refs
        b, s = lax.div(lax.axis_index("bs"), stretches), lax.rem(lax.axis_index("bs"), stretches)
        h, hk = lax.axis_index("h"), lax.div(lax.axis_index("h"), heads // key_heads)
        tile = lax.axis_index("tile")
        key = pl.ds(lax.rem(tile, keys // rows) * rows, rows)
        value = pl.ds(lax.div(tile, keys // rows) * SIDE, SIDE)

        def chunk(step):
            return s * chunks + (chunks - 1 - step if reverse else step)

        def fetch(step):
            slot, n = lax.rem(step, SLOTS), chunk(step)
            time = pl.ds(n * SIDE, SIDE)
            copies = [
                (k_g.at[b, time, hk, key], k_s),
                (v_g.at[b, time, h, value], v_s),
                (vectors_g.at[b, h, n], vectors_s),
            ]
            if x is not None:
                copies.append((x_g.at[b, time, hk, key], x_s))
            for source, buffer in copies:
                plgpu.copy_gmem_to_smem(source, buffer.at[slot], full.at[slot])

        def step(i, state):
            slot = lax.rem(i, SLOTS)
            plgpu.barrier_wait(full.at[slot])
            if save:
                plgpu.copy_smem_to_gmem(state_s, saved_g.at[b, h, chunk(i), key, value])

            weight = along(load(vectors_s.at[slot, 3], ROW), 0, (SIDE, SIDE))

            def weigh():
                if x is not None:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # y of the chunk before has left weighted_s
                weighted_s[...] = (load(v_s.at[slot]) * weight).astype(v.dtype)

            state = state * vectors_s[slot, 4, 0]
            keys_s = k_s.at[slot].transpose((1, 0))
            if x is None:
                weigh()
                plgpu.commit_smem()
                (state,) = products((state, (keys_s, weighted_s)))
            else:
                if rows > 192:  # too many registers are taken to do it meanwhile
                    weigh()
                scores, y = products(
                    (zeros(SIDE, SIDE), (x_s.at[slot], keys_s)),
                    (zeros(SIDE, SIDE), (x_s.at[slot], state_s)),
                    meanwhile=weigh if rows <= 192 else lambda: None,
                )
                decay, seen = decays(vectors_s, slot, reverse, strict)
                scores = jnp.where(seen, scores * decay, 0).astype(v.dtype)
                y = y * along(load(vectors_s.at[slot, 2], ROW), 0, (SIDE, SIDE))
                plgpu.commit_smem()
                y, state = products((y, (scores, v_s.at[slot])), (state, (keys_s, weighted_s)))
                if staged:
                    plgpu.commit_smem()  # all warps have read weighted_s
                    weighted_s[...] = y.astype(dtype)
                else:
                    y_g[b, pl.ds(chunk(i) * SIDE, SIDE), h, value] = y.astype(dtype)
            if save and x is None:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if save or x is not None:
                state_s[...] = state.astype(v.dtype)
            plgpu.commit_smem()
            if staged:
                plgpu.copy_smem_to_gmem(weighted_s, y_g.at[b, pl.ds(chunk(i) * SIDE, SIDE), h, value])
            pl.when(i + SLOTS < chunks)(lambda: fetch(i + SLOTS))
            return state

        for first in range(min(SLOTS, chunks)):
            fetch(jnp.int32(first))
        state = gather(initial_g.at[b, s, h, key, value])
        if save or x is not None:
            state_s[...] = state.astype(v.dtype)
            plgpu.commit_smem()
        state = lax.fori_loop(0, chunks, step, state)
        final_g[b, s, h, key, value] = state
        plgpu.wait_smem_to_gmem(0)

    f32, sds = jnp.float32, jax.ShapeDtypeStruct
    out = [sds(initial_state.shape, f32)]
    if x is not None:
        out.insert(0, sds(v.shape, dtype))
    if save:
        out.append(sds((batch, heads, length // SIDE, keys, values), v.dtype))
    scratch = [
        shared(SLOTS, SIDE, rows, dtype=k.dtype),
        shared(SLOTS, SIDE, SIDE, dtype=v.dtype),
        shared(SIDE, SIDE, dtype=v.dtype),
        shared(rows, SIDE, dtype=v.dtype),
        plgpu.SMEM((SLOTS, VECTORS, SIDE), f32),
        plgpu.Barrier(num_barriers=SLOTS, num_arrivals=3 if x is None else 4),
    ]
    if x is not None:
        scratch.insert(0, scratch[0])
    kernel = plgpu.kernel(
        body,
        out_type=tuple(out),
        scratch_types=scratch,
        grid=(batch * stretches, heads, (keys // rows) * (values // SIDE)),
        grid_names=("bs", "h", "tile"),
        compiler_params=lanes.compiler_params(),
        interpret=lanes.INTERPRET,
    )
    results = list(kernel(*([] if x is None else [x]), k, v, vectors, initial_state))
    y = results.pop(0) if x is not None else None
    return y, results[0], results[1] if save else None
