"""Forward pass of the selective scan on Hopper: four warpgroups walk a block of channels through time.

Chunks of tokens go from one to the next through shared memory:
  prepare  dt and dt u in float32;
  recur    token by token, by two warpgroups: half the states (of all groups) of a channel in a thread's registers;
  finish   skip and gate, y stored, the next chunk sent for.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import lanes
from kernels.lanes import LOG2E, THREADS, read, write
from kernels.selective_scan.mosaic_gpu.stage import MARKED, SLOTS, Stage, prepare
from kernels.selective_scan.mosaic_gpu.tile import Tile, thread_index

f32 = jnp.float32
BLOCK = 128  # channels of a block, one a thread
WORKERS = 2  # warpgroups that share the states of a channel
UNROLL = 4  # tokens whose operands are loaded before the first is worked on


@functools.partial(jax.jit, static_argnames=("softplus", "chunk", "save"))  # traced once a shape, not once a layer
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
    _, padded, states = A.shape
    tile, steps, own = Tile(states), -(-length // chunk), states // WORKERS
    stage = Stage(dict(u=u, dt=dt, B=B, C=C, z=z, weights=weights, marks=marks), chunk, BLOCK, groups)

    def body(*refs):
        b, e = lax.axis_index("b"), lax.axis_index("e")
        count = len(stage.arrays)
        sources, refs = refs[:count], refs[count:]
        (A_g, D_g, bias_g, initial_g, y_g, final_g, *saved_g), refs = refs[: 6 + bool(save)], refs[6 + bool(save) :]
        *buffers, dt_s, x_s, y_s, ready, done = refs
        stage.bind(sources, buffers, b, e)

        offset = lax.rem(thread_index(), BLOCK // 4) * 4
        tokens = [lax.div(thread_index(), BLOCK // 4) + first for first in range(0, chunk, THREADS * 4 // BLOCK)]
        channel = e * BLOCK + offset
        D = read(D_g, channel, 4)
        bias = [read(bias_g, g * padded + channel, 4) for g in range(groups)]

        @pl.when(lax.axis_index("role") == 0)
        def _():
            for index in range(min(SLOTS, steps)):
                stage.load(index, jnp.int32(index))

            def start(index):
                slot = lax.rem(index, SLOTS)
                stage.wait(slot)
                for g in range(groups):
                    us = [stage.read("u", slot, token, offset, 4, g) for token in tokens]
                    dts = prepare(stage, slot, index, tokens, offset, bias[g], softplus, length, g)
                    for u, (token, dt) in zip(us, dts):
                        at = (token * groups + g) * BLOCK + offset
                        write(dt_s.at[slot], at, dt)
                        write(x_s.at[slot], at, tuple(d * u for d, u in zip(dt, u)))
                plgpu.barrier_arrive(ready.at[slot])

            lax.fori_loop(0, steps, lambda index, _: start(index), None)

        @pl.when((lax.axis_index("role") > 0) & (lax.axis_index("role") <= WORKERS))
        def _():
            thread = thread_index()
            channel = e * BLOCK + thread
            worker = lax.axis_index("role") - 1
            first = worker * own  # of the states
            quads = range(0, own, 4)

            def read_states(ref, number):
                """The thread's states of its channel in matrix `number` of [..., E', N]."""
                start = (number * padded + channel) * states + first
                return sum((read(ref, start, 4, at=n) for n in quads), start=())

            A = [read_states(A_g, g) for g in range(groups)]

            def operands(index, t):
                """What token t needs, loaded."""
                slot = lax.rem(index, SLOTS)
                out = []
                for g in range(groups):
                    at = (t * groups + g) * BLOCK + thread
                    (dt,), (x,) = (read(ref.at[slot], at, 1) for ref in (dt_s, x_s))
                    same = thread * 0 + first
                    B, C = (
                        sum((stage.read(name, slot, t, same + n, 4, g) for n in quads), start=()) for name in ("B", "C")
                    )
                    w = None
                    if g > 0 and "weights" in stage:
                        (w,) = stage.read("weights", slot, t, thread, 1, g - 1)
                    out.append((dt, x, B, C, w))
                return out, stage.reset(slot, t) if "marks" in stage else None

            def advance(h, loaded):
                """s = exp(dt A) s + dt u B and s C."""
                new, y = [], None
                operands, reset = loaded
                for s, A_group, (dt, x, B, C, w) in zip(h, A, operands):
                    exponents = [dt * a for a in A_group]
                    exponents = exponents if reset is None else [x + reset for x in exponents]
                    s = tuple(jnp.exp2(k) * s + x * b for k, s, b in zip(exponents, s, B))
                    new.append(s)
                    readout = dot(s, C)
                    readout = readout if w is None else readout * w
                    y = readout if y is None else y + readout
                return tuple(new), y

            def recur(index, h):
                def several(i, h):
                    times = [i * UNROLL + k for k in range(UNROLL)]
                    loaded = [operands(index, t) for t in times]
                    ys = []
                    for operand in loaded:
                        h, y = advance(h, operand)
                        ys.append(y)
                    for t, y in zip(times, ys):
                        write(y_s.at[lax.rem(index, SLOTS), worker], t * BLOCK + thread, (y,))
                    return h

                stretch = save or chunk
                for start in range(0, chunk, stretch):
                    if save:
                        keep(h, index * (chunk // save) + start // save)
                    h = lax.fori_loop(start // UNROLL, (start + stretch) // UNROLL, several, h)
                return h

            def keep(h, number):
                """Write the states at the start of a stretch of `save` tokens, in the order of the backward pass."""
                start = (b * (steps * chunk // save) + number) * (padded * groups * states)
                for g in range(groups):
                    place = start + tile.saved(channel, g, groups) + first * tile.rows
                    for n in quads:
                        write(saved_g[0], place, h[g][n : n + 4], at=n * tile.rows)

            def step(index, h):
                plgpu.barrier_wait(ready.at[lax.rem(index, SLOTS)])
                stage.wait(lax.rem(index, SLOTS))
                h = recur(index, h)
                plgpu.barrier_arrive(done.at[lax.rem(index, SLOTS)])
                return h

            h = tuple(read_states(initial_g, b * groups + g) for g in range(groups))
            h = lax.fori_loop(0, steps, step, h)
            for g in range(groups):
                start = ((b * groups + g) * padded + channel) * states + first
                for n in quads:
                    write(final_g, start, h[g][n : n + 4], at=n)

        @pl.when(lax.axis_index("role") == WORKERS + 1)
        def _():
            def finish(index):
                """y = (s C + D u) silu(z)."""
                slot = lax.rem(index, SLOTS)
                loaded = [
                    (
                        [read(y_s.at[slot, worker], token * BLOCK + offset, 4) for worker in range(WORKERS)],
                        stage.read("u", slot, token, offset, 4),
                        stage.read("z", slot, token, offset, 4) if "z" in stage else None,
                    )
                    for token in tokens
                ]
                for token, (ys, u, z) in zip(tokens, loaded):
                    y = tuple(sum(parts) + d * u for *parts, d, u in zip(*ys, D, u))
                    y = y if z is None else tuple(y * z * lanes.sigmoid(z) for y, z in zip(y, z))
                    write(y_g, ((b * steps + index) * chunk + token) * padded + channel, y)

            def step(index, _):
                slot = lax.rem(index, SLOTS)
                plgpu.barrier_wait(done.at[slot])
                finish(index)
                plgpu.commit_smem()  # all threads are through with this slot
                pl.when(index + SLOTS < steps)(lambda: stage.load(slot, index + SLOTS))

            lax.fori_loop(0, steps, step, None)

    sds = jax.ShapeDtypeStruct
    out = [sds((batch, steps * chunk, padded), u.dtype), sds((batch, groups, padded, states), f32)]
    if save:
        out.append(sds((batch, steps * chunk // save, groups * padded * states), f32))
    kernel = plgpu.kernel(
        body,
        out_type=tuple(out),
        scratch_types=[
            *stage.scratch(),
            plgpu.SMEM((SLOTS, chunk, groups, BLOCK), f32),
            plgpu.SMEM((SLOTS, chunk, groups, BLOCK), f32),
            plgpu.SMEM((SLOTS, WORKERS, chunk, BLOCK), f32),
            plgpu.Barrier(num_barriers=SLOTS),
            plgpu.Barrier(num_barriers=SLOTS, num_arrivals=WORKERS),
        ],
        grid=(batch, padded // BLOCK),
        grid_names=("b", "e"),
        num_threads=2 + WORKERS,
        thread_name="role",
        compiler_params=lanes.compiler_params(),
        interpret=lanes.INTERPRET,
    )
    y, final, *saved = kernel(*stage.arrays.values(), A * LOG2E, D, dt_bias, initial_state)
    return y, final, saved[0] if save else None


def forward_bytes(u, dt, B, C, z, weights, chunk) -> int:
    """Shared memory of a block."""
    groups = u.shape[2]
    stage = Stage(dict(u=u, dt=dt, B=B, C=C, z=z, weights=weights, marks=MARKED), chunk, BLOCK, groups)
    return stage.bytes() + SLOTS * chunk * (2 * groups + WORKERS) * BLOCK * 4


def dot(a, b):
    """sum_n a_n b_n in four chains, for each addition waits for the one before it."""
    chains = [None] * 4
    for n, (x, y) in enumerate(zip(a, b)):
        chains[n % 4] = x * y if chains[n % 4] is None else chains[n % 4] + x * y
    first, *rest = (chain for chain in chains if chain is not None)
    return sum(rest, start=first)
