"""Warpgroups other than the walk in the selective scan's backward pass. `backward` describes how they cooperate."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from seqmodels.kernels import lanes
from seqmodels.kernels.interpreter import gpu_interpreter
from seqmodels.kernels.lanes import LN2, THREADS, Lanes, load_vector, store_vector, thread_index
from seqmodels.kernels.selective_scan.mosaic_gpu.backward_plan import AHEAD, BUFFERS, PART, SLOTS, Plan
from seqmodels.kernels.selective_scan.mosaic_gpu.stage import Stage, prepare
from seqmodels.kernels.selective_scan.mosaic_gpu.tile import COLUMN, STATES

AIDE = 80  # registers per thread outside the walk
G_B, Q_A, READOUT = range(3)  # sums over states


@dataclasses.dataclass(frozen=True)
class Scan:
    """Inside the kernel: the plan, the references, and this block's indices.

    Chunks are processed from the last to the first in time. An `item` is the number of a chunk in this order.

    Attributes:
        b, g, e: the block's sequence, group, and index along the channels.
        A, D, bias, saved, dfinal, outputs: in global memory; outputs by name.
        dt_s, x_s, dy_s: dt, dt u and the gated dy in shared memory, [AHEAD, chunk, block].
        sums: in shared memory, [BUFFERS, PART, row].
        ready, spent: barriers that signal that dt_s, x_s and dy_s of a chunk are filled, and that they may be reused.
        done, free: barriers that signal that the sums of a part are stored, and that they have been read.
    """

    plan: Plan
    stage: Stage
    b: Array
    g: Array
    e: Array
    A: Any
    D: Any
    bias: Any
    saved: Any
    dfinal: Any
    outputs: Mapping[str, Any]
    dt_s: Any
    x_s: Any
    dy_s: Any
    sums: Any
    ready: Any
    done: Any
    free: Any
    spent: Any

    def chunk_of(self, item: Array) -> Array:
        """Index in time of an item's chunk."""
        return self.plan.steps - 1 - item

    def slot_of(self, item: Array) -> Array:
        """Slot of an item's inputs in shared memory."""
        return lax.rem(item, SLOTS)

    def place_of(self, item: Array) -> Array:
        """Slot of an item's dt, dt u and dy."""
        return lax.rem(item, AHEAD)

    def buffer_of(self, item: Array, part: int) -> Array:
        """Buffer of the sums of one part of an item."""
        return lax.rem(item * len(self.plan.parts) + part, BUFFERS)

    def start_copy(self, item: Array) -> None:
        """Start the copies of an item's inputs."""
        self.stage.start_copy(self.slot_of(item), self.chunk_of(item), self.g)

    def weighted(self, slot: Array, token: Array, offset: Array, dy: Lanes) -> Lanes:
        """dy times the group's weight. The first group has no weight."""
        if "weights" not in self.stage:
            return dy
        weights = self.stage.load_vector("weights", slot, token, offset, COLUMN)
        return tuple(d * jnp.where(self.g == 0, jnp.ones_like(w), w) for d, w in zip(dy, weights))


def bind(plan: Plan, stage: Stage, outputs: Sequence[str], refs: Sequence[Any]) -> Scan:
    """The references in the order of the kernel's arguments, outputs and scratch, by name."""
    b, g, e = (lax.axis_index(name) for name in "bge")
    count = len(stage.arrays)
    sources, refs = refs[:count], refs[count:]
    (A, D, bias, saved, dfinal), refs = refs[:5], refs[5:]
    named, refs = dict(zip(outputs, refs)), refs[len(outputs) :]
    *buffers, dt_s, x_s, dy_s, sums, ready, done, free, spent = refs
    stage.bind(sources, buffers, b, e)
    shared: Any = (dt_s, x_s, dy_s, sums, ready, done, free, spent)
    return Scan(plan, stage, b, g, e, A, D, bias, saved, dfinal, named, *shared)


def budget(registers: int) -> None:
    """Request this many registers per thread. The walk's warpgroups need more than a quarter of all registers each."""
    if not gpu_interpreter():
        plgpu.set_max_registers(registers, action="increase" if registers > 128 else "decrease")


