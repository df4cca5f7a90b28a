"""Forward pass of the selective scan on Hopper: one warpgroup walks a block of channels through time.

A chunk of tokens is copied to shared memory by the pipeline, and then
  1. each thread turns its part of dt and u into the step dt and dt u, in float32: softplus once a channel, not once a
     state;
  2. the recurrence runs token by token, 16 states a thread (and group) in registers, and leaves the partial readout of
     each share of a channel's states;
  3. partial readouts are added, skip and gate applied, y stored.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import lanes
from kernels.lanes import LOG2E, THREADS, read, write
from kernels.selective_scan.mosaic_gpu.tile import CHANNELS, STATES, Tile

f32 = jnp.float32
STAGES = 2  # chunks in shared memory, one of them on its way
UNROLL = 2  # tokens whose operands are loaded before the first is used


def forward(u, dt, A, B, C, D, z, dt_bias, weights, initial_state, reset, real, *, softplus, chunk, save):
    """y, the final state, and the states at the start of every `save` tokens.

    Args:
        u, dt: [b, T, G, E] with E * itemsize a multiple of 16. z: [b, T, E] or None.
        A: [G, E', N] float32, N one of tile.SIZES, E' = E padded to whole blocks. D: [E'], dt_bias: [G, E'] float32.
        B, C: [b, T, G, N] float32. weights: [b, T, G - 1 or 1, E] or None.
        initial_state: [b, G, E', N] float32.
        reset: [b, T'] float32, RESET where a document begins, else 0; real: [b, T'] float32, 0 on padding, else 1; T'
            is T padded to whole chunks. Or None.
        softplus: dt + dt_bias goes through softplus.
        chunk: tokens a step, a multiple of save; save: 0 saves no states.

    Returns:
        y [b, T', E'] in u's dtype, final state [b, G, E', N] float32, states [b, T' / save, E' / block, G, 2048]
        float32 in the threads' order (or None).
    """
    batch, length, groups, width = u.shape
    padded, tile = A.shape[1], Tile(A.shape[-1])
    states, block = tile.states, tile.channels
    blocks, steps = padded // block, -(-length // chunk)
    ragged = length % chunk != 0
    given = dict(u=u, dt=dt, B=B, C=C, z=z, weights=weights, reset=reset, real=real)
    given = {name: x for name, x in given.items() if x is not None}

    def body(*refs):
        inputs = dict(zip(given, refs))
        A_g, D_g, bias_g, initial_g, y_g, final_g, *saved_g, dt_s, x_s, y_s = refs[len(given) :]
        b, e = lax.axis_index("b"), lax.axis_index("e")
        row, share, place = tile.owner()
        column, first_token = tile.items()
        channel = e * block + column * CHANNELS
        D = read(D_g, channel, CHANNELS)
        bias = [read(bias_g, g * padded + channel, CHANNELS) for g in range(groups)]
        matrix = e * block * states + row * CHANNELS * states + share * STATES

        def read_states(ref, start):
            return tuple(
                read(ref, start + g * padded * states + matrix, STATES, at=c * states)
                for g in range(groups)
                for c in range(CHANNELS)
            )

        A = tuple(tuple(a * LOG2E for a in row) for row in read_states(A_g, 0))

        def prepare(index, s):
            """dt and dt u of the chunk, float32."""
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

        def real_tokens(s, token, index):
            """[128] bool or None: tokens that are neither padding nor past the end."""
            valid = token + index * chunk < length if ragged else None
            if "real" in s:
                mark = read(s["real"], token, 1)[0] > 0
                valid = mark if valid is None else mark & valid
            return valid

        def operands(s, t):
            """What one token needs, loaded."""
            return [
                dict(
                    dt=read(dt_s, (t * groups + g) * block + row * CHANNELS, CHANNELS),
                    x=read(x_s, (t * groups + g) * block + row * CHANNELS, CHANNELS),
                    B=read(s["B"], (t * groups + g) * states + share * STATES, STATES),
                    C=read(s["C"], (t * groups + g) * states + share * STATES, STATES),
                    w=weight(s, t, g),
                    reset=s["reset"][0, t] if "reset" in s else None,
                )
                for g in range(groups)
            ]

        def weight(s, t, g):
            if g == 0 or "weights" not in s:
                return None
            count = weights.shape[2]
            at = (t * count + min(g, count) - 1) * block + row * CHANNELS
            return read(s["weights"], at, CHANNELS)

        def token(h, loaded):
            """s = exp(dt A) s + dt u B; the thread's share of s C."""
            new, y = [], [None] * CHANNELS
            for g, o in enumerate(loaded):
                for c in range(CHANNELS):
                    readout = None
                    for n in range(STATES):
                        exponent = o["dt"][c] * A[g * CHANNELS + c][n]
                        if o["reset"] is not None:
                            exponent = exponent + o["reset"]
                        s = jnp.exp2(exponent) * h[(g * CHANNELS + c) * STATES + n] + o["x"][c] * o["B"][n]
                        new.append(s)
                        readout = s * o["C"][n] if readout is None else readout + s * o["C"][n]
                    readout = readout if o["w"] is None else readout * o["w"][c]
                    y[c] = readout if y[c] is None else y[c] + readout
            return tuple(new), tuple(y)

        def recur(s, h, start, count):
            def several(i, h):
                t = start + i * UNROLL
                loaded = [operands(s, t + k) for k in range(UNROLL)]
                ys = []
                for o in loaded:
                    h, y = token(h, o)
                    ys.append(y)
                for k, y in enumerate(ys):
                    write(y_s, (t + k) * THREADS * CHANNELS + place * CHANNELS, y)
                return h

            return lax.fori_loop(0, count // UNROLL, several, h)

        def finish(index, s):
            """y = (sum of the partial readouts + D u) silu(z)."""
            for first in range(0, chunk, tile.tokens):
                token = first_token + first
                parts = [
                    read(y_s, token * THREADS * CHANNELS + column * CHANNELS, CHANNELS, at=j * block)
                    for j in range(tile.shares)
                ]
                y = tuple(sum(part[1:], start=part[0]) for part in zip(*parts))
                u = read(s["u"], token * groups * block + column * CHANNELS, CHANNELS)
                y = tuple(y + d * u for y, d, u in zip(y, D, u))
                if "z" in s:
                    gate = read(s["z"], token * block + column * CHANNELS, CHANNELS)
                    y = tuple(y * z * lanes.sigmoid(z) for y, z in zip(y, gate))
                write(y_g, ((b * steps + index) * chunk + token) * padded + channel, y)

        def keep(h, number):
            """Write the states at the start of a stretch of `save` tokens."""
            for part in range(groups * CHANNELS):
                start = (((b * steps * (chunk // save) + number) * blocks + e) * groups * CHANNELS + part) * THREADS
                write(saved_g[0], start * STATES + place * STATES, h[part * STATES : (part + 1) * STATES])

        def pipelined(indices, *refs):
            *refs, h = refs
            s, (index,) = dict(zip(given, refs)), indices
            prepare(index, s)
            plgpu.commit_smem()
            for start in range(0, chunk, save or chunk):
                if save:
                    keep(h, index * (chunk // save) + start // save)
                h = recur(s, h, start, save or chunk)
            plgpu.commit_smem()
            finish(index, s)
            plgpu.commit_smem()  # before the pipeline fills these buffers again
            return h

        h = sum(read_states(initial_g, b * groups * padded * states), start=())
        h = plgpu.emit_pipeline(
            pipelined,
            grid=(steps,),
            in_specs=[specs(b, e, chunk, block)[name](x) for name, x in given.items()],
            max_concurrent_steps=STAGES,
            init_carry=h,
        )(*inputs.values())
        for g in range(groups):
            for c in range(CHANNELS):
                at = (b * groups + g) * padded * states + matrix
                start = (g * CHANNELS + c) * STATES
                write(final_g, at, h[start : start + STATES], at=c * states)

    sds = jax.ShapeDtypeStruct
    out = [sds((batch, steps * chunk, padded), u.dtype), sds((batch, groups, padded, states), f32)]
    if save:
        count = steps * chunk // save
        out.append(sds((batch, count, blocks, groups, CHANNELS * THREADS * STATES), f32))
    kernel = plgpu.kernel(
        body,
        out_type=tuple(out),
        scratch_types=[
            plgpu.SMEM((chunk, groups, block), f32),
            plgpu.SMEM((chunk, groups, block), f32),
            plgpu.SMEM((chunk, THREADS * CHANNELS), f32),
        ],
        grid=(batch, blocks),
        grid_names=("b", "e"),
        compiler_params=lanes.compiler_params(),
        interpret=lanes.INTERPRET,
    )
    y, final, *saved = kernel(*given.values(), A, D, dt_bias, initial_state)
    return y, final, saved[0] if save else None


def specs(b, e, chunk, block, place=lambda i: i):
    """How the pipeline cuts each array: a chunk of tokens (number `place(i)` at step i), a block of channels."""
    channels = lambda x: plgpu.BlockSpec((1, chunk, x.shape[2], block), lambda i: (b, place(i), 0, e))
    gate = lambda x: plgpu.BlockSpec((1, chunk, block), lambda i: (b, place(i), e))
    matrix = lambda x: plgpu.BlockSpec((1, chunk, *x.shape[2:]), lambda i: (b, place(i), 0, 0))
    mark = lambda x: plgpu.BlockSpec((1, chunk), lambda i: (b, place(i)))
    return dict(u=channels, dt=channels, weights=channels, z=gate, dy=gate, B=matrix, C=matrix, reset=mark, real=mark)
