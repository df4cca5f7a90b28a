"""Backward pass of the selective scan on Hopper: chunks of time from the last to the first, states computed again.

With g_t the gradient of the state after token t, and per channel and state

    g_t = exp(dt_{t+1} A) g_{t+1} + dy_t C_t,    q_t = g_t exp(dt_t A) s_{t-1}
    dC_t = sum_e dy_t s_t,    dB_t = sum_e g_t dt_t u_t                     (over channels)
    du_t = dt_t sum_n g_t B_t,    ddt_t = sum_n q_t A + u_t sum_n g_t B_t   (over states),    dA = sum_t q_t dt_t

one warpgroup prepares and finishes chunks (of one group each), one goes through their states forwards, one backwards:
  start       dt, dt u and the gated dy in float32;
  again       the recurrence from the state that the forward pass saved; every s_{t-1} is kept in shared memory;
  back        the walk back: each thread puts its part of the sums where its s_{t-1} was;
  by_channel  sums over the shares of a channel's states: du, ddt, dz and dweights;
  by_state    sums over the rows of the block's channels: dB, dC of this block. Blocks are added outside, in order.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import lanes
from kernels.lanes import LN2, LOG2E, THREADS, read, write
from kernels.selective_scan.mosaic_gpu.stage import MARKED, Stage, prepare
from kernels.selective_scan.mosaic_gpu.tile import CHANNELS, STATES, Tile, thread_index

f32 = jnp.float32
SLOTS = 3  # chunks of inputs in shared memory
UNROLL = 2  # tokens of a turn of the loops over a chunk
# Quarters of a token's [512 * quarters] floats in shared memory, 4 a thread each: first a thread's 16 states (by
# channel), then its part of the sums that they go into.
G_B, Q_A, DB, DC, READOUT = range(5)


@functools.partial(jax.jit, static_argnames=("softplus", "chunk"))  # traced once a shape, not once a layer
def backward(u, dt, A, B, C, D, z, dt_bias, weights, marks, saved, dy, dfinal, *, softplus, chunk):
    """Gradients; arguments as of `forward`, which saved the states of every chunk.

    Args:
        saved: [b, T' / chunk, E' / block, G, 2048] float32.
        dy: [b, T, E] in u's dtype. dfinal: [b, G, E', N] float32, gradient of the final state.

    Returns:
        dict of du, ddt [b, T', G, E'], dA [b, G, E', N], dBC [b, parts, T', G, 2, N] to be added over parts,
        dD [b, parts, E'], dbias [b, parts, G, E'], dz [b, T', E'], dweights [b, T', G - 1, E'] of every group,
        dinitial [b, G, E', N]; du, ddt, dz, dweights in their inputs' dtypes, the rest float32. Without z or weights
        there are no dz or dweights.
    """
    batch, length, groups, _ = u.shape
    padded, tile = A.shape[1], Tile(A.shape[-1])
    states, block = tile.states, tile.channels
    blocks, steps = padded // block, -(-length // chunk)
    ring = ring_of(groups)
    items = steps * groups  # a chunk of a group each, chunks from the last to the first
    readout = z is not None or weights is not None  # whose gradients need each group's readout
    quarters = 5 if readout else 4
    row_of_token = quarters * THREADS * 4
    sums = chunk * 2 * tile.shares  # vectors of 4 sums over channels
    parts = max(1, THREADS // sums)  # threads that share one of them
    arrays = dict(u=u, dt=dt, B=B, C=C, dy=dy, z=z, weights=weights, marks=marks)
    stage = Stage(arrays, chunk, block, groups=1, slots=SLOTS)
    saved_steps = saved.shape[1]
    sds = jax.ShapeDtypeStruct
    out = dict(
        du=sds((batch, steps * chunk, groups, padded), u.dtype),
        ddt=sds((batch, steps * chunk, groups, padded), dt.dtype),
        dA=sds((batch, groups, padded, states), f32),
        dBC=sds((batch, blocks * parts, steps * chunk, groups, 2, states), f32),
        dD=sds((batch, tile.tokens(chunk), padded), f32),
        dbias=sds((batch, tile.tokens(chunk), groups, padded), f32),
        dz=sds((batch, steps * chunk, padded), z.dtype) if z is not None else None,
        dweights=sds((batch, steps * chunk, groups - 1, padded), weights.dtype) if weights is not None else None,
        dinitial=sds((batch, groups, padded, states), f32),
    )
    out = {name: x for name, x in out.items() if x is not None}

    def body(*refs):
        b, e = lax.axis_index("b"), lax.axis_index("e")
        count = len(stage.arrays)
        sources, refs = refs[:count], refs[count:]
        (A_g, D_g, bias_g, saved_g, dfinal_g), refs = refs[:5], refs[5:]
        outputs, refs = dict(zip(out, refs)), refs[len(out) :]
        *buffers, dt_s, x_s, dy_s, kept, ready, known, done, free = refs
        stage.bind(sources, buffers, b, e)

        def budget(registers):
            """The adjoint states of several groups need more registers than a third of what there is."""
            if groups > 1 and lanes.INTERPRET is None:
                plgpu.set_max_registers(registers, action="increase" if registers > 168 else "decrease")

        def chunk_of(item):
            return steps - 1 - lax.div(item, groups)

        def load(item, g):
            stage.load(lax.rem(item, SLOTS), chunk_of(item), g)

        column, first_token = tile.items(chunk)
        offset = column * CHANNELS
        channel = e * block + offset
        tokens = [first_token + first for first in range(0, chunk, tile.tokens(chunk))]
        D = read(D_g, channel, CHANNELS)
        bias = [read(bias_g, g * padded + channel, CHANNELS) for g in range(groups)]

        def weighted(g, slot, token, dy):
            if g == 0 or "weights" not in stage:
                return dy
            return tuple(d * w for d, w in zip(dy, stage.read("weights", slot, token, offset, CHANNELS)))

        def start(item, g):
            """dt, dt u, and dy times gate and weight, float32."""
            place, slot = lax.rem(item, ring), lax.rem(item, SLOTS)
            stage.wait(slot)
            us = [stage.read("u", slot, token, offset, CHANNELS) for token in tokens]
            dts = prepare(stage, slot, chunk_of(item), tokens, offset, bias[g], softplus, length)
            dys = [stage.read("dy", slot, token, offset, CHANNELS) for token in tokens]
            if "z" in stage:
                gates = [stage.read("z", slot, token, offset, CHANNELS) for token in tokens]
                dys = [tuple(d * z * lanes.sigmoid(z) for d, z in zip(dy, gate)) for dy, gate in zip(dys, gates)]
            for (token, dt), u, dy in zip(dts, us, dys):
                at = token * block + offset
                write(dt_s.at[place], at, dt)
                write(x_s.at[place], at, tuple(d * u for d, u in zip(dt, u)))
                write(dy_s.at[place], at, weighted(g, slot, token, dy))
            plgpu.barrier_arrive(ready.at[place])

        @pl.when(lax.axis_index("role") > 0)
        def _():
            row, share, place = tile.owner()
            own = place * 4
            matrix = e * block * states + row * CHANNELS * states + share * STATES

            def read_states(ref, number):
                start = number * padded * states + matrix
                return tuple(read(ref, start, STATES, at=c * states) for c in range(CHANNELS))

            def write_states(ref, number, values):
                for c in range(CHANNELS):
                    write(ref, number * padded * states + matrix, values[c], at=c * states)

            def operands(item, t, *names):
                """dt, dt u (and dy) of the thread's channels, B (and C) of its states, and the reset."""
                turn, slot = lax.rem(item, ring), lax.rem(item, SLOTS)
                refs = (dt_s, x_s, dy_s) if "C" in names else (dt_s, x_s)
                channels = [read(ref.at[turn], t * block + row * CHANNELS, CHANNELS) for ref in refs]
                matrices = [stage.read(name, slot, t, share * STATES, STATES) for name in names]
                return *channels, *matrices, stage.reset(slot, t) if "marks" in stage else None

            def decay(dt, A, reset):
                exponent = dt * A
                return jnp.exp2(exponent if reset is None else exponent + reset)

            def advance(item, A, h, t):
                """exp(dt A) s + dt u B."""
                dt, x, B, reset = operands(item, t, "B")
                return tuple(
                    tuple(decay(dt[c], A[c][n], reset) * h[c][n] + x[c] * B[n] for n in range(STATES))
                    for c in range(CHANNELS)
                )

            def again(item, A, h):
                """The state before each token of the chunk, kept."""

                def token(t, h):
                    for c in range(CHANNELS):
                        write(kept.at[lax.rem(item, 2)], t * row_of_token + own, h[c], at=c * THREADS * 4)
                    return advance(item, A, h, t)

                lax.fori_loop(0, chunk, token, h, unroll=UNROLL)

            def back(item, A, carry):
                """The adjoint recurrence; partial sums over a thread's own states and channels."""

                def token(i, carry):
                    dstate, dA = carry
                    t = chunk - 1 - i
                    at = t * row_of_token + own
                    h = [read(kept.at[lax.rem(item, 2)], at, STATES, at=c * THREADS * 4) for c in range(CHANNELS)]
                    dt, x, dy, B, C, reset = operands(item, t, "B", "C")
                    g_B, q_A, y = ([None] * CHANNELS for _ in range(3))
                    dB, dC = [None] * STATES, [None] * STATES
                    new_dstate, new_dA = [], []
                    for c in range(CHANNELS):
                        row_dstate, row_dA = [], []
                        for n in range(STATES):
                            grad = dstate[c][n] + dy[c] * C[n]
                            left = decay(dt[c], A[c][n], reset)
                            old = left * h[c][n]
                            new = old + x[c] * B[n]
                            q = grad * old
                            dC[n] = add(dC[n], dy[c] * new)
                            dB[n] = add(dB[n], grad * x[c])
                            q_A[c] = add(q_A[c], q * A[c][n])
                            g_B[c] = add(g_B[c], grad * B[n])
                            y[c] = add(y[c], new * C[n])
                            row_dA.append(dA[c][n] + q * dt[c])
                            row_dstate.append(grad * left)
                        new_dstate.append(tuple(row_dstate))
                        new_dA.append(tuple(row_dA))
                    for quarter, part in enumerate((g_B, q_A, dB, dC, y)[:quarters]):
                        write(kept.at[lax.rem(item, 2)], t * row_of_token + own, part, at=quarter * THREADS * 4)
                    return tuple(new_dstate), tuple(new_dA)

                return lax.fori_loop(0, chunk, token, carry, unroll=UNROLL)

            def saved(item, g):
                """States at the start of a chunk (of the first chunk, if there is no such item)."""
                at = (((b * saved_steps + jnp.maximum(chunk_of(item), 0)) * blocks + e) * groups + g) * CHANNELS
                return tuple(read(saved_g, (at + c) * THREADS * 4 + own, STATES) for c in range(CHANNELS))

            @pl.when(lax.axis_index("role") == 1)
            def _():
                budget(136)

                def step(i, carry):
                    A, h = carry
                    for g in range(groups):
                        item, following = i * groups + g, (g + 1) % groups
                        plgpu.barrier_wait(ready.at[lax.rem(item, ring)])
                        pl.when(item > 1)(lambda item=item: plgpu.barrier_wait(free.at[lax.rem(item, 2)]))
                        stage.wait(lax.rem(item, SLOTS))
                        next_A = A if groups == 1 else read_states(A_g, following)
                        next_h = saved(item + 1, following)
                        again(item, A, h)
                        plgpu.barrier_arrive(known.at[lax.rem(item, 2)])
                        A, h = next_A, next_h
                    return A, h

                lax.fori_loop(0, steps, step, (read_states(A_g, 0), saved(jnp.int32(0), 0)))
                for item in range(max(0, items - 2), items):  # no arrival is left unseen
                    plgpu.barrier_wait(free.at[item % 2])

            @pl.when(lax.axis_index("role") == 2)
            def _():
                budget(232)

                def step(i, carry):
                    adjoint, A = carry
                    adjoint = list(adjoint)
                    for g in range(groups):
                        item, following = i * groups + g, (g + 1) % groups
                        plgpu.barrier_wait(known.at[lax.rem(item, 2)])
                        stage.wait(lax.rem(item, SLOTS))
                        next_A = A if groups == 1 else read_states(A_g, following)
                        adjoint[g] = back(item, A, adjoint[g])
                        plgpu.barrier_arrive(done.at[lax.rem(item, 2)])
                        A = next_A
                    return tuple(adjoint), A

                nothing = tuple(lanes.zeros(STATES) for _ in range(CHANNELS))
                adjoint = tuple((read_states(dfinal_g, b * groups + g), nothing) for g in range(groups))
                adjoint, _ = lax.fori_loop(0, steps, step, (adjoint, read_states(A_g, 0)))
                for g, (dinitial, dA) in enumerate(adjoint):
                    write_states(outputs["dinitial"], b * groups + g, dinitial)
                    write_states(outputs["dA"], b * groups + g, dA)

        @pl.when(lax.axis_index("role") == 0)
        def _():
            budget(136)

            def over_shares(pair, token, quarter):
                at = token * row_of_token + offset
                at_share = [quarter * THREADS * 4 + j * block for j in range(tile.shares)]
                shares = [read(kept.at[pair], at, CHANNELS, at=a) for a in at_share]
                return tuple(sum(part[1:], start=part[0]) for part in zip(*shares))

            def by_channel(item, g, total, dD, dbias):
                """du, ddt, dz, dweights; the running dD and dbias. total: the groups' readouts so far, for dz."""
                pair, slot, index = lax.rem(item, 2), lax.rem(item, SLOTS), chunk_of(item)
                new_total = []
                for number, token in enumerate(tokens):
                    at = token * block + offset
                    g_B, q_A = over_shares(pair, token, G_B), over_shares(pair, token, Q_A)
                    y = over_shares(pair, token, READOUT) if readout else None
                    step, dy = (
                        read(dt_s.at[lax.rem(item, ring)], at, CHANNELS),
                        read(dy_s.at[lax.rem(item, ring)], at, CHANNELS),
                    )
                    names = [name for name in ("u", "dt", "dy", "z") if name in stage]
                    s = {name: stage.read(name, slot, token, offset, CHANNELS) for name in names}
                    ddt = tuple(q * LN2 + u * gb for q, u, gb in zip(q_A, s["u"], g_B))
                    if softplus:
                        ddt = tuple(d * lanes.sigmoid(r + o) for d, r, o in zip(ddt, s["dt"], bias[g]))
                    real = stage.real(slot, token, index, length)
                    ddt = ddt if real is None else tuple(jnp.where(real, d, 0) for d in ddt)
                    du = tuple(d * gb for d, gb in zip(step, g_B))
                    if g == 0:
                        du = tuple(a + d * y for a, d, y in zip(du, D, dy))
                        dD = tuple(a + y * u for a, y, u in zip(dD, dy, s["u"]))
                    dbias = tuple(a + d for a, d in zip(dbias, ddt))
                    time = (b * steps + index) * chunk + token
                    write(outputs["du"], (time * groups + g) * padded + channel, du)
                    write(outputs["ddt"], (time * groups + g) * padded + channel, ddt)
                    if not readout:
                        continue
                    gate, dy = s.get("z"), s["dy"]
                    open_ = None if gate is None else tuple(lanes.sigmoid(z) for z in gate)
                    if g > 0 and "dweights" in outputs:
                        dw = dy if gate is None else tuple(d * z * o for d, z, o in zip(dy, gate, open_))
                        at = (time * (groups - 1) + g - 1) * padded + channel
                        write(outputs["dweights"], at, tuple(d * y for d, y in zip(dw, y)))
                    before = tuple(d * u for d, u in zip(D, s["u"])) if g == 0 else total[number]
                    y = tuple(a + b for a, b in zip(before, weighted(g, slot, token, y)))
                    new_total.append(y)
                    if g == groups - 1 and gate is not None:
                        dz = tuple(d * y * o * (1 + z * (1 - o)) for d, y, o, z in zip(dy, y, open_, gate))
                        write(outputs["dz"], time * padded + channel, dz)
                return new_total, dD, dbias

            def by_state(item, g):
                """dB, dC of the block's channels."""
                rows = tile.rows // parts
                for first in range(0, sums * parts, THREADS):
                    thread = thread_index()
                    number = first + thread
                    part, number = lax.div(number, sums), lax.rem(number, sums)
                    share = lax.rem(number, tile.shares)
                    which = lax.rem(lax.div(number, tile.shares), 2)
                    token = lax.div(number, 2 * tile.shares)
                    at = token * row_of_token + (DB + which) * (THREADS * 4) + share * block + part * (rows * 4)

                    def add_row(i, total, at=at, thread=thread):
                        # each thread starts elsewhere, else all would read the same bank
                        turn = lax.rem(thread + i, rows)
                        values = read(kept.at[lax.rem(item, 2)], at + turn * 4, 4)
                        return tuple(a + v for a, v in zip(total, values))

                    total = lax.fori_loop(0, rows, add_row, lanes.zeros(4), unroll=8)
                    time = ((b * blocks + e) * parts + part) * (steps * chunk) + chunk_of(item) * chunk + token
                    write(outputs["dBC"], ((time * groups + g) * 2 + which) * states + share * 4, total)

            for item in range(min(SLOTS, items)):
                load(jnp.int32(item), item % groups)
            for item in range(min(ring - 1, items)):
                start(jnp.int32(item), item % groups)

            def step(i, carry):
                dD, dbias = carry
                dbias, total = list(dbias), None
                for g in range(groups):
                    item = i * groups + g
                    ahead = item + ring - 1
                    pl.when(ahead < items)(lambda ahead=ahead, g=g: start(ahead, (g + ring - 1) % groups))
                    plgpu.barrier_wait(done.at[lax.rem(item, 2)])
                    total, dD, dbias[g] = by_channel(item, g, total, dD, dbias[g])
                    by_state(item, g)
                    plgpu.barrier_arrive(free.at[lax.rem(item, 2)])
                    plgpu.commit_smem()  # all threads are through with this slot
                    pl.when(item + SLOTS < items)(lambda item=item, g=g: load(item + SLOTS, (g + SLOTS) % groups))
                return dD, tuple(dbias)

            dD, dbias = lax.fori_loop(0, steps, step, (lanes.zeros(CHANNELS), (lanes.zeros(CHANNELS),) * groups))
            slot = b * tile.tokens(chunk) + first_token
            write(outputs["dD"], slot * padded + channel, dD)
            for g in range(groups):
                write(outputs["dbias"], (slot * groups + g) * padded + channel, dbias[g])

    kernel = plgpu.kernel(
        body,
        out_type=tuple(out.values()),
        scratch_types=[
            *stage.scratch(),
            plgpu.SMEM((ring, chunk, block), f32),
            plgpu.SMEM((ring, chunk, block), f32),
            plgpu.SMEM((ring, chunk, block), f32),
            plgpu.SMEM((2, chunk, row_of_token), f32),
            plgpu.Barrier(num_barriers=ring),
            *[plgpu.Barrier(num_barriers=2)] * 3,
        ],
        grid=(batch, blocks),
        grid_names=("b", "e"),
        num_threads=3,
        thread_name="role",
        compiler_params=lanes.compiler_params(),
        interpret=lanes.INTERPRET,
    )
    return dict(zip(out, kernel(*stage.arrays.values(), A * LOG2E, D, dt_bias, saved, dfinal)))


def backward_bytes(u, dt, B, C, z, weights, states, chunk) -> int:
    """Shared memory of a block."""
    block = Tile(states).channels
    dy = jax.ShapeDtypeStruct((*u.shape[:2], u.shape[3]), u.dtype)
    arrays = dict(u=u, dt=dt, B=B, C=C, dy=dy, z=z, weights=weights, marks=MARKED)
    return (
        Stage(arrays, chunk, block, groups=1, slots=SLOTS).bytes()
        + chunk * (ring_of(u.shape[2]) * 3 * block + 2 * 5 * THREADS * 4) * 4
    )


def ring_of(groups) -> int:
    """Chunks whose dt, dt u and dy are in shared memory: three let the next one be prepared early."""
    return 3 if groups == 1 else 2


def add(total, term):
    return term if total is None else total + term