def prepare_and_sum_channels(scan: Scan) -> None:
    """The first warpgroup: computes dt, dt u and dy of each chunk, some chunks ahead, and sums over channels."""
    plan, stage = scan.plan, scan.stage
    budget(AIDE)
    offset, first_token = plan.tile.items(plan.chunk)
    tokens = [first_token + first for first in range(0, plan.chunk, plan.tile.tokens(plan.chunk))]
    bias = load_vector(scan.bias, scan.g * plan.padded + scan.e * plan.block + offset, COLUMN)

    def prepare_chunk(item):
        """dt, dt u, and dy times gate and weight, float32."""
        place, slot = scan.place_of(item), scan.slot_of(item)
        stage.wait(slot)
        us = [stage.load_vector("u", slot, token, offset, COLUMN) for token in tokens]
        dts = prepare(stage, slot, scan.chunk_of(item), tokens, offset, bias, plan.softplus, plan.length)
        dys = [stage.load_vector("dy", slot, token, offset, COLUMN) for token in tokens]
        if "z" in stage:
            gates = [stage.load_vector("z", slot, token, offset, COLUMN) for token in tokens]
            dys = [tuple(d * z * lanes.sigmoid(z) for d, z in zip(dy, gate)) for dy, gate in zip(dys, gates)]
        for (token, dt), u, dy in zip(dts, us, dys):
            at = token * plan.block + offset
            store_vector(scan.dt_s.at[place], at, dt)
            store_vector(scan.x_s.at[place], at, tuple(d * u for d, u in zip(dt, u)))
            store_vector(scan.dy_s.at[place], at, scan.weighted(slot, token, offset, dy))
        plgpu.barrier_arrive(scan.ready.at[place])

    for item in range(min(SLOTS, plan.steps)):
        scan.start_copy(jnp.int32(item))
    for item in range(min(AHEAD - 1, plan.steps)):
        prepare_chunk(jnp.int32(item))

    def step(item, _):
        ahead = item + AHEAD - 1

        @pl.when(ahead < plan.steps)
        def _():
            pl.when(item > 0)(lambda: plgpu.barrier_wait(scan.spent.at[scan.place_of(ahead)]))
            prepare_chunk(ahead)

        for part in plan.parts:
            plgpu.barrier_wait(scan.done.at[scan.buffer_of(item, part)])
            sum_channels(scan, item, part)
            plgpu.barrier_arrive(scan.free.at[scan.buffer_of(item, part)])

    lax.fori_loop(0, plan.steps, step, None)
    for item in range(max(0, plan.steps - AHEAD), plan.steps):  # every arrival must be waited for
        plgpu.barrier_wait(scan.spent.at[item % AHEAD])


