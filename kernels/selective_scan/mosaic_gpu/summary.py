"""Effect of a stretch of time on the state and on the state's gradient, for scans with too few channels for the GPU.

Such a scan is split into stretches that run in parallel. A stretch maps the state before it to decay * state + end.
Here decay = exp(A sum_t dt_t), and end is the state after the stretch if it starts from zero. In the backward pass, the
gradient of the state after the stretch is mapped to the gradient of the state before it, by the same decay and another
end. This module computes both ends, by recurrences without readout:

    forwards   s = exp(dt_t A) s + dt_t u_t B_t
    backwards  s = exp(dt_t A) (s + dy_t C_t)
"""

import dataclasses
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
    workers, stage = lanes.warpgroups(WORKERS), staged(arrays)
    passes = THREADS * 4 // BLOCK  # tokens that the first warpgroup processes at once

    def body(*refs):
        b, g, e = (lax.axis_index(name) for name in "bge")
        sources, refs = refs[: len(stage.arrays)], refs[len(stage.arrays) :]
        A_g, bias_g, end_g, steps_g, *buffers, dt_s, x_s, ready, done = refs
        stage.bind(sources, buffers, b, e)
        block = Block(stage, length, softplus, reverse, b, g, e, dt_s, x_s, ready, done)

        @pl.when(lax.axis_index("role") == 0)
        def _():
            block.write_inputs(bias_g, steps_g, passes)

        @pl.when(lax.axis_index("role") > 0)
        def _():
            block.run_states(A_g, end_g, states // workers)

    kernel = lanes.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((batch, groups, padded, states), f32),
            jax.ShapeDtypeStruct((batch, passes, groups, padded), f32),
        ),
        scratch_types=[
            *stage.scratch(),
            plgpu.SMEM((SLOTS, stage.chunk, BLOCK), f32),
            plgpu.SMEM((SLOTS, stage.chunk, BLOCK), f32),
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


@dataclasses.dataclass(frozen=True)
class Block:
    """Inside the kernel: the block of channels `e` of the group `g` of the sequence `b`.

    The first warpgroup writes what goes into the states, chunk by chunk. The others run the states, each some of them.

    Attributes:
        length: T. reverse: whether time runs backwards.
        dt_s, x_s: [SLOTS, chunk, BLOCK] in shared memory: the steps, and what multiplies B or C.
        ready, done: barriers of the slots: that they are written, and that they are read.
    """

    stage: Stage
    length: int
    softplus: bool
    reverse: bool
    b: Any
    g: Any
    e: Any
    dt_s: Any
    x_s: Any
    ready: Any
    done: Any

    @property
    def steps(self) -> int:
        """Number of chunks."""
        return -(-self.length // self.stage.chunk)

    def chunk_of(self, index: Any) -> Any:
        """The chunk that is the `index`-th in the order of the recurrence."""
        return self.steps - 1 - index if self.reverse else index

    def write_inputs(self, bias_g: Any, steps_g: Any, passes: int) -> None:
        """Writes the steps and inputs of all tokens, and the sums of the steps."""
        stage, steps, b, g = self.stage, self.steps, self.b, self.g
        _, _, groups, padded = steps_g.shape
        offset = lax.rem(thread_index(), BLOCK // 4) * 4
        first_token = lax.div(thread_index(), BLOCK // 4)
        tokens = [first_token + first for first in range(0, stage.chunk, passes)]
        channel = self.e * BLOCK + offset
        bias = load_vector(bias_g, g * padded + channel, 4)
        for index in range(min(SLOTS, steps)):
            stage.start_copy(index, self.chunk_of(jnp.int32(index)), g)

        def start(index, totals):
            slot = lax.rem(index, SLOTS)
            before = lax.rem(index + SLOTS - 1, SLOTS)

            @pl.when((index > 0) & (index + SLOTS - 1 < steps))
            def _():
                plgpu.barrier_wait(self.done.at[before])
                stage.start_copy(before, self.chunk_of(index + SLOTS - 1), g)

            stage.wait(slot)
            chunk = self.chunk_of(index)
            for token, dt in prepare(stage, slot, chunk, tokens, offset, bias, self.softplus, self.length):
                at = token * BLOCK + offset
                store_vector(self.dt_s.at[slot], at, dt)
                store_vector(self.x_s.at[slot], at, self.written(slot, token, offset, dt))
                totals = tuple(total + d for total, d in zip(totals, dt))
            plgpu.barrier_arrive(self.ready.at[slot])
            return totals

        totals = lax.fori_loop(0, steps, start, lanes.zeros(4))
        for index in range(max(0, steps - SLOTS), steps):  # every arrival must be waited for
            plgpu.barrier_wait(self.done.at[index % SLOTS])
        store_vector(steps_g, ((b * passes + first_token) * groups + g) * padded + channel, totals)

    def written(self, slot: Any, token: Any, offset: Any, dt: tuple) -> tuple:
        """dt u, or dy times gate and weight, of four channels; the first group has no weight."""
        load = functools.partial(self.stage.load_vector, slot=slot, token=token, offset=offset, width=4)
        if not self.reverse:
            return tuple(d * u for d, u in zip(dt, load("u")))
        x = load("dy")
        if "z" in self.stage:
            x = tuple(x * z * lanes.sigmoid(z) for x, z in zip(x, load("z")))
        if "weights" in self.stage:
            x = tuple(x * jnp.where(self.g == 0, jnp.ones_like(w), w) for x, w in zip(x, load("weights")))
        return x

    def run_states(self, A_g: Any, end_g: Any, own: int) -> None:
        """Runs the recurrence of `own` states, and stores the last ones."""
        stage, (_, groups, padded, states) = self.stage, end_g.shape
        thread = thread_index()
        channel = self.e * BLOCK + thread
        first = (lax.axis_index("role") - 1) * own  # of the states
        quads = range(0, own, 4)
        place = (self.g * padded + channel) * states + first
        A = sum((load_vector(A_g, place, 4, at=n) for n in quads), start=())

        def operands(slot, t):
            (dt,), (x,) = (load_vector(ref.at[slot], t * BLOCK + thread, 1) for ref in (self.dt_s, self.x_s))
            B = sum((stage.load_vector("B", slot, t, thread * 0 + first + n, 4) for n in quads), start=())
            return dt, x, B, stage.reset(slot, t) if "marks" in stage else None

        def advance(h, dt, x, B, reset):
            decays = [jnp.exp2(dt * a) for a in A]
            if self.reverse:
                return kept([a * (s + x * b) for a, s, b in zip(decays, h, B)], reset)
            return tuple(a * s + x * b for a, s, b in zip(decays, kept(h, reset), B))

        def step(index, h):
            slot = lax.rem(index, SLOTS)
            plgpu.barrier_wait(self.ready.at[slot])
            stage.wait(slot)
            times = range(stage.chunk)[::-1] if self.reverse else range(stage.chunk)
            queue = [operands(slot, t) for t in times[:AHEAD]]
            for following in [*times[AHEAD:], *[None] * AHEAD]:
                if following is not None:
                    queue.append(operands(slot, following))
                h = advance(h, *queue.pop(0))
            plgpu.barrier_arrive(self.done.at[slot])
            return h

        h = lax.fori_loop(0, self.steps, step, lanes.zeros(own))
        for n in quads:
            store_vector(end_g, self.b * groups * padded * states + place, h[n : n + 4], at=n)


def staged(arrays: Mapping[str, Any]) -> Stage:
    """The inputs in the longest chunks that fit into shared memory."""
    stages = [Stage(arrays, chunk, BLOCK, groups=1, slots=SLOTS) for chunk in CHUNKS]
    return next((stage for stage in stages if summary_bytes(stage) <= SHARED), stages[-1])


def summary_bytes(stage: Stage) -> int:
    """Bytes of shared memory per block."""
    return stage.bytes() + 2 * SLOTS * stage.chunk * BLOCK * 4
