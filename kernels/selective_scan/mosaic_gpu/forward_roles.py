"""What each warpgroup of the selective scan's forward pass does. `forward` describes how they cooperate."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from seqmodels.kernels import lanes
from seqmodels.kernels.interpreter import gpu_interpreter
from seqmodels.kernels.lanes import THREADS, Lanes, load_vector, store_vector, thread_index
from seqmodels.kernels.selective_scan.mosaic_gpu.forward_plan import TOKENS, Plan
from seqmodels.kernels.selective_scan.mosaic_gpu.stage import Stage, kept, prepare
from seqmodels.kernels.selective_scan.mosaic_gpu.tile import STATES

# Registers per thread of a worker and of another warpgroup, by the number of workers. The totals equal the registers at
# the start: 96 per thread with 5 warpgroups, 80 with 6
WORKER, AIDE = {3: 112, 4: 88}, {3: 72, 4: 64}


@dataclasses.dataclass(frozen=True)
class Scan:
    """Inside the kernel: the plan, the references, and this block's indices.

    Attributes:
        b, e: the block's sequence and its index along the channels.
        A, D, bias, initial, y, final, saved: in global memory; saved is None if no states are saved.
        dt_s, x_s, y_s: dt, dt u and parts of s C in shared memory, [slots, rows, chunk / 4, block, 4].
        ready, done: barriers that signal that dt_s and x_s are filled, and that y_s is filled.
        column, offset: [128] int32, a thread's index along the channels, and its first channel in the block.
        first_token, tokens: [128] int32 and 4 such arrays, a thread's tokens in a chunk.
    """

    plan: Plan
    stage: Stage
    b: Array
    e: Array
    A: Any
    D: Any
    bias: Any
    initial: Any
    y: Any
    final: Any
    saved: Any
    dt_s: Any
    x_s: Any
    y_s: Any
    ready: Any
    done: Any
    column: Array
    first_token: Array
    offset: Array
    tokens: Sequence[Array]

    def place(self, row: Array | int, first: Array | int, position: Array) -> Array:
        """Offset of 4 tokens of a channel in row `row` of [rows, chunk / 4, block, 4]."""
        return (row * self.plan.chunk + first) * self.plan.block + position * TOKENS

    def budget(self, registers: dict[int, int]) -> None:
        """Request registers for each thread. `registers` maps the number of workers to registers per thread."""
        workers = self.plan.workers
        if not gpu_interpreter() and workers in registers:
            most = 65536 // (THREADS * (2 + workers)) // 8 * 8  # per thread at the start
            action: Literal["increase", "decrease"] = "increase" if registers[workers] > most else "decrease"
            plgpu.set_max_registers(registers[workers], action=action)


def bind(plan: Plan, stage: Stage, refs: Sequence[Any]) -> Scan:
    """The references in the order of the kernel's arguments, outputs and scratch, by name."""
    b, e = lax.axis_index("b"), lax.axis_index("e")
    count, outputs = len(stage.arrays), 6 + bool(plan.save)
    sources, refs = refs[:count], refs[count:]
    (A, D, bias, initial, y, final, *states), refs = refs[:outputs], refs[outputs:]
    *buffers, dt_s, x_s, y_s, ready, done = refs
    stage.bind(sources, buffers, b, e)
    column = lax.rem(thread_index(), plan.columns)
    first_token = lax.div(thread_index(), plan.columns) * TOKENS
    offset, tokens = column * plan.wide, [first_token + i for i in range(TOKENS)]
    saved = states[0] if states else None
    outside: Any = (A, D, bias, initial, y, final, saved)
    shared: Any = (dt_s, x_s, y_s, ready, done)
    threads: Any = (column, first_token, offset, tokens)
    return Scan(plan, stage, b, e, *outside, *shared, *threads)


