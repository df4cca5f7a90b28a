"""Forward pass of the selective scan on Hopper: two warpgroups walk a block of channels through time.

The first prepares and finishes chunks of tokens, the second runs the recurrence, one chunk behind the former:
  prepare  dt and dt u in float32;
  recur    token by token, 16 states a thread (and group) in registers; for each channel it leaves one partial readout
           a share of its states;
  finish   partial readouts are added, skip and gate applied, y stored.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import lanes
from kernels.lanes import LOG2E, THREADS, read, write
from kernels.selective_scan.mosaic_gpu.stage import SLOTS, Stage, prepare
from kernels.selective_scan.mosaic_gpu.tile import CHANNELS, STATES, Tile

f32 = jnp.float32
UNROLL = 2  # tokens whose operands are loaded together, while the two before them are worked on


def forward(u, dt, A, B, C, D, z, dt_bias, weights, initial_state, marks, *, softplus, chunk, save):
    """y, the final state, and the states at the start of every `save` tokens.

    Args:
        u, dt: [b, T, G, E] with E * itemsize a multiple of 16. z: [b, T, E] or None.
        A: [G, E', N] float32, N one of tile.SIZES, E' = E padded to whole blocks. D: [E'], dt_bias: [G, E'] float32.
        B, C: [b, T, G, N] float32. weights: [b, T, G - 1 or 1, E] or None.
        initial_state: [b, G, E', N] float32. marks: [b, T', 8] of `stage.marks`, T' is T padded to whole chunks.
        softplus: dt + dt_bias goes through softplus.
        chunk: tokens a step, a multiple of save; save: 0 saves no states.

    Returns:
        y [b, T', E'] in u's dtype, final state [b, G, E', N] float32, states [b, T' / save, E' / block, G, 2048]
        float32 in the threads' order (or None).
    """
    batch, length, groups, _ = u.shape
    padded, tile = A.shape[1], Tile(A.shape[-1])
    states, block = tile.states, tile.channels
    blocks, steps = padded // block, -(-length // chunk)
    stage = Stage(dict(u=u, dt=dt, B=B, C=C, z=z, weights=weights, marks=marks), chunk, block, groups)

    def body(*refs):
        b, e = lax.axis_index("b"), lax.axis_index("e")
        count = len(stage.arrays)
        sources, refs = refs[:count], refs[count:]
        (A_g, D_g, bias_g, initial_g, y_g, final_g, *saved_g), refs = refs[: 6 + bool(save)], refs[6 + bool(save) :]
        *buffers, dt_s, x_s, y_s, ready, done = refs
        stage.bind(sources, buffers, b, e)

        @pl.when(lax.axis_index("role") == 0)
        def _():
            column, first_token = tile.items()
            channel = e * block + column * CHANNELS
            D = read(D_g, channel, CHANNELS)
            bias = [read(bias_g, g * padded + channel, CHANNELS) for g in range(groups)]

            def start(index):
                stage.wait(lax.rem(index, SLOTS))
                for g in range(groups):
                    facts = (column, first_token, tile, bias[g], softplus, length, g)
                    for token, dt, x in prepare(stage, lax.rem(index, SLOTS), index, *facts):
                        at = (token * groups + g) * block + column * CHANNELS
                        write(dt_s.at[lax.rem(index, 2)], at, dt)
                        write(x_s.at[lax.rem(index, 2)], at, x)
                plgpu.barrier_arrive(ready.at[lax.rem(index, 2)])

            def finish(index):
                """y = (sum of the partial readouts + D u) silu(z)."""
                tokens = [first_token + first for first in range(0, chunk, tile.tokens)]
                loaded = []
                for token in tokens:
                    at = token * THREADS * CHANNELS + column * CHANNELS
                    partial = [read(y_s.at[lax.rem(index, 2)], at, CHANNELS, at=j * block) for j in range(tile.shares)]
                    at = lax.rem(index, SLOTS), token, column * CHANNELS, CHANNELS
                    loaded.append((partial, stage.read("u", *at), stage.read("z", *at) if "z" in stage else None))
                for token, (partial, u, z) in zip(tokens, loaded):
                    y = tuple(sum(share[1:], start=share[0]) for share in zip(*partial))
                    y = tuple(y + d * u for y, d, u in zip(y, D, u))
                    y = y if z is None else tuple(y * z * lanes.sigmoid(z) for y, z in zip(y, z))
                    write(y_g, ((b * steps + index) * chunk + token) * padded + channel, y)

            for index in range(min(SLOTS, steps)):
                stage.load(index, jnp.int32(index))
            start(jnp.int32(0))

            def step(index, _):
                pl.when(index + 1 < steps)(lambda: start(index + 1))
                plgpu.barrier_wait(done.at[lax.rem(index, 2)])
                finish(index)
                plgpu.commit_smem()  # all threads are through with this slot
                pl.when(index + SLOTS < steps)(lambda: stage.load(lax.rem(index, SLOTS), index + SLOTS))
                return ()

            lax.fori_loop(0, steps, step, ())

        @pl.when(lax.axis_index("role") == 1)
        def _():
            row, share, place = tile.owner()
            matrix = e * block * states + row * CHANNELS * states + share * STATES

            def read_states(ref, start):
                return tuple(
                    read(ref, start + g * padded * states + matrix, STATES, at=c * states)
                    for g in range(groups)
                    for c in range(CHANNELS)
                )

            A = tuple(tuple(a * LOG2E for a in row) for row in read_states(A_g, 0))

            def operands(index, t):
                """What token t needs, loaded."""
                pair, slot = lax.rem(index, 2), lax.rem(index, SLOTS)
                out = []
                for g in range(groups):
                    at = (t * groups + g) * block + row * CHANNELS
                    dt, x = (read(ref.at[pair], at, CHANNELS) for ref in (dt_s, x_s))
                    B, C = (stage.read(name, slot, t, share * STATES, STATES, g) for name in ("B", "C"))
                    w = None
                    if g > 0 and "weights" in stage:
                        w = stage.read("weights", slot, t, row * CHANNELS, CHANNELS, g - 1)
                    out.append((dt, x, B, C, w))
                return out, stage.reset(slot, t) if "marks" in stage else None

            def advance(h, loaded):
                """s = exp(dt A) s + dt u B; the thread's share of s C."""
                groups, reset = loaded
                new, y = [], [None] * CHANNELS
                for g, (dt, x, B, C, w) in enumerate(groups):
                    for c in range(CHANNELS):
                        readout = None
                        for n in range(STATES):
                            exponent = dt[c] * A[g * CHANNELS + c][n]
                            exponent = exponent if reset is None else exponent + reset
                            s = jnp.exp2(exponent) * h[(g * CHANNELS + c) * STATES + n] + x[c] * B[n]
                            new.append(s)
                            readout = s * C[n] if readout is None else readout + s * C[n]
                        readout = readout if w is None else readout * w[c]
                        y[c] = readout if y[c] is None else y[c] + readout
                return tuple(new), tuple(y)

            def recur(index, h):
                def load(t):
                    return [operands(index, jnp.minimum(t + k, chunk - 1)) for k in range(UNROLL)]

                def several(i, carry):
                    h, loaded = carry
                    t = i * UNROLL
                    following = load(t + UNROLL)
                    for k, operand in enumerate(loaded):
                        if save:
                            keep_at = lax.rem(t + k, save) == 0
                            pl.when(keep_at)(lambda h=h, t=t + k: keep(h, index * (chunk // save) + lax.div(t, save)))
                        h, y = advance(h, operand)
                        write(y_s.at[lax.rem(index, 2)], (t + k) * THREADS * CHANNELS + place * CHANNELS, y)
                    return h, following

                return lax.fori_loop(0, chunk // UNROLL, several, (h, load(0)))[0]

            def keep(h, number):
                """Write the states at the start of a stretch of `save` tokens."""
                for part in range(groups * CHANNELS):
                    at = (((b * (steps * chunk // save) + number) * blocks + e) * groups * CHANNELS + part) * THREADS
                    write(saved_g[0], (at + place) * STATES, h[part * STATES : (part + 1) * STATES])

            def step(index, h):
                plgpu.barrier_wait(ready.at[lax.rem(index, 2)])
                stage.wait(lax.rem(index, SLOTS))
                h = recur(index, h)
                plgpu.barrier_arrive(done.at[lax.rem(index, 2)])
                return h

            h = sum(read_states(initial_g, b * groups * padded * states), start=())
            h = lax.fori_loop(0, steps, step, h)
            for g in range(groups):
                for c in range(CHANNELS):
                    start = (g * CHANNELS + c) * STATES
                    at = (b * groups + g) * padded * states + matrix
                    write(final_g, at, h[start : start + STATES], at=c * states)

    sds = jax.ShapeDtypeStruct
    out = [sds((batch, steps * chunk, padded), u.dtype), sds((batch, groups, padded, states), f32)]
    if save:
        out.append(sds((batch, steps * chunk // save, blocks, groups, CHANNELS * THREADS * STATES), f32))
    kernel = plgpu.kernel(
        body,
        out_type=tuple(out),
        scratch_types=[
            *stage.scratch(),
            plgpu.SMEM((2, chunk, groups, block), f32),
            plgpu.SMEM((2, chunk, groups, block), f32),
            plgpu.SMEM((2, chunk, THREADS * CHANNELS), f32),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_barriers=2),
        ],
        grid=(batch, blocks),
        grid_names=("b", "e"),
        num_threads=2,
        thread_name="role",
        compiler_params=lanes.compiler_params(),
        interpret=lanes.INTERPRET,
    )
    y, final, *saved = kernel(*stage.arrays.values(), A, D, dt_bias, initial_state)
    return y, final, saved[0] if save else None
