"""Forward pass of the selective scan on Hopper: three or four warpgroups walk a block of channels through time.

Chunks of tokens go from one to the next through shared memory:
  prepare  dt and dt u in float32;
  recur    token by token, by one or two warpgroups: a thread has some states (of all groups) of a channel in registers;
  finish   skip and gate, y stored, the next chunk sent for.
Where there are few sequences and channels, blocks are narrow: more threads then share the states of a channel.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import lanes
from kernels.lanes import LOG2E, THREADS, read, write
from kernels.selective_scan.mosaic_gpu.stage import MARKED, Stage, prepare
from kernels.selective_scan.mosaic_gpu.tile import STATES, Tile, thread_index

f32 = jnp.float32
SLOTS = 3  # chunks in shared memory
HELD = 8  # states of a channel and group that one thread takes at most, if a second warpgroup can take the rest
# By states a thread: tokens by which operands are loaded before they are worked on, and tokens written out
AHEAD, STRETCH = {1: 8, 2: 8, 4: 3, 8: 4}, {1: 64, 2: 64, 4: 16, 8: 16}


@functools.partial(
    jax.jit, static_argnames=("softplus", "block", "chunk", "save")
)  # traced once a shape, not once a layer
def forward(u, dt, A, B, C, D, z, dt_bias, weights, initial_state, marks, *, softplus, block, chunk, save):
    """y, the final state, and the states at the start of every `save` tokens.

    Args:
        u, dt: [b, T, G, E] with E * itemsize a multiple of 16. z: [b, T, E] or None.
        A: [G, E', N] float32, N one of tile.SIZES, E' = E padded to whole blocks. D: [E'], dt_bias: [G, E'] float32.
        B, C: [b, T, G, N] float32. weights: [b, T, G - 1 or 1, E] or None.
        initial_state: [b, G, E', N] float32. marks: [b, T', 8] of `stage.marks`, T' is T padded to whole chunks.
        softplus: dt + dt_bias goes through softplus.
        block: channels of a block: 128, 64, 32 or 16, with at least 128 states in all.
        chunk: tokens a step, a multiple of save and of 512 / block; save: 0 saves no states.

    Returns:
        y [b, T', E'] in u's dtype, final state [b, G, E', N] float32, states [b, T' / save, G E' N] float32
        in the order of the backward pass's threads (or None).
    """
    batch, length, groups, _ = u.shape
    _, padded, states = A.shape
    steps, workers = -(-length // chunk), workers_of(block, states)
    shares = workers * THREADS // block  # threads that share a channel
    own = states // shares  # states of each
    vector, tile = min(own, STATES), Tile(states)
    stretch = min(STRETCH.get(own, 8), chunk)
    ahead = min(AHEAD.get(own, 2) if groups == 1 else 2, stretch)
    stage = Stage(dict(u=u, dt=dt, B=B, C=C, z=z, weights=weights, marks=marks), chunk, block, groups, SLOTS)

    def body(*refs):
        b, e = lax.axis_index("b"), lax.axis_index("e")
        count = len(stage.arrays)
        sources, refs = refs[:count], refs[count:]
        (A_g, D_g, bias_g, initial_g, y_g, final_g, *saved_g), refs = refs[: 6 + bool(save)], refs[6 + bool(save) :]
        *buffers, dt_s, x_s, y_s, ready, done = refs
        stage.bind(sources, buffers, b, e)

        offset = lax.rem(thread_index(), block // 4) * 4
        tokens = [lax.div(thread_index(), block // 4) + first for first in range(0, chunk, THREADS * 4 // block)]
        channel = e * block + offset
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
                        at = (token * groups + g) * block + offset
                        write(dt_s.at[slot], at, dt)
                        write(x_s.at[slot], at, tuple(d * u for d, u in zip(dt, u)))
                plgpu.barrier_arrive(ready.at[slot])

            lax.fori_loop(0, steps, lambda index, _: start(index), None)

        @pl.when((lax.axis_index("role") > 0) & (lax.axis_index("role") <= workers))
        def _():
            thread = lax.rem(thread_index(), block)
            channel = e * block + thread
            share = lax.div(thread_index(), block) + (lax.axis_index("role") - 1) * (shares // workers)
            first = share * own  # of the states
            vectors = range(0, own, vector)

            def read_states(ref, number):
                """The thread's states of its channel in matrix `number` of [..., E', N]."""
                start = (number * padded + channel) * states + first
                return sum((read(ref, start, vector, at=n) for n in vectors), start=())

            def write_states(ref, number, h):
                for n in vectors:
                    write(ref, (number * padded + channel) * states + first, h[n : n + vector], at=n)

            A = [read_states(A_g, g) for g in range(groups)]

            def operands(index, start, k):
                """Of token start + k: of each group dt, dt u, B, C and weight; and the reset."""
                slot = lax.rem(index, SLOTS)
                of_groups = []
                for g in range(groups):
                    at = start * (groups * block) + thread
                    (dt,), (x,) = (read(ref.at[slot], at, 1, at=(k * groups + g) * block) for ref in (dt_s, x_s))
                    B, C = (of_states(name, slot, start, k, g) for name in ("B", "C"))
                    w = None
                    if g > 0 and "weights" in stage:
                        (w,) = stage.read("weights", slot, start, thread, 1, g - 1, k)
                    of_groups.append((dt, x, B, C, w))
                return of_groups, stage.reset(slot, start + k) if "marks" in stage else None

            def of_states(name, slot, start, k, g):
                """B or C of the thread's states and token start + k."""
                return sum((stage.read(name, slot, start, first + n, vector, g, k) for n in vectors), start=())

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
                """A chunk: each token's operands are loaded while those before it are worked on."""

                def several(i, carry, last=False):
                    h, queue = carry
                    start = i * stretch
                    queue = list(queue)
                    for k in range(stretch):
                        if save and k % save == 0:
                            keep(h, (index * chunk + start + k) // save)
                        if not last or k + ahead < stretch:
                            queue.append(operands(index, start, k + ahead))
                        h, y = advance(h, queue.pop(0))
                        at = (share * chunk + start) * block + thread
                        write(y_s.at[lax.rem(index, SLOTS)], at, (y,), at=k * block)
                    return h, queue

                queue = [operands(index, 0, k) for k in range(ahead)]
                carry = lax.fori_loop(0, chunk // stretch - 1, several, (h, queue))
                return several(chunk // stretch - 1, carry, last=True)[0]

            def keep(h, number):
                """Write the states at the start of a stretch of `save` tokens, in the order of the backward pass."""
                start = (b * (steps * chunk // save) + number) * (padded * groups * states)
                state = lax.div(first, STATES) * STATES * tile.rows + lax.rem(first, STATES)
                for g in range(groups):
                    place = start + tile.saved(channel, g, groups) + state
                    for n in vectors:
                        write(saved_g[0], place, h[g][n : n + vector], at=n * tile.rows)

            def step(index, h):
                plgpu.barrier_wait(ready.at[lax.rem(index, SLOTS)])
                stage.wait(lax.rem(index, SLOTS))
                h = recur(index, h)
                plgpu.barrier_arrive(done.at[lax.rem(index, SLOTS)])
                return h

            h = tuple(read_states(initial_g, b * groups + g) for g in range(groups))
            h = lax.fori_loop(0, steps, step, h)
            for g in range(groups):
                write_states(final_g, b * groups + g, h[g])

        @pl.when(lax.axis_index("role") == workers + 1)
        def _():
            def finish(index):
                """y = (s C + D u) silu(z)."""
                slot = lax.rem(index, SLOTS)
                loaded = [
                    (
                        [read(y_s.at[slot], (share * chunk + token) * block + offset, 4) for share in range(shares)],
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
            *[plgpu.SMEM((SLOTS, chunk, groups, block), f32)] * 2,
            plgpu.SMEM((SLOTS, shares, chunk, block), f32),
            plgpu.Barrier(num_barriers=SLOTS),
            plgpu.Barrier(num_barriers=SLOTS, num_arrivals=workers),
        ],
        grid=(batch, padded // block),
        grid_names=("b", "e"),
        num_threads=2 + workers,
        thread_name="role",
        compiler_params=lanes.compiler_params(),
        interpret=lanes.INTERPRET,
    )
    y, final, *saved = kernel(*stage.arrays.values(), A * LOG2E, D, dt_bias, initial_state)
    return y, final, saved[0] if save else None


def workers_of(block, states) -> int:
    """Warpgroups that recur."""
    return 2 if block * states > THREADS * HELD else 1


def forward_bytes(u, dt, B, C, z, weights, block, chunk) -> int:
    """Shared memory of a block."""
    groups, states = u.shape[2], B.shape[3]
    stage = Stage(dict(u=u, dt=dt, B=B, C=C, z=z, weights=weights, marks=MARKED), chunk, block, groups, SLOTS)
    return stage.bytes() + SLOTS * chunk * (2 * groups * block + workers_of(block, states) * THREADS) * 4


def dot(a, b):
    """sum_n a_n b_n in four chains, for each addition waits for the one before it."""
    chains = [None] * 4
    for n, (x, y) in enumerate(zip(a, b)):
        chains[n % 4] = x * y if chains[n % 4] is None else chains[n % 4] + x * y
    first, *rest = (chain for chain in chains if chain is not None)
    return sum(rest, start=first)