def prepare_steps(scan: Scan) -> None:
    """The first warpgroup: computes dt and dt u of each chunk in float32."""
    plan, stage = scan.plan, scan.stage
    scan.budget(AIDE)
    bias = [
        load_vector(scan.bias, g * plan.padded + scan.e * plan.block + scan.offset, plan.wide)
        for g in range(plan.groups)
    ]
    for index in range(min(plan.slots, plan.steps)):
        stage.start_copy(index, jnp.int32(index))

    def prepare_chunk(index, _):
        slot = lax.rem(index, plan.slots)
        stage.wait(slot)
        for g in range(plan.groups):
            us = zip(*(stage.load_vector("u", slot, token, scan.offset, plan.wide, g) for token in scan.tokens))
            dts = prepare(stage, slot, index, scan.tokens, scan.offset, bias[g], plan.softplus, plan.length, g)
            for c, (u, dt) in enumerate(zip(us, zip(*(dt for _, dt in dts)))):  # 4 tokens of one channel
                at = scan.place(g, scan.first_token, c * plan.columns + scan.column)
                store_vector(scan.dt_s.at[slot], at, dt)
                store_vector(scan.x_s.at[slot], at, tuple(d * u for d, u in zip(dt, u)))
        plgpu.barrier_arrive(scan.ready.at[slot])

    lax.fori_loop(0, plan.steps, prepare_chunk, None)


def recur(scan: Scan) -> None:
    """A warpgroup that goes through time with the states of its channels and groups in registers."""
    plan = scan.plan
    scan.budget(WORKER)
    recurrence = Recurrence(scan)

    def step(index, carry):
        carry = recurrence.walk_chunk(index, carry if plan.bridged else (*carry, *recurrence.first_operands(index)))
        plgpu.barrier_arrive(scan.done.at[lax.rem(index, plan.slots)])
        return carry if plan.bridged else carry[:1]

    numbers = [scan.b * plan.groups + recurrence.first_group + g for g in range(plan.of_worker)]
    h = tuple(recurrence.load_states(scan.initial, number) for number in numbers)
    carry = (h, *recurrence.first_operands(jnp.int32(0))) if plan.bridged else (h,)
    h, *_ = lax.fori_loop(0, plan.steps, step, carry)
    for number, of_group in zip(numbers, h):
        recurrence.store_states(scan.final, number, of_group)