def sum_channels(scan: Scan, item: Array, part: int) -> None:
    """dB, dC, summed over the block's channels. The sum over blocks is taken outside the kernel, in order."""
    plan = scan.plan
    tile = plan.tile
    vectors = PART * 2 * tile.shares  # sums of 4 states each
    several = max(1, THREADS // vectors)  # neighbouring threads that share one
    rows = tile.rows // several  # a power of two
    for first in range(0, vectors * several, THREADS):
        thread = first + thread_index()
        vector = lax.div(thread, several)
        share, which = lax.rem(vector, tile.shares), lax.rem(lax.div(vector, tile.shares), 2)
        token = lax.div(vector, 2 * tile.shares)
        at = token * plan.row + (which * tile.shares + share) * plan.state_share
        at += lax.rem(thread, several) * STATES
        total: Any = None
        for i in range(rows):  # each vector starts at another row, to avoid bank conflicts
            row = ((vector + i) & (rows - 1)) * (several * STATES)
            values = load_vector(scan.sums.at[scan.buffer_of(item, part)], at + row, STATES, at=plan.by_states)
            total = values if total is None else tuple(a + v for a, v in zip(total, values))
        for bit in range(several.bit_length() - 1):
            total = tuple(x + lanes.exchange(x, 1 << bit) for x in total)
        time = ((scan.b * plan.blocks + scan.e) * plan.steps + scan.chunk_of(item)) * plan.chunk
        time = time + plan.tokens(part)[0] + token
        place = ((time * plan.groups + scan.g) * 2 + which) * plan.states + share * STATES
        store_vector(scan.outputs["dBC"], place, total)


def sum_states(scan: Scan) -> None:
    """The last warpgroup: sums over a channel's states, and the gradients from them; then copies the next chunk."""
    plan = scan.plan
    budget(AIDE)
    channels = Channels(scan)
    passes = [(part, number) for part in plan.parts for number in range(PART // plan.tile.tokens(PART))]

    def step(item, totals):
        scan.stage.wait(scan.slot_of(item))
        for i, (part, number) in enumerate(passes):
            if number == 0:
                plgpu.barrier_wait(scan.done.at[scan.buffer_of(item, part)])
            totals = channels.store_gradients(item, part, number, *totals)
            if i + 1 == len(passes) or passes[i + 1][0] != part:
                plgpu.barrier_arrive(scan.free.at[scan.buffer_of(item, part)])
        plgpu.barrier_arrive(scan.spent.at[scan.place_of(item)])
        plgpu.commit_smem()  # all threads have finished with this slot
        pl.when(item + SLOTS < plan.steps)(lambda: scan.start_copy(item + SLOTS))
        return totals

    totals = lax.fori_loop(0, plan.steps, step, (lanes.zeros(COLUMN),) * 2)
    part = (scan.b * plan.tile.tokens(PART) + channels.first_token) * plan.groups + scan.g
    at = part * plan.padded + channels.channel
    for name, total in zip(("dD", "dbias"), totals):
        store_vector(scan.outputs[name], at, total)


class Channels:
    """A thread that sums over states: its 4 channels, and the gradients it computes from their sums at each token.

    Attributes:
        offset, channel: [128] int32, index of its first channel in the block and among all channels.
        first_token: [128] int32, its first token of a part.
        bias, D: of its channels; D belongs to the first group's u.
    """

    def __init__(self, scan: Scan) -> None:
        plan = scan.plan
        self.scan, self.plan = scan, plan
        self.offset, self.first_token = plan.tile.items(PART)
        self.channel = scan.e * plan.block + self.offset
        self.bias = load_vector(scan.bias, scan.g * plan.padded + self.channel, COLUMN)
        self.D = tuple(jnp.where(scan.g == 0, d, 0) for d in load_vector(scan.D, self.channel, COLUMN))

    def over_shares(self, own: Any, token: Array, kind: int) -> Lanes:
        """One of the sums over states, for each of the channels. kind: `G_B`, `Q_A` or `READOUT`."""
        plan = self.plan
        at = [(kind * plan.tile.shares + share) * plan.channel_share for share in range(plan.tile.shares)]
        shares = [load_vector(own, token * plan.row + self.offset, COLUMN, at=a) for a in at]
        return tuple(sum(terms[1:], start=terms[0]) for terms in zip(*shares))

    def store_gradients(self, item: Array, part: int, number: int, dD: Lanes, dbias: Lanes) -> tuple[Lanes, Lanes]:
        """Store du, ddt, dz, dweights of the tokens at position `number` in a part; return the running dD and dbias."""
        scan, plan, stage = self.scan, self.plan, self.scan.stage
        slot, place, index = scan.slot_of(item), scan.place_of(item), scan.chunk_of(item)
        in_part = self.first_token + number * plan.tile.tokens(PART)
        token, own = plan.tokens(part)[0] + in_part, scan.sums.at[scan.buffer_of(item, part)]
        g_B, q_A = self.over_shares(own, in_part, G_B), self.over_shares(own, in_part, Q_A)
        y: Any = self.over_shares(own, in_part, READOUT) if plan.readout else None
        step, dy = (load_vector(x.at[place], token * plan.block + self.offset, COLUMN) for x in (scan.dt_s, scan.dy_s))
        names = [name for name in ("u", "dt", "dy", "z") if name in stage]
        inputs = {name: stage.load_vector(name, slot, token, self.offset, COLUMN) for name in names}
        ddt = tuple(q * LN2 + u * gb for q, u, gb in zip(q_A, inputs["u"], g_B))
        if plan.softplus:
            ddt = tuple(d * lanes.sigmoid(r + o) for d, r, o in zip(ddt, inputs["dt"], self.bias))
        real = stage.real(slot, token, index, plan.length)
        ddt = ddt if real is None else tuple(jnp.where(real, d, 0) for d in ddt)
        du = tuple(t * gb + d * x for t, gb, d, x in zip(step, g_B, self.D, dy))
        dD = tuple(a + x * u for a, x, u in zip(dD, dy, inputs["u"]))
        dbias = tuple(a + d for a, d in zip(dbias, ddt))
        time = (scan.b * plan.steps + index) * plan.chunk + token
        store_vector(scan.outputs["du"], (time * plan.groups + scan.g) * plan.padded + self.channel, du)
        store_vector(scan.outputs["ddt"], (time * plan.groups + scan.g) * plan.padded + self.channel, ddt)
        if plan.readout:
            self.store_readout_gradients(slot, token, time, inputs, y)
        return dD, dbias

    def store_readout_gradients(
        self, slot: Array, token: Array, time: Array, inputs: Mapping[str, Lanes], y: Lanes
    ) -> None:
        """Store dweights, and the group's part of dz."""
        scan, plan = self.scan, self.plan
        z, dy = inputs.get("z"), inputs["dy"]
        gate: Any = None if z is None else tuple(lanes.sigmoid(z) for z in z)
        if "dweights" in scan.outputs:
            dw = dy if z is None else tuple(d * z * k for d, z, k in zip(dy, z, gate))
            at = (time * (plan.groups - 1) + jnp.maximum(scan.g - 1, 0)) * plan.padded + self.channel
            dw = tuple(d * y for d, y in zip(dw, y))
            pl.when(scan.g > 0)(lambda: store_vector(scan.outputs["dweights"], at, dw))
        if z is not None:
            weighted = scan.weighted(slot, token, self.offset, y)
            part = (d * u + y for d, u, y in zip(self.D, inputs["u"], weighted))
            dz = tuple(d * y * k * (1 + z * (1 - k)) for d, y, k, z in zip(dy, part, gate, z))
            store_vector(scan.outputs["dz"], (time * plan.groups + scan.g) * plan.padded + self.channel, dz)
