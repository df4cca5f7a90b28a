"""A few tokens of the selective scan on Hopper, as in decoding: the state is read once and written once, in place.

A thread has 4 neighbouring states of a channel, of every group and of `rows` sequences. It loads them, walks through
the tokens with them in registers, and stores them where they were. Nothing is shared among threads but the sum over a
channel's states, by exchanges within a warp.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels import lanes
from kernels.lanes import LOG2E, THREADS, read, write
from kernels.selective_scan.mosaic_gpu.tile import STATES, thread_index
from kernels.selective_scan.xla import FEW

ROWS = (4, 2, 1)  # sequences a thread, at most: their states are loaded together, and A once for all
ENOUGH = 8  # blocks for each multiprocessor, before a thread takes more than one sequence


def supports(shape) -> str | None:
    """Why the kernel cannot serve a shape [B, T, G, E, N]; None: it can."""
    batch, length, _, width, states = shape
    if length > FEW:
        return f"T is {length}; it writes out at most {FEW} tokens"
    if states not in [STATES << i for i in range(5)]:
        return f"N is {states}; it takes 4, 8, 16, 32 or 64"
    if batch * width * states % (THREADS * STATES):
        return f"{batch} x {width} x {states} states are not a multiple of {THREADS * STATES}"
    return None


def rows_of(batch, width, states, processors) -> int:
    """Sequences that a thread takes."""
    for rows in ROWS:
        blocks = batch * width * states // (rows * THREADS * STATES)
        whole = batch % rows == 0 and width * states * (batch // rows) % (THREADS * STATES) == 0
        if whole and (blocks >= ENOUGH * processors or rows == 1):
            return rows
    raise AssertionError("1 row is always whole")


@functools.partial(jax.jit, static_argnames=("softplus", "rows"))  # traced once a shape, not once a layer
def few(u, dt, A, B, C, D, z, dt_bias, weights, initial_state, marks, *, softplus, rows):
    """y [b, T, E] in u's dtype and the final state, which takes the place of initial_state where that is donated.

    Args:
        u, dt: [b, T, G, E]. A: [G, E, N] float32. B, C: [b, T, G, N]. D: [E], z: [b, T, E], dt_bias: [G, E] or None.
        weights: [b, T, G - 1 or 1, E] or None. initial_state: [b, G, E, N] float32. marks: of `stage.marks` or None.
        softplus: dt + dt_bias goes through softplus. rows: a divisor of b.
    """
    batch, length, groups, width = u.shape
    states = A.shape[-1]
    shares = states // STATES
    arrays = dict(u=u, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, weights=weights, marks=marks)
    arrays = {name: x for name, x in arrays.items() if x is not None}

    def body(*refs):
        *sources, state_g, y_g = refs
        sources = dict(zip(arrays, sources, strict=True))
        vector = lax.axis_index("block") * THREADS + thread_index()
        share, channel = lax.rem(vector, shares), lax.rem(lax.div(vector, shares), width)
        first_row = lax.div(vector, shares * width) * rows

        def of_channel(name, row, t, g, groups):
            (x,) = read(sources[name], (row * length + t) * groups * width + channel, 1, at=g * width)
            return x

        def of_states(name, row, t, g):
            return read(sources[name], ((row * length + t) * groups + g) * states + share * STATES, STATES)

        def place(row, g):
            return ((row * groups + g) * width + channel) * states + share * STATES

        def mark(row, t, column):
            return read(sources["marks"], (row * length + t) * arrays["marks"].shape[-1], 1, at=column)[0]

        def step(row, t, g):
            """dt, zero on padding."""
            dt = of_channel("dt", row, t, g, groups)
            if "dt_bias" in sources:
                dt = dt + read(sources["dt_bias"], channel, 1, at=g * width)[0]
            dt = lanes.softplus(dt) if softplus else dt
            return jnp.where(mark(row, t, 1) > 0, dt, 0) if "marks" in sources else dt

        def advance(row, t, g, state):
            """The state after token t, and the part of its readout that the thread's states make."""
            dt, u = step(row, t, g), of_channel("u", row, t, g, groups)
            exponents = [(dt * LOG2E) * a for a in A[g]]
            if "marks" in sources:
                exponents = [k + mark(row, t, 0) for k in exponents]
            x, B, C = dt * u, of_states("B", row, t, g), of_states("C", row, t, g)
            state = tuple(jnp.exp2(k) * s + x * b for k, s, b in zip(exponents, state, B))
            readout = sum(s * c for s, c in zip(state, C))
            if g > 0 and "weights" in sources:
                readout = readout * of_channel("weights", row, t, min(g, count) - 1, count)
            return state, readout

        def finish(row, t, y):
            """(y + D u) silu(z)."""
            for bit in range(shares.bit_length() - 1):
                y = y + lanes.exchange(y, 1 << bit)
            if "D" in sources:
                y = y + read(sources["D"], channel, 1)[0] * of_channel("u", row, t, 0, groups)
            if "z" in sources:
                z = of_channel("z", row, t, 0, 1)
                y = y * z * lanes.sigmoid(z)
            write(y_g, (row * length + t) * width + channel, (y,))  # the same by all shares

        count = arrays["weights"].shape[2] if "weights" in arrays else 0
        own = channel * states + share * STATES
        A = [read(sources["A"], own, STATES, at=g * width * states) for g in range(groups)]
        numbers = [first_row + i for i in range(rows)]
        loaded = [[read(state_g, place(row, g), STATES) for g in range(groups)] for row in numbers]
        for row, of_row in zip(numbers, loaded):
            for t in range(length):
                of_row, readouts = zip(*(advance(row, t, g, state) for g, state in enumerate(of_row)))
                finish(row, t, sum(readouts))
            for g, state in enumerate(of_row):
                write(state_g, place(row, g), state)

    state = jax.new_ref(initial_state)  # which the kernel's output takes the place of
    y = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch, length, width), u.dtype),
        grid=(batch * width * shares // (rows * THREADS),),
        grid_names=("block",),
        num_threads=1,
        thread_name="role",
        compiler_params=lanes.compiler_params(),
        interpret=lanes.INTERPRET,
    )(*arrays.values(), state)
    return y, state[...]