class Recurrence:
    """A thread that runs the recurrence: its channel and states, and its work at each token.

    Attributes:
        channel: [128] int32, index among all channels. position: of the channel in a row of shared memory.
        share: [128] int32, index among the threads that share the channel's states. first: its first state.
        first_group: its first group.
        A: for each of its groups, A of its states times log2(e).
    """

    def __init__(self, scan: Scan) -> None:
        plan = scan.plan
        self.scan, self.plan = scan, plan
        worker = lax.axis_index("role") - 1
        self.position, self.share = lax.rem(thread_index(), plan.block), lax.div(thread_index(), plan.block)
        first_of_column = scan.e * plan.block + lax.rem(self.position, plan.columns) * plan.wide
        self.channel = first_of_column + lax.div(self.position, plan.columns)
        self.first_group: Array | int
        if plan.groups == 1:
            self.first_group, self.share = 0, self.share + worker * (plan.shares // plan.workers)
        else:
            self.first_group = worker * plan.of_worker
        self.first = self.share * plan.own
        self.A = [self.load_states(scan.A, self.first_group + g) for g in range(plan.of_worker)]

    def load_states(self, ref: Any, number: Array | int) -> Lanes:
        """The thread's states of its channel in matrix `number` of [..., E', N]."""
        start = (number * self.plan.padded + self.channel) * self.plan.states + self.first
        vectors = range(0, self.plan.own, self.plan.vector)
        return sum((load_vector(ref, start, self.plan.vector, at=n) for n in vectors), start=())

    def store_states(self, ref: Any, number: Array, h: Lanes) -> None:
        """The counterpart of `load_states`."""
        plan = self.plan
        for n in range(0, plan.own, plan.vector):
            start = (number * plan.padded + self.channel) * plan.states + self.first
            store_vector(ref, start, h[n : n + plan.vector], at=n)

    def save_states(self, h: Sequence[Lanes], number: Array) -> None:
        """Store the states at the start of a stretch of `save` tokens, in the order of the backward pass."""
        plan = self.plan
        stretches = plan.steps * plan.chunk // plan.save
        start = (self.scan.b * stretches + number) * (plan.padded * plan.groups * plan.states)
        for g in range(plan.of_worker):
            at = start + plan.tile.saved(self.channel, self.first_group + g, plan.groups)
            for n in range(0, plan.own, plan.vector):
                state = lax.div(self.first + n, STATES) * STATES * plan.tile.rows + lax.rem(self.first + n, STATES)
                store_vector(self.scan.saved, at + state, h[g][n : n + plan.vector])

    def wait(self, index: Array) -> None:
        """Wait until a chunk's operands are in shared memory."""
        slot = lax.rem(index, self.plan.slots)
        plgpu.barrier_wait(self.scan.ready.at[slot])
        self.scan.stage.wait(lax.rem(index, self.plan.slots))

    def load_operands(self, coming: list, rest: list, index: Array, start: Array | int, k: int) -> None:
        """Append the operands of token start + k to `coming`: for each group dt, dt u and pairs (B, C); and the reset.

        rest: dt and dt u of the following tokens, since these are loaded for 4 tokens at a time.
        """
        plan, scan = self.plan, self.scan
        slot = lax.rem(index, plan.slots)
        if k % TOKENS == 0:
            at = scan.place(self.first_group, start, self.position)
            quads = [
                [
                    load_vector(ref.at[slot], at, TOKENS, at=(g * plan.chunk + k) * plan.block)
                    for ref in (scan.dt_s, scan.x_s)
                ]
                for g in range(plan.of_worker)
            ]
            rest.extend([[(dt[i], x[i]) for dt, x in quads] for i in range(TOKENS)])
        pairs = [self.load_pairs(slot, start, k, g) for g in range(plan.of_worker)]
        reset = scan.stage.reset(slot, start + k) if "marks" in scan.stage else None
        coming.append((rest.pop(0), pairs, reset))

    def load_pairs(self, slot: Array, start: Array | int, k: int, g: int) -> list[tuple[Array, Array]]:
        """(B, C) of each of the thread's states at token start + k."""
        plan = self.plan
        at, step = (self.first_group * plan.states + self.first) * 2, min(2 * plan.own, 4)
        offsets = range(0, 2 * plan.own, step)
        quads = (self.scan.stage.load_vector("BC", slot, start, at + n, step, g, k) for n in offsets)
        flat: Lanes = sum(quads, start=())
        return list(zip(flat[::2], flat[1::2]))

    def first_operands(self, index: Array) -> tuple[list, list, list]:
        """Operands and decays of a chunk's first tokens."""
        coming: list = []
        near: list = []
        rest: list = []
        self.wait(index)
        for k in range(self.plan.ahead):
            self.load_operands(coming, rest, index, 0, k)
        for _ in range(self.plan.early):
            near.append(self.make_factors(coming.pop(0)))
        return coming, near, rest

    def make_factors(self, operands: tuple) -> tuple[list[tuple], Array | None]:
        """exp(dt A), dt u B and C for each of the groups; and the reset."""
        made, (steps, pairs, reset) = [], operands
        for A_group, (dt, x), BC in zip(self.A, steps, pairs):
            made.append(([jnp.exp2(dt * a) for a in A_group], [x * b for b, _ in BC], [c for _, c in BC]))
        return made, reset

    def walk_chunk(self, index: Array, carry: tuple) -> tuple:
        """Process a chunk. Operands are loaded, and decays computed, while earlier tokens are processed.

        carry: states, and the operands and decays of the tokens that come next. The last of these tokens are in the
        next chunk, which is in shared memory long before.
        """
        stretches = self.plan.chunk // self.plan.stretch
        carry = lax.fori_loop(0, stretches - 1, functools.partial(self.walk_stretch, index), carry)
        return self.walk_stretch(index, stretches - 1, carry, last=True)

    def walk_stretch(self, index: Array, i: Any, carry: tuple, last: bool = False) -> tuple:
        """Process one stretch of unrolled tokens; `last`: it is the last stretch of the chunk."""
        plan, scan = self.plan, self.scan
        h, coming, near, rest = carry
        start, coming, near, rest, four = i * plan.stretch, list(coming), list(near), list(rest), []
        for k in range(plan.stretch):
            if plan.save and k % plan.save == 0:
                self.save_states(h, (index * plan.chunk + start + k) // plan.save)
            if not last or k + plan.ahead < plan.stretch:
                self.load_operands(coming, rest, index, start, k + plan.ahead)
            elif plan.bridged:
                if k + plan.ahead == plan.stretch:
                    pl.when(index + 1 < plan.steps)(lambda: self.wait(index + 1))
                self.load_operands(coming, rest, index + 1, 0, k + plan.ahead - plan.stretch)
            if coming:
                near.append(self.make_factors(coming.pop(0)))
            h, ys = advance(h, *near.pop(0))
            four.append(ys)
            if len(four) == TOKENS:
                for g, y in enumerate(zip(*four)):
                    at = scan.place(self.first_group * plan.shares + self.share, start, self.position)
                    ahead_of = (g * plan.shares * plan.chunk + k + 1 - TOKENS) * plan.block
                    store_vector(scan.y_s.at[lax.rem(index, plan.slots)], at, y, at=ahead_of)
                four = []
        return h, coming, near, rest


def store_outputs(scan: Scan) -> None:
    """The last warpgroup: stores y = (s C + D u) silu(z) of each chunk, then refills the chunk's slot."""
    plan, stage = scan.plan, scan.stage
    scan.budget(AIDE)
    channel = scan.e * plan.block + scan.offset
    D = load_vector(scan.D, channel, plan.wide)

    def store_chunk(index):
        slot = lax.rem(index, plan.slots)
        us = load_tokens(scan, "u", slot)
        ys = [tuple(y + d * u for y, u in zip(y, u)) for y, d, u in zip(load_readouts(scan, slot), D, us)]
        if "z" in stage:
            zs = load_tokens(scan, "z", slot)
            ys = [tuple(y * z * lanes.sigmoid(z) for y, z in zip(y, z)) for y, z in zip(ys, zs)]
        for token, y in zip(scan.tokens, zip(*ys)):
            time = (scan.b * plan.steps + index) * plan.chunk + token
            store_vector(scan.y, time * plan.padded + channel, y)

    def step(index, _):
        slot = lax.rem(index, plan.slots)
        plgpu.barrier_wait(scan.done.at[slot])
        store_chunk(index)
        plgpu.commit_smem()  # all threads have finished with this slot
        pl.when(index + plan.slots < plan.steps)(lambda: stage.start_copy(slot, index + plan.slots))

    lax.fori_loop(0, plan.steps, step, None)


def load_tokens(scan: Scan, name: str, slot: Array, group: int = 0) -> list[Lanes]:
    """4 tokens of each of the thread's channels."""
    wide = scan.plan.wide
    return list(zip(*(scan.stage.load_vector(name, slot, t, scan.offset, wide, group) for t in scan.tokens)))


def load_readouts(scan: Scan, slot: Array) -> list[Lanes]:
    """Weighted sum of s C over the groups: 4 tokens of each of the thread's channels."""
    plan = scan.plan
    total: list[Any] = [None] * plan.wide
    for g in range(plan.groups):
        weights = load_tokens(scan, "weights", slot, g - 1) if g > 0 and "weights" in scan.stage else None
        for c in range(plan.wide):
            rows = range(g * plan.shares, (g + 1) * plan.shares)
            at = [scan.place(row, scan.first_token, c * plan.columns + scan.column) for row in rows]
            y = tuple(sum(parts) for parts in zip(*(load_vector(scan.y_s.at[slot], x, TOKENS) for x in at)))
            y = y if weights is None else tuple(y * w for y, w in zip(y, weights[c]))
            total[c] = y if total[c] is None else tuple(a + b for a, b in zip(total[c], y))
    return total


def advance(h: Sequence[Lanes], factors: list[tuple], reset: Array | None) -> tuple[tuple[Lanes, ...], list[Array]]:
    """s = exp(dt A) s + dt u B, and s C, for each of the groups; from s = 0 if there is a reset."""
    new = tuple(
        tuple(a * s + b for a, s, b in zip(decays, kept(s, reset), added)) for s, (decays, added, _) in zip(h, factors)
    )
    return new, [dot(s, C) for s, (_, _, C) in zip(new, factors)]


def dot(a: Sequence[Array], b: Sequence[Array]) -> Array:
    """sum_n a_n b_n in four independent chains, because each addition waits for the previous one in its chain."""
    chains: list[Any] = [None] * 4
    for n, (x, y) in enumerate(zip(a, b)):
        chains[n % 4] = x * y if chains[n % 4] is None else chains[n % 4] + x * y
    first, *rest = (chain for chain in chains if chain is not None)
    return sum(rest, start=first)
