"""Effect of a stretch of time on the state and on the state's gradient, for scans with too few channels for the GPU.

Such a scan is split into stretches that run in parallel. A stretch maps the state before it to decay * state + end.
Here decay = exp(A sum_t dt_t), and end is the state after the stretch if it starts from zero. In the backward pass, the
gradient of the state after the stretch is mapped to the gradient of the state before it, by the same decay and another
end. This module computes both ends, by recurrences without readout:

    forwards   s = exp(dt_t A) s + dt_t u_t B_t
    backwards  s = exp(dt_t A) (s + dy_t C_t)
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from seqmodels.kernels import lanes
from seqmodels.kernels.lanes import LOG2E, THREADS, load_vector, store_vector, thread_index
from seqmodels.kernels.selective_scan.mosaic_gpu.stage import SHARED, Stage, kept, prepare

f32 = jnp.float32
BLOCK = 128  # channels
CHUNKS = (16, 8, 4)  # tokens, as many as fit into shared memory
SLOTS = 3  # chunks in shared memory
AHEAD = 4  # how many tokens ahead operands are loaded
WORKERS = 2  # warpgroups that share the states of a channel


@functools.partial(jax.jit, static_argnames="softplus")
def end_of_state(
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    dt_bias: jax.Array,
    marks: jax.Array | None,
    *,
    softplus: bool,
) -> tuple[jax.Array, jax.Array]:
    """The state after each sequence if it starts from zero, and the sum of its steps.

    Args: as for `forward.forward`.

    Returns:
        [b, G, E', N] and [b, G, E'], float32.
    """
    return _summary(dict(u=u, dt=dt, B=B, marks=marks), A, dt_bias, softplus, reverse=False)


@functools.partial(jax.jit, static_argnames="softplus")
def end_of_gradient(
    dt: jax.Array,
    A: jax.Array,
    C: jax.Array,
    z: jax.Array | None,
    dt_bias: jax.Array,
    weights: jax.Array | None,
    marks: jax.Array | None,
    dy: jax.Array,
    *,
    softplus: bool,
) -> tuple[jax.Array, jax.Array]:
    """The gradient of the state before each sequence through the sequence's outputs only, and the sum of its steps.

    Args: as for `backward.backward`.

    Returns:
        [b, G, E', N] and [b, G, E'], float32.
    """
    arrays = dict(dt=dt, B=C, dy=dy, z=z, weights=weights, marks=marks)
    return _summary(arrays, A, dt_bias, softplus, reverse=True)


def _summary(arrays, A, dt_bias, softplus, reverse):
    batch, length, groups, _ = arrays["dt"].shape
    _, padded, states = A.shape
    workers = lanes.warpgroups(WORKERS)
    stage, own = staged(arrays), states // workers
    chunk, steps = stage.chunk, -(-length // stage.chunk)
    passes = THREADS * 4 // BLOCK  # tokens that the first warpgroup processes at once

    def body(*refs):
        b, g, e = (lax.axis_index(name) for name in "bge")
        sources, refs = refs[: len(stage.arrays)], refs[len(stage.arrays) :]
        A_g, bias_g, end_g, steps_g, *buffers, dt_s, x_s, ready, done = refs
        stage.bind(sources, buffers, b, e)

        def chunk_of(index):
            return steps - 1 - index if reverse else index

        @pl.when(lax.axis_index("role") == 0)
        def _():
            offset = lax.rem(thread_index(), BLOCK // 4) * 4
            first_token = lax.div(thread_index(), BLOCK // 4)
            tokens = [first_token + first for first in range(0, chunk, passes)]
            channel = e * BLOCK + offset
            bias = load_vector(bias_g, g * padded + channel, 4)

            def written(slot, token, dt):
                """dt u, or dy times gate and weight; the first group has no weight."""
                if not reverse:
                    return tuple(d * u for d, u in zip(dt, stage.load_vector("u", slot, token, offset, 4)))
                x = stage.load_vector("dy", slot, token, offset, 4)
                if "z" in stage:
                    x = tuple(
                        x * z * lanes.sigmoid(z) for x, z in zip(x, stage.load_vector("z", slot, token, offset, 4))
                    )
                if "weights" in stage:
                    weights = stage.load_vector("weights", slot, token, offset, 4)
                    x = tuple(x * jnp.where(g == 0, jnp.ones_like(w), w) for x, w in zip(x, weights))
                return x

            for index in range(min(SLOTS, steps)):
                stage.start_copy(index, chunk_of(jnp.int32(index)), g)

            def start(index, totals):
                slot = lax.rem(index, SLOTS)
                before = lax.rem(index + SLOTS - 1, SLOTS)

                @pl.when((index > 0) & (index + SLOTS - 1 < steps))
                def _():
                    plgpu.barrier_wait(done.at[before])
                    stage.start_copy(before, chunk_of(index + SLOTS - 1), g)

                stage.wait(slot)
                for token, dt in prepare(stage, slot, chunk_of(index), tokens, offset, bias, softplus, length):
                    at = token * BLOCK + offset
                    store_vector(dt_s.at[slot], at, dt)
                    store_vector(x_s.at[slot], at, written(slot, token, dt))
                    totals = tuple(total + d for total, d in zip(totals, dt))
                plgpu.barrier_arrive(ready.at[slot])
                return totals

            totals = lax.fori_loop(0, steps, start, lanes.zeros(4))
            for index in range(max(0, steps - SLOTS), steps):  # every arrival must be waited for
                plgpu.barrier_wait(done.at[index % SLOTS])
            store_vector(steps_g, ((b * passes + first_token) * groups + g) * padded + channel, totals)

        @pl.when(lax.axis_index("role") > 0)
        def _():
            thread = thread_index()
            channel = e * BLOCK + thread
            first = (lax.axis_index("role") - 1) * own  # of the states
            quads = range(0, own, 4)

            place = (g * padded + channel) * states + first
            A = sum((load_vector(A_g, place, 4, at=n) for n in quads), start=())

            def operands(slot, t):
                (dt,), (x,) = (load_vector(ref.at[slot], t * BLOCK + thread, 1) for ref in (dt_s, x_s))
                B = sum((stage.load_vector("B", slot, t, thread * 0 + first + n, 4) for n in quads), start=())
                return dt, x, B, stage.reset(slot, t) if "marks" in stage else None

            def advance(h, dt, x, B, reset):
                decays = [jnp.exp2(dt * a) for a in A]
                if reverse:
                    return kept([a * (s + x * b) for a, s, b in zip(decays, h, B)], reset)
                return tuple(a * s + x * b for a, s, b in zip(decays, kept(h, reset), B))

            def step(index, h):
                slot = lax.rem(index, SLOTS)
                plgpu.barrier_wait(ready.at[slot])
                stage.wait(slot)

                times = range(chunk)[::-1] if reverse else range(chunk)
                queue = [operands(slot, t) for t in times[:AHEAD]]
                for following in [*times[AHEAD:], *[None] * AHEAD]:
                    if following is not None:
                        queue.append(operands(slot, following))
                    h = advance(h, *queue.pop(0))
                plgpu.barrier_arrive(done.at[slot])
                return h

            h = lax.fori_loop(0, steps, step, lanes.zeros(own))
            for n in quads:
                store_vector(end_g, b * groups * padded * states + place, h[n : n + 4], at=n)

    kernel = lanes.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((batch, groups, padded, states), f32),
            jax.ShapeDtypeStruct((batch, passes, groups, padded), f32),
        ),
        scratch_types=[
            *stage.scratch(),
            plgpu.SMEM((SLOTS, chunk, BLOCK), f32),
            plgpu.SMEM((SLOTS, chunk, BLOCK), f32),
            plgpu.Barrier(num_barriers=SLOTS),
            plgpu.Barrier(num_barriers=SLOTS, num_arrivals=workers),
        ],
        grid=(batch, groups, padded // BLOCK),
        grid_names=("b", "g", "e"),
        num_threads=1 + workers,
        thread_name="role",
    )
    end, total = kernel(*stage.arrays.values(), A * LOG2E, dt_bias)
    return end, jnp.sum(total, axis=1)


def staged(arrays: Mapping[str, Any]) -> Stage:
    """The inputs in the longest chunks that fit into shared memory."""
    stages = [Stage(arrays, chunk, BLOCK, groups=1, slots=SLOTS) for chunk in CHUNKS]
    return next((stage for stage in stages if summary_bytes(stage) <= SHARED), stages[-1])


def summary_bytes(stage: Stage) -> int:
    """Bytes of shared memory per block."""
    return stage.bytes() + 2 * SLOTS * stage.chunk * BLOCK * 4
