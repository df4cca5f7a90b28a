"""Backward pass of the selective scan on Hopper: chunks of time from the last to the first, states computed again.

With g_t the gradient of the state after token t, and per channel and state

    g_t = exp(dt_{t+1} A) g_{t+1} + dy_t C_t,    q_t = g_t exp(dt_t A) s_{t-1}
    dC_t = sum_e dy_t s_t,    dB_t = sum_e g_t dt_t u_t                     (over channels)
    du_t = dt_t sum_n g_t B_t,    ddt_t = sum_n q_t A + u_t sum_n g_t B_t   (over states),    dA = sum_t q_t dt_t

a block of channels of one group has four warpgroups, which hand chunks to one another:
  start       dt, dt u and the gated dy in float32;
  walk        two warpgroups, each with half of the channels: forwards from the state that the forward pass saved, then
              back with the states and decays of four tokens in registers; each thread stores its part of the sums;
  by_state    sums over the block's channels, by the warpgroup of `start`: dB, dC of this block. Blocks are added
              outside, in order;
  by_channel  sums over a channel's states: du, ddt, dz, dweights; the next chunk sent for.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from seqmodels.kernels import lanes
from seqmodels.kernels.lanes import LN2, LOG2E, THREADS, read, write
from seqmodels.kernels.selective_scan.mosaic_gpu import tile as tiles
from seqmodels.kernels.selective_scan.mosaic_gpu.stage import MARKED, Stage, prepare
from seqmodels.kernels.selective_scan.mosaic_gpu.tile import CHANNELS, COLUMN, STATES, Tile, thread_index

f32 = jnp.float32
SLOTS = 3  # chunks of inputs in shared memory
AHEAD = 3  # chunks of dt, dt u and dy
PART = 4  # tokens of a chunk whose states a thread holds in registers, and whose sums go to shared memory together
BUFFERS = 2  # parts whose sums are there
WALKER, AIDE = 176, 80  # registers of a thread that walks, and of another
G_B, Q_A, READOUT = range(3)  # sums over states: for each share, the block's channels and a gap against bank conflicts
DB, DC = range(2)  # sums over channels: for each share and row, 4 states


@functools.partial(jax.jit, static_argnames=("softplus", "chunk"))  # traced once a shape, not once a layer
def backward(u, dt, A, B, C, D, z, dt_bias, weights, marks, saved, dy, dfinal, *, softplus, chunk):
    """Gradients; arguments as of `forward`, which saved the states of every chunk.

    Args:
        saved: [b, T' / chunk or more, G E' N] float32, in the order of `Tile.saved`.
        dy: [b, T, E] in u's dtype. dfinal: [b, G, E', N] float32, gradient of the final state.
        chunk: a multiple of PART.

    Returns:
        dict of du, ddt [b, T', G, E'], dA [b, G, E', N], dBC [b, blocks, T', G, 2, N] to be added over blocks,
        dD (by the first group alone), dbias [b, parts, G, E'], dz [b, T', G, E'] to be added over groups, dweights
        [b, T', G - 1, E'] of every group, dinitial [b, G, E', N]; du, ddt, dz, dweights in their inputs' dtypes, the
        rest float32. Without z or weights there are no dz or dweights.
    """
    batch, length, groups, _ = u.shape
    padded, tile = A.shape[1], Tile(A.shape[-1])
    states, block, workers = tile.states, tile.channels, tiles.WORKERS
    blocks, steps = padded // block, -(-length // chunk)
    parts = range(chunk // PART)  # of a chunk, from the last to the first
    readout = z is not None or weights is not None  # whose gradients need each group's readout
    of_channel = tile.shares * tile.rows * STATES  # between the states of a thread's channels, where they are saved
    share_of_channels = block + tile.neighbours * CHANNELS
    share_of_states = tile.rows * STATES
    by_states = (2 + readout) * tile.shares * share_of_channels  # where the sums over channels are in a token's row
    row_of_token = row_bytes(tile, readout) // 4
    arrays = dict(u=u, dt=dt, B=B, C=C, dy=dy, z=z, weights=weights, marks=marks)
    stage = Stage(arrays, chunk, block, groups=1, slots=SLOTS)
    saved_steps = saved.shape[1]
    sds = jax.ShapeDtypeStruct
    out = dict(
        du=sds((batch, steps * chunk, groups, padded), u.dtype),
        ddt=sds((batch, steps * chunk, groups, padded), dt.dtype),
        dA=sds((batch, groups, padded, states), f32),
        dBC=sds((batch, blocks, steps * chunk, groups, 2, states), f32),
        dD=sds((batch, tile.tokens(PART), groups, padded), f32),
        dbias=sds((batch, tile.tokens(PART), groups, padded), f32),
        dz=sds((batch, steps * chunk, groups, padded), z.dtype) if z is not None else None,
        dweights=sds((batch, steps * chunk, groups - 1, padded), weights.dtype) if weights is not None else None,
        dinitial=sds((batch, groups, padded, states), f32),
    )
    out = {name: x for name, x in out.items() if x is not None}

    def body(*refs):
        b, g, e = (lax.axis_index(name) for name in "bge")
        count = len(stage.arrays)
        sources, refs = refs[:count], refs[count:]
        (A_g, D_g, bias_g, saved_g, dfinal_g), refs = refs[:5], refs[5:]
        outputs, refs = dict(zip(out, refs)), refs[len(out) :]
        *buffers, dt_s, x_s, dy_s, sums, ready, done, free, spent = refs
        stage.bind(sources, buffers, b, e)

        def budget(registers):
            """The walk needs more registers than a quarter of what there is."""
            if lanes.INTERPRET is None:
                plgpu.set_max_registers(registers, action="increase" if registers > 128 else "decrease")

        def chunk_of(item):
            return steps - 1 - item

        def slot_of(item):
            return lax.rem(item, SLOTS)

        def place_of(item):
            return lax.rem(item, AHEAD)

        def buffer_of(item, part):
            return lax.rem(item * len(parts) + part, BUFFERS)

        def load(item):
            stage.load(slot_of(item), chunk_of(item), g)

        def tokens_of(part):
            end = chunk - part * PART
            return range(end - PART, end)

        def weighted(slot, token, offset, dy):
            """dy times the group's weight; the first group has none."""
            if "weights" not in stage:
                return dy
            weights = stage.read("weights", slot, token, offset, COLUMN)
            return tuple(d * jnp.where(g == 0, jnp.ones_like(w), w) for d, w in zip(dy, weights))

        @pl.when(lax.axis_index("role") == 0)
        def _():
            budget(AIDE)
            offset, first_token = tile.items(chunk)
            tokens = [first_token + first for first in range(0, chunk, tile.tokens(chunk))]
            bias = read(bias_g, g * padded + e * block + offset, COLUMN)

            def start(item):
                """dt, dt u, and dy times gate and weight, float32."""
                place, slot = place_of(item), slot_of(item)
                stage.wait(slot)
                us = [stage.read("u", slot, token, offset, COLUMN) for token in tokens]
                dts = prepare(stage, slot, chunk_of(item), tokens, offset, bias, softplus, length)
                dys = [stage.read("dy", slot, token, offset, COLUMN) for token in tokens]
                if "z" in stage:
                    gates = [stage.read("z", slot, token, offset, COLUMN) for token in tokens]
                    dys = [tuple(d * z * lanes.sigmoid(z) for d, z in zip(dy, gate)) for dy, gate in zip(dys, gates)]
                for (token, dt), u, dy in zip(dts, us, dys):
                    at = token * block + offset
                    write(dt_s.at[place], at, dt)
                    write(x_s.at[place], at, tuple(d * u for d, u in zip(dt, u)))
                    write(dy_s.at[place], at, weighted(slot, token, offset, dy))
                plgpu.barrier_arrive(ready.at[place])

            vectors = PART * 2 * tile.shares  # sums of 4 states each
            several = max(1, THREADS // vectors)  # neighbouring threads that share one
            rows = tile.rows // several  # a power of two

            def by_state(item, part):
                """dB, dC of the block's channels."""
                for first in range(0, vectors * several, THREADS):
                    thread = first + thread_index()
                    vector = lax.div(thread, several)
                    share, which = lax.rem(vector, tile.shares), lax.rem(lax.div(vector, tile.shares), 2)
                    token = lax.div(vector, 2 * tile.shares)
                    at = token * row_of_token + (which * tile.shares + share) * share_of_states
                    at += lax.rem(thread, several) * STATES
                    total = None
                    for i in range(rows):  # each vector starts elsewhere, else all would read the same bank
                        row = ((vector + i) & (rows - 1)) * (several * STATES)
                        values = read(sums.at[buffer_of(item, part)], at + row, STATES, at=by_states)
                        total = values if total is None else tuple(a + v for a, v in zip(total, values))
                    for bit in range(several.bit_length() - 1):
                        total = tuple(x + lanes.exchange(x, 1 << bit) for x in total)
                    time = ((b * blocks + e) * steps + chunk_of(item)) * chunk + tokens_of(part)[0] + token
                    write(outputs["dBC"], ((time * groups + g) * 2 + which) * states + share * STATES, total)

            for item in range(min(SLOTS, steps)):
                load(jnp.int32(item))
            for item in range(min(AHEAD - 1, steps)):
                start(jnp.int32(item))

            def step(item, _):
                ahead = item + AHEAD - 1

                @pl.when(ahead < steps)
                def _():
                    pl.when(item > 0)(lambda: plgpu.barrier_wait(spent.at[place_of(ahead)]))
                    start(ahead)

                for part in parts:
                    plgpu.barrier_wait(done.at[buffer_of(item, part)])
                    by_state(item, part)
                    plgpu.barrier_arrive(free.at[buffer_of(item, part)])

            lax.fori_loop(0, steps, step, None)
            for item in range(max(0, steps - AHEAD), steps):  # no arrival is left unseen
                plgpu.barrier_wait(spent.at[item % AHEAD])

        @pl.when((lax.axis_index("role") > 0) & (lax.axis_index("role") <= workers))
        def _():
            budget(WALKER)
            row, share = tile.owner(lax.axis_index("role") - 1)
            matrix = (e * block + row * CHANNELS) * states + share * STATES
            place = share * tile.rows + tile.place(row)
            channels = range(CHANNELS)

            def read_states(ref, number):
                """The thread's part of matrix `number` of [..., E', N]."""
                return tuple(read(ref, number * padded * states + matrix, STATES, at=c * states) for c in channels)

            def write_states(ref, number, values):
                for c in channels:
                    write(ref, number * padded * states + matrix, values[c], at=c * states)

            def saved(item):
                """States at the start of a chunk (of the first chunk, if there is no such item)."""
                at = ((b * saved_steps + jnp.maximum(chunk_of(item), 0)) * blocks + e) * groups + g
                return tuple(read(saved_g, (at * CHANNELS + c) * of_channel + place * STATES, STATES) for c in channels)

            def of_channels(ref, item, t):
                return read(ref.at[place_of(item)], row * CHANNELS, CHANNELS, at=t * block)

            def of_states(name, item, t):
                return stage.read(name, slot_of(item), 0, share * STATES, STATES, ahead=t)

            def forwards(item, A, h, tokens, decays=None):
                """Of each token the decays; the states before the first token, after it, and so on to the last."""
                loaded = [
                    (of_channels(dt_s, item, t), of_channels(x_s, item, t), of_states("B", item, t)) for t in tokens
                ]
                if decays is None:
                    resets = [stage.reset(slot_of(item), t) if "marks" in stage else None for t in tokens]
                    decays = [
                        [[decay(dt[c], a, reset) for a in A[c]] for c in channels]
                        for (dt, _, _), reset in zip(loaded, resets)
                    ]
                kept = [h]
                for left, (_, x, B) in zip(decays, loaded):
                    kept.append([[a * s + x[c] * b for a, s, b in zip(left[c], kept[-1][c], B)] for c in channels])
                return decays, kept

            def back(item, A, tokens, decays, kept, own, dstate, dA):
                """The adjoint recurrence; sums over a thread's own states and channels go to `own`."""
                dstate, dA = list(dstate), list(dA)

                def operands(t):
                    names = (dt_s, x_s, dy_s)
                    return [of_channels(x, item, t) for x in names] + [of_states(name, item, t) for name in "BC"]

                following = operands(tokens[-1])
                for t in reversed(tokens):
                    number = t - tokens[0]
                    dt, x, dy, B, C = following
                    if number > 0:
                        following = operands(t - 1)  # before anything is stored
                    old, new, left = kept[number], kept[number + 1], decays[number]
                    dB, dC, g_B, q_A, y = [None] * STATES, [None] * STATES, [], [], []
                    for c in channels:
                        grad = [d + dy[c] * k for d, k in zip(dstate[c], C)]
                        dstate[c] = [g * a for g, a in zip(grad, left[c])]
                        q = [d * s for d, s in zip(dstate[c], old[c])]
                        dA[c] = [before + x * dt[c] for before, x in zip(dA[c], q)]
                        dB = [add(before, g * x[c]) for before, g in zip(dB, grad)]
                        dC = [add(before, dy[c] * s) for before, s in zip(dC, new[c])]
                        g_B.append(sum_of(g * b for g, b in zip(grad, B)))
                        q_A.append(sum_of(x * a for x, a in zip(q, A[c])))
                        y.append(sum_of(s * k for s, k in zip(new[c], C)))
                    for kind, values in enumerate((g_B, q_A, y)[: 2 + readout]):
                        at = number * row_of_token + kind * tile.shares * share_of_channels
                        write(own, share * share_of_channels + row * CHANNELS, tuple(values), at=at)
                    for kind, values in enumerate((dB, dC)):
                        at = number * row_of_token + by_states + kind * tile.shares * share_of_states
                        write(own, share * share_of_states + row * STATES, tuple(values), at=at)
                return dstate, dA

            def walk(item, A, h, dstate, dA):
                """The chunk from its first part to its last but one, then back from its last to its first."""
                starts, known = [h], []
                for part in reversed(parts[1:]):
                    decays, kept = forwards(item, A, starts[-1], tokens_of(part))
                    starts.append(kept[-1])
                    known.append(decays)
                known.append(None)
                for part in parts:
                    tokens = tokens_of(part)
                    decays, kept = forwards(item, A, starts.pop(), tokens, known.pop())
                    number, buffer = item * len(parts) + part, buffer_of(item, part)
                    pl.when(number >= BUFFERS)(lambda buffer=buffer: plgpu.barrier_wait(free.at[buffer]))
                    dstate, dA = back(item, A, tokens, decays, kept, sums.at[buffer], dstate, dA)
                    plgpu.barrier_arrive(done.at[buffer])
                return tuple(tuple(row) for row in dstate), tuple(tuple(row) for row in dA)

            def step(item, carry):
                adjoint, h = carry
                plgpu.barrier_wait(ready.at[place_of(item)])
                stage.wait(slot_of(item))
                next_h = saved(item + 1)
                return walk(item, A, h, *adjoint), next_h

            A = read_states(A_g, g)
            adjoint = read_states(dfinal_g, b * groups + g), (lanes.zeros(STATES),) * CHANNELS
            (dinitial, dA), _ = lax.fori_loop(0, steps, step, (adjoint, saved(jnp.int32(0))))
            for number in range(max(0, steps * len(parts) - BUFFERS), steps * len(parts)):
                plgpu.barrier_wait(free.at[number % BUFFERS])  # no arrival is left unseen
            write_states(outputs["dinitial"], b * groups + g, dinitial)
            write_states(outputs["dA"], b * groups + g, dA)

        @pl.when(lax.axis_index("role") == workers + 1)
        def _():
            budget(AIDE)
            offset, first_token = tile.items(PART)
            channel = e * block + offset
            bias = read(bias_g, g * padded + channel, COLUMN)
            D = tuple(jnp.where(g == 0, d, 0) for d in read(D_g, channel, COLUMN))  # of the first group's u

            def over_shares(own, token, kind):
                at = [(kind * tile.shares + share) * share_of_channels for share in range(tile.shares)]
                shares = [read(own, token * row_of_token + offset, COLUMN, at=a) for a in at]
                return tuple(sum(terms[1:], start=terms[0]) for terms in zip(*shares))

            def by_channel(item, part, number, dD, dbias):
                """du, ddt, dz, dweights; the running dD and dbias."""
                slot, place, index = slot_of(item), place_of(item), chunk_of(item)
                in_part = first_token + number * tile.tokens(PART)
                token, own = tokens_of(part)[0] + in_part, sums.at[buffer_of(item, part)]
                g_B, q_A = over_shares(own, in_part, G_B), over_shares(own, in_part, Q_A)
                y = over_shares(own, in_part, READOUT) if readout else None
                step, dy = (read(ref.at[place], token * block + offset, COLUMN) for ref in (dt_s, dy_s))
                names = [name for name in ("u", "dt", "dy", "z") if name in stage]
                s = {name: stage.read(name, slot, token, offset, COLUMN) for name in names}
                ddt = tuple(q * LN2 + u * gb for q, u, gb in zip(q_A, s["u"], g_B))
                if softplus:
                    ddt = tuple(d * lanes.sigmoid(r + o) for d, r, o in zip(ddt, s["dt"], bias))
                real = stage.real(slot, token, index, length)
                ddt = ddt if real is None else tuple(jnp.where(real, d, 0) for d in ddt)
                du = tuple(t * gb + d * x for t, gb, d, x in zip(step, g_B, D, dy))
                dD = tuple(a + x * u for a, x, u in zip(dD, dy, s["u"]))
                dbias = tuple(a + d for a, d in zip(dbias, ddt))
                time = (b * steps + index) * chunk + token
                write(outputs["du"], (time * groups + g) * padded + channel, du)
                write(outputs["ddt"], (time * groups + g) * padded + channel, ddt)
                if readout:
                    of_readout(slot, token, time, s, y)
                return dD, dbias

            def of_readout(slot, token, time, s, y):
                """dweights, and the group's part of dz."""
                z, dy = s.get("z"), s["dy"]
                gate = None if z is None else tuple(lanes.sigmoid(z) for z in z)
                if "dweights" in outputs:
                    dw = dy if z is None else tuple(d * z * k for d, z, k in zip(dy, z, gate))
                    at = (time * (groups - 1) + jnp.maximum(g - 1, 0)) * padded + channel
                    dw = tuple(d * y for d, y in zip(dw, y))
                    pl.when(g > 0)(lambda: write(outputs["dweights"], at, dw))
                if z is not None:
                    part = (d * u + y for d, u, y in zip(D, s["u"], weighted(slot, token, offset, y)))
                    dz = tuple(d * y * k * (1 + z * (1 - k)) for d, y, k, z in zip(dy, part, gate, z))
                    write(outputs["dz"], (time * groups + g) * padded + channel, dz)

            passes = [(part, number) for part in parts for number in range(PART // tile.tokens(PART))]

            def step(item, totals):
                stage.wait(slot_of(item))
                for i, (part, number) in enumerate(passes):
                    if number == 0:
                        plgpu.barrier_wait(done.at[buffer_of(item, part)])
                    totals = by_channel(item, part, number, *totals)
                    if i + 1 == len(passes) or passes[i + 1][0] != part:
                        plgpu.barrier_arrive(free.at[buffer_of(item, part)])
                plgpu.barrier_arrive(spent.at[place_of(item)])
                plgpu.commit_smem()  # all threads are through with this slot
                pl.when(item + SLOTS < steps)(lambda: load(item + SLOTS))
                return totals

            totals = lax.fori_loop(0, steps, step, (lanes.zeros(COLUMN),) * 2)
            at = ((b * tile.tokens(PART) + first_token) * groups + g) * padded + channel
            for name, total in zip(("dD", "dbias"), totals):
                write(outputs[name], at, total)

    kernel = plgpu.kernel(
        body,
        out_type=tuple(out.values()),
        scratch_types=[
            *stage.scratch(),
            *[plgpu.SMEM((AHEAD, chunk, block), f32)] * 3,
            plgpu.SMEM((BUFFERS, PART, row_of_token), f32),
            plgpu.Barrier(num_barriers=AHEAD),
            plgpu.Barrier(num_barriers=BUFFERS, num_arrivals=workers),
            plgpu.Barrier(num_barriers=BUFFERS, num_arrivals=2),  # both readers of the sums
            plgpu.Barrier(num_barriers=AHEAD),
        ],
        grid=(batch, groups, blocks),
        grid_names=("b", "g", "e"),
        num_threads=2 + workers,
        thread_name="role",
        compiler_params=lanes.compiler_params(),
        interpret=lanes.INTERPRET,
    )
    return dict(zip(out, kernel(*stage.arrays.values(), A * LOG2E, D, dt_bias, saved, dfinal)))


def row_bytes(tile, readout) -> int:
    """Shared memory of a token's sums."""
    by_channel = (2 + readout) * tile.shares * (tile.channels + tile.neighbours * CHANNELS)
    return (by_channel + 2 * tile.states * tile.rows) * 4


def backward_bytes(u, dt, B, C, z, weights, states, chunk) -> int:
    """Shared memory of a block."""
    tile = Tile(states)
    dy = jax.ShapeDtypeStruct((*u.shape[:2], u.shape[3]), u.dtype)
    arrays = dict(u=u, dt=dt, B=B, C=C, dy=dy, z=z, weights=weights, marks=MARKED)
    inputs = Stage(arrays, chunk, tile.channels, groups=1, slots=SLOTS).bytes()
    return inputs + AHEAD * 3 * chunk * tile.channels * 4 + BUFFERS * PART * row_bytes(tile, True)


def decay(dt, A, reset):
    """exp(dt A), 0 where a document begins."""
    return jnp.exp2(dt * A if reset is None else dt * A + reset)


def add(total, term):
    return term if total is None else total + term


def sum_of(terms):
    """One after another, for products fuse with the addition that follows."""
    return functools.reduce(lambda a, b: a + b, terms)
