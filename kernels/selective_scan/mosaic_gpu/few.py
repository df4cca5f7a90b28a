"""The selective scan of a few tokens on Hopper, as in decoding: the state is read once and written once, in place.

A thread processes 4 neighbouring states of a channel in every group. It loads them, goes through the tokens with them
in registers, and stores them in place. Threads share only the sum over a channel's states, by exchanges within a warp.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from seqmodels.kernels import lanes
from seqmodels.kernels.lanes import LOG2E, THREADS, load_vector, store_vector, thread_index
from seqmodels.kernels.selective_scan.mosaic_gpu.stage import MARKS, kept
from seqmodels.kernels.selective_scan.mosaic_gpu.tile import STATES
from seqmodels.kernels.tuning import UNROLLED


def supports(shape: tuple[int, ...]) -> str | None:
    """Why the kernel cannot serve a shape [B, T, G, E, N]; None: it can."""
    batch, length, groups, width, states = shape
    if length > UNROLLED:
        return f"T is {length}; it writes out at most {UNROLLED} tokens"
    if states not in [STATES << i for i in range(5)]:
        return f"N is {states}; it takes 4, 8, 16, 32 or 64"
    if batch * width * states % (THREADS * STATES):
        return f"{batch} x {width} x {states} states are not a multiple of {THREADS * STATES}"
    if batch * groups * width * states >= 2**31:
        return f"there are {batch * groups * width * states} states; it addresses 2^31 - 1"
    return None


@functools.partial(jax.jit, static_argnames="softplus")  # traced once per shape, not per layer
def few(
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None,
    z: jax.Array | None,
    dt_bias: jax.Array | None,
    weights: jax.Array | None,
    initial_state: jax.Array,
    marks: jax.Array | None,
    *,
    softplus: bool,
) -> tuple[jax.Array, jax.Array]:
    """y [b, T, E] in u's dtype and the final state, which reuses the memory of initial_state if that is donated.

    Args:
        u, dt: [b, T, G, E]. A: [G, E, N] float32. B, C: [b, T, G, N]. D: [E], z: [b, T, E], dt_bias: [G, E] or None.
        weights: [b, T, G - 1 or 1, E] or None. initial_state: [b, G, E, N] float32.
        marks: result of `stage.marks`, or None.
        softplus: dt + dt_bias goes through softplus.
    """
    batch, length, groups, width = u.shape
    states = A.shape[-1]
    shares = states // STATES
    arrays: dict[str, Any] = dict(u=u, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, weights=weights, marks=marks)
    arrays = {name: x for name, x in arrays.items() if x is not None}

    def body(*refs):
        *sources, state_g, y_g = refs
        sources = dict(zip(arrays, sources, strict=True))
        vector = lax.axis_index("block") * THREADS + thread_index()
        share, channel = lax.rem(vector, shares), lax.rem(lax.div(vector, shares), width)
        row = lax.div(vector, shares * width)

        def of_channel(name, t, g, groups):
            (x,) = load_vector(sources[name], row * (length * groups * width) + channel, 1, at=(t * groups + g) * width)
            return x

        def of_states(name, t, g):
            start = row * (length * groups * states) + share * STATES
            return load_vector(sources[name], start, STATES, at=(t * groups + g) * states)

        def mark(t, column):
            return load_vector(sources["marks"], row * (length * MARKS), 1, at=t * MARKS + column)[0]

        def step(t, g):
            """dt, zero on padding."""
            dt = of_channel("dt", t, g, groups)
            if "dt_bias" in sources:
                dt = dt + load_vector(sources["dt_bias"], channel, 1, at=g * width)[0]
            dt = lanes.softplus(dt) if softplus else dt
            return jnp.where(mark(t, 1) > 0, dt, 0) if "marks" in sources else dt

        def advance(t, g, state):
            """The state after token t, and the contribution of the thread's states to its readout."""
            dt, u = step(t, g), of_channel("u", t, g, groups)
            exponents = [(dt * LOG2E) * a for a in A[g]]
            state = kept(state, mark(t, 0) if "marks" in sources else None)
            x, B, C = dt * u, of_states("B", t, g), of_states("C", t, g)
            state = tuple(jnp.exp2(k) * s + x * b for k, s, b in zip(exponents, state, B))
            readout = sum(s * c for s, c in zip(state, C))
            if g > 0 and "weights" in sources:
                readout = readout * of_channel("weights", t, min(g, count) - 1, count)
            return state, readout

        def finish(t, y):
            """(y + D u) silu(z)."""
            for bit in range(shares.bit_length() - 1):
                y = y + lanes.exchange(y, 1 << bit)
            if "D" in sources:
                y = y + load_vector(sources["D"], channel, 1)[0] * of_channel("u", t, 0, groups)
            if "z" in sources:
                z = of_channel("z", t, 0, 1)
                y = y * z * lanes.sigmoid(z)
            return y

        count = arrays["weights"].shape[2] if "weights" in arrays else 0
        own = channel * states + share * STATES
        A = [load_vector(sources["A"], own, STATES, at=g * width * states) for g in range(groups)]
        start, matrix = row * (groups * width * states) + own, width * states
        state, ys = [load_vector(state_g, start, STATES, at=g * matrix) for g in range(groups)], []
        for t in range(length):
            state, readouts = zip(*(advance(t, g, of_group) for g, of_group in enumerate(state)))
            ys.append(finish(t, sum(readouts)))
        for t, y in enumerate(ys):  # all loads come before the first store, since loads do not overtake stores
            store_vector(y_g, row * (length * width) + channel, (y,), at=t * width)  # all shares store the same
        for g, of_group in enumerate(state):
            store_vector(state_g, start, of_group, at=g * matrix)

    out = jax.ShapeDtypeStruct((batch, length, width), u.dtype)
    kernel = lanes.kernel(
        body,
        out_type=out,
        grid=(batch * width * shares // THREADS,),
        grid_names=("block",),
        num_threads=1,
        thread_name="role",
    )
    return lanes.in_place(kernel, arrays.values(), initial_state, out)
