"""Backward pass of the selective scan on Hopper: chunks of time from the last to the first, states computed again.

With g_t the gradient of the state after token t, and per channel and state

    g_t = exp(dt_{t+1} A) g_{t+1} + dy_t C_t,    q_t = g_t exp(dt_t A) s_{t-1} = g_t (s_t - dt_t u_t B_t)
    dC_t = sum_e dy_t s_t,    dB_t = sum_e g_t dt_t u_t                     (over channels)
    du_t = dt_t sum_n g_t B_t,    ddt_t = sum_n q_t A + u_t sum_n g_t B_t   (over states),    dA = sum_t q_t dt_t

a chunk goes through
  1. dt, dt u and the gated dy in float32;
  2. the recurrence again from the state that the forward pass saved; every s_t is kept in shared memory;
  3. the walk back: each thread puts its part of the four sums where its s_t was;
  4. sums over the shares of a channel's states: du, ddt, dz and dweights;
  5. sums over the rows of the block's channels: dB, dC of this block. Blocks are added outside, in a fixed order.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import lanes
from kernels.lanes import LN2, LOG2E, THREADS, read, write
from kernels.selective_scan.mosaic_gpu.forward import specs
from kernels.selective_scan.mosaic_gpu.tile import CHANNELS, STATES, Tile

f32 = jnp.float32
STAGES = 2
UNROLL = 2
# Quarters of a token's [512 * quarters] floats in shared memory, 4 a thread each: first a thread's 16 states (by channel),
# then its part of the sums that they go into.
G_B, Q_A, DB, DC, READOUT = range(5)


def backward(u, dt, A, B, C, D, z, dt_bias, weights, reset, real, saved, dy, dfinal, *, softplus, chunk):
    """Gradients; arguments as of `forward`, which saved the states of every chunk.

    Args:
        saved: [b, T' / chunk, E' / block, G, 2048] float32.
        dy: [b, T, E] in u's dtype. dfinal: [b, G, E', N] float32, gradient of the final state.

    Returns:
        dict of du, ddt [b, T', G, E'] (u's dtype), dA [b, G, E', N], dBC [b, parts, T', G, 2, N] to be added over parts,
        dD [b, parts, E'], dbias [b, parts, G, E'], dz [b, T', E'], dweights [b, T', G - 1, E'] of every group (u's
        dtype), dinitial [b, G, E', N]. Float32 where nothing else is said; dz, dweights None without z, weights.
    """
    batch, length, groups, width = u.shape
    padded, tile = A.shape[1], Tile(A.shape[-1])
    states, block = tile.states, tile.channels
    blocks, steps = padded // block, -(-length // chunk)
    ragged = length % chunk != 0
    readout = z is not None or weights is not None  # whose gradients need each group's readout
    quarters = 5 if readout else 4
    row_of_token = quarters * THREADS * 4
    sums = chunk * 2 * tile.shares  # vectors of 4 sums over channels
    parts = max(1, THREADS // sums)  # threads that share one of them
    given = dict(u=u, dt=dt, B=B, C=C, dy=dy, z=z, weights=weights, reset=reset, real=real)
    given = {name: x for name, x in given.items() if x is not None}
    sds = jax.ShapeDtypeStruct
    out = dict(
        du=sds((batch, steps * chunk, groups, padded), u.dtype),
        ddt=sds((batch, steps * chunk, groups, padded), u.dtype),
        dA=sds((batch, groups, padded, states), f32),
        dBC=sds((batch, blocks * parts, steps * chunk, groups, 2, states), f32),
        dD=sds((batch, tile.tokens, padded), f32),
        dbias=sds((batch, tile.tokens, groups, padded), f32),
        dz=sds((batch, steps * chunk, padded), u.dtype) if z is not None else None,
        dweights=sds((batch, steps * chunk, groups - 1, padded), u.dtype) if weights is not None else None,
        dinitial=sds((batch, groups, padded, states), f32),
    )
    out = {name: x for name, x in out.items() if x is not None}

    def body(*refs):
        inputs, refs = dict(zip(given, refs)), refs[len(given) :]
        (A_g, D_g, bias_g, saved_g, dfinal_g), refs = refs[:5], refs[5:]
        outputs, (dt_s, x_s, dy_s, kept) = dict(zip(out, refs)), refs[len(out) :]
        b, e = lax.axis_index("b"), lax.axis_index("e")
        row, share, place = tile.owner()
        column, first_token = tile.items()
        channel = e * block + column * CHANNELS
        own = place * 4
        D = read(D_g, channel, CHANNELS)
        bias = [read(bias_g, g * padded + channel, CHANNELS) for g in range(groups)]
        matrix = e * block * states + row * CHANNELS * states + share * STATES

        def read_states(ref, number):
            start = number * padded * states + matrix
            return tuple(read(ref, start, STATES, at=c * states) for c in range(CHANNELS))

        def write_states(ref, number, values):
            for c in range(CHANNELS):
                write(ref, number * padded * states + matrix, values[c], at=c * states)

        def real_tokens(s, token, index):
            valid = token + index * chunk < length if ragged else None
            if "real" in s:
                mark = read(s["real"], token, 1)[0] > 0
                valid = mark if valid is None else mark & valid
            return valid

        def prepare(index, s):
            """dt, dt u, and dy times the gate, float32."""
            for first in range(0, chunk, tile.tokens):
                token = first_token + first
                valid = real_tokens(s, token, index)
                for g in range(groups):
                    at = (token * groups + g) * block + column * CHANNELS
                    step = tuple(d + o for d, o in zip(read(s["dt"], at, CHANNELS), bias[g]))
                    step = tuple(lanes.softplus(d) for d in step) if softplus else step
                    step = step if valid is None else tuple(jnp.where(valid, d, 0) for d in step)
                    write(dt_s, at, step)
                    write(x_s, at, tuple(d * u for d, u in zip(step, read(s["u"], at, CHANNELS))))
                at = token * block + column * CHANNELS
                dy = read(s["dy"], at, CHANNELS)
                if "z" in s:
                    dy = tuple(dy * z * lanes.sigmoid(z) for dy, z in zip(dy, read(s["z"], at, CHANNELS)))
                write(dy_s, at, dy)

        def decay(s, t, dt, A):
            exponent = dt * A
            return jnp.exp2(exponent + s["reset"][0, t] if "reset" in s else exponent)

        def matrices(s, g, t, *names):
            return [read(s[name], (t * groups + g) * states + share * STATES, STATES) for name in names]

        def steps_of(g, t):
            at = (t * groups + g) * block + row * CHANNELS
            return read(dt_s, at, CHANNELS), read(x_s, at, CHANNELS)

        def again(s, g, A, h):
            """The chunk's states, kept."""

            def several(i, h):
                loaded = [(*steps_of(g, i * UNROLL + k), *matrices(s, g, i * UNROLL + k, "B")) for k in range(UNROLL)]
                for k, (dt, x, B) in enumerate(loaded):
                    t = i * UNROLL + k
                    h = tuple(
                        tuple(decay(s, t, dt[c], A[c][n]) * h[c][n] + x[c] * B[n] for n in range(STATES))
                        for c in range(CHANNELS)
                    )
                    for c in range(CHANNELS):
                        write(kept, t * row_of_token + own, h[c], at=c * THREADS * 4)
                return h

            lax.fori_loop(0, chunk // UNROLL, several, h)

        def back(s, g, A, carry):
            """The adjoint recurrence; partial sums over a thread's own states and channels."""

            def load(t):
                dt, x = steps_of(g, t)
                dy = read(dy_s, t * block + row * CHANNELS, CHANNELS)
                w = weight(s, g, t, row)
                dy = dy if w is None else tuple(dy * w for dy, w in zip(dy, w))
                h = [read(kept, t * row_of_token + own, STATES, at=c * THREADS * 4) for c in range(CHANNELS)]
                return dt, x, dy, h, *matrices(s, g, t, "B", "C")

            def several(i, carry):
                ts = [chunk - 1 - i * UNROLL - k for k in range(UNROLL)]
                loaded = [load(t) for t in ts]
                results = []
                for t, (dt, x, dy, h, B, C) in zip(ts, loaded):
                    dstate, dA = carry
                    g_B, q_A, y = ([None] * CHANNELS for _ in range(3))
                    dB, dC = [None] * STATES, [None] * STATES
                    new_dstate, new_dA = [], []
                    for c in range(CHANNELS):
                        row_dstate, row_dA = [], []
                        for n in range(STATES):
                            grad = dstate[c][n] + dy[c] * C[n]
                            dC[n] = add(dC[n], dy[c] * h[c][n])
                            dB[n] = add(dB[n], grad * x[c])
                            q = grad * (h[c][n] - x[c] * B[n])
                            q_A[c] = add(q_A[c], q * A[c][n])
                            g_B[c] = add(g_B[c], grad * B[n])
                            y[c] = add(y[c], h[c][n] * C[n])
                            row_dA.append(dA[c][n] + q * dt[c])
                            row_dstate.append(grad * decay(s, t, dt[c], A[c][n]))
                        new_dstate.append(tuple(row_dstate))
                        new_dA.append(tuple(row_dA))
                    carry = tuple(new_dstate), tuple(new_dA)
                    results.append((t, (g_B, q_A, dB, dC, y)))
                for t, parts in results:
                    for quarter, part in enumerate(parts[:quarters]):
                        write(kept, t * row_of_token + own, part, at=quarter * THREADS * 4)
                return carry

            return lax.fori_loop(0, chunk // UNROLL, several, carry)

        def weight(s, g, token, column):
            if g == 0 or "weights" not in s:
                return None
            count = weights.shape[2]
            return read(s["weights"], (token * count + min(g, count) - 1) * block + column * CHANNELS, CHANNELS)

        def over_shares(token, quarter):
            at = token * row_of_token + column * CHANNELS
            shares = [read(kept, at, CHANNELS, at=quarter * THREADS * 4 + j * block) for j in range(tile.shares)]
            return tuple(sum(part[1:], start=part[0]) for part in zip(*shares))

        def by_channel(index, s, g, total, dD, dbias):
            """du, ddt, dz, dweights; the running dD and dbias. total: readouts so far, for dz."""
            new_total = []
            for number, first in enumerate(range(0, chunk, tile.tokens)):
                token = first_token + first
                time = (b * steps + index) * chunk + token
                at = (token * groups + g) * block + column * CHANNELS
                gate_at = token * block + column * CHANNELS
                g_B, q_A = over_shares(token, G_B), over_shares(token, Q_A)
                step, u, dy = read(dt_s, at, CHANNELS), read(s["u"], at, CHANNELS), read(dy_s, gate_at, CHANNELS)
                ddt = tuple(q * LN2 + u * gb for q, u, gb in zip(q_A, u, g_B))
                if softplus:
                    raw = tuple(d + o for d, o in zip(read(s["dt"], at, CHANNELS), bias[g]))
                    ddt = tuple(d * lanes.sigmoid(r) for d, r in zip(ddt, raw))
                valid = real_tokens(s, token, index)
                ddt = ddt if valid is None else tuple(jnp.where(valid, d, 0) for d in ddt)
                du = tuple(d * gb for d, gb in zip(step, g_B))
                if g == 0:
                    du = tuple(a + d * y for a, d, y in zip(du, D, dy))
                    dD = tuple(a + y * u for a, y, u in zip(dD, dy, u))
                dbias = tuple(a + d for a, d in zip(dbias, ddt))
                write(outputs["du"], (time * groups + g) * padded + channel, du)
                write(outputs["ddt"], (time * groups + g) * padded + channel, ddt)
                if not readout:
                    continue
                y = over_shares(token, READOUT)
                w = weight(s, g, token, column)
                if g > 0 and "dweights" in outputs:
                    at = (time * (groups - 1) + g - 1) * padded + channel
                    write(outputs["dweights"], at, tuple(a * b for a, b in zip(dy, y)))
                y = y if w is None else tuple(y * w for y, w in zip(y, w))
                first_term = tuple(d * u for d, u in zip(D, u)) if g == 0 else total[number]
                y = tuple(a + b for a, b in zip(first_term, y))
                new_total.append(y)
                if g == groups - 1 and "z" in s:
                    gate, dy = read(s["z"], gate_at, CHANNELS), read(s["dy"], gate_at, CHANNELS)
                    open_ = tuple(lanes.sigmoid(z) for z in gate)
                    dz = tuple(d * y * o * (1 + z * (1 - o)) for d, y, o, z in zip(dy, y, open_, gate))
                    write(outputs["dz"], time * padded + channel, dz)
            return new_total, dD, dbias

        def by_state(index, g):
            """dB, dC of the block's channels."""
            rows = tile.rows // parts
            for first in range(0, sums * parts, THREADS):
                number = jnp.minimum(first + thread(), sums * parts - 1)
                part, number = lax.div(number, sums), lax.rem(number, sums)
                share_of = lax.rem(number, tile.shares)
                which = lax.rem(lax.div(number, tile.shares), 2)
                token = lax.div(number, 2 * tile.shares)
                at = token * row_of_token + (DB + which) * (THREADS * 4) + share_of * block + part * rows * 4

                def add_row(i, total):
                    # each thread starts elsewhere, else all would read the same bank
                    turn = lax.rem(thread() + i, rows)
                    return tuple(a + v for a, v in zip(total, read(kept, at + turn * 4, 4)))

                total = lax.fori_loop(0, rows, add_row, zeros(4), unroll=4)
                time = ((b * blocks + e) * parts + part) * steps * chunk + index * chunk + token
                write(outputs["dBC"], ((time * groups + g) * 2 + which) * states + share_of * 4, total)

        def pipelined(indices, *refs):
            *refs, (adjoint, dD, dbias) = refs
            s, (i,) = dict(zip(given, refs)), indices
            index = steps - 1 - i
            start = [
                [
                    read(saved_g, start_of(index, g) + own, STATES, at=c * THREADS * STATES)
                    for c in range(CHANNELS)
                ]
                for g in range(groups)
            ]
            prepare(index, s)
            plgpu.commit_smem()
            adjoint, dbias, total = list(adjoint), list(dbias), None
            for g in range(groups):
                A = scaled_A(g)
                again(s, g, A, tuple(start[g]))
                adjoint[g] = back(s, g, A, adjoint[g])
                plgpu.commit_smem()
                total, dD, dbias[g] = by_channel(index, s, g, total, dD, dbias[g])
                by_state(index, g)
                plgpu.commit_smem()
            return tuple(adjoint), dD, tuple(dbias)

        def start_of(index, g):
            return (((b * steps + index) * blocks + e) * groups + g) * CHANNELS * THREADS * STATES

        def scaled_A(g):
            return tuple(tuple(a * LOG2E for a in row) for row in read_states(A_g, g))

        adjoint = tuple(
            (read_states(dfinal_g, b * groups + g), tuple(zeros(STATES) for _ in range(CHANNELS)))
            for g in range(groups)
        )
        carry = (adjoint, zeros(CHANNELS), tuple(zeros(CHANNELS) for _ in range(groups)))
        adjoint, dD, dbias = plgpu.emit_pipeline(
            pipelined,
            grid=(steps,),
            in_specs=[specs(b, e, chunk, block, lambda i: steps - 1 - i)[name](x) for name, x in given.items()],
            max_concurrent_steps=STAGES,
            init_carry=carry,
        )(*inputs.values())
        slot = b * tile.tokens + first_token
        write(outputs["dD"], slot * padded + channel, dD)
        for g in range(groups):
            dinitial, dA = adjoint[g]
            write_states(outputs["dinitial"], b * groups + g, dinitial)
            write_states(outputs["dA"], b * groups + g, dA)
            write(outputs["dbias"], (slot * groups + g) * padded + channel, dbias[g])

    kernel = plgpu.kernel(
        body,
        out_type=tuple(out.values()),
        scratch_types=[
            plgpu.SMEM((chunk, groups, block), f32),
            plgpu.SMEM((chunk, groups, block), f32),
            plgpu.SMEM((chunk, block), f32),
            plgpu.SMEM((chunk, row_of_token), f32),
        ],
        grid=(batch, blocks),
        grid_names=("b", "e"),
        compiler_params=lanes.compiler_params(),
        interpret=lanes.INTERPRET,
    )
    return dict(zip(out, kernel(*given.values(), A, D, dt_bias, saved, dfinal)))


def zeros(count):
    return tuple(plgpu.layout_cast(jnp.zeros((THREADS,), f32), lanes.LANES) for _ in range(count))


def thread():
    from kernels.selective_scan.mosaic_gpu.tile import thread_index

    return thread_index()


def add(total, term):
    return term if total is None else total + term
