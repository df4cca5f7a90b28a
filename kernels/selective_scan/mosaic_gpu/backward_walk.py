"""The walk of two warpgroups through time in the selective scan's backward pass. `backward` describes its purpose."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from seqmodels.kernels import lanes
from seqmodels.kernels.lanes import Lanes, load_vector, store_vector
from seqmodels.kernels.selective_scan.mosaic_gpu.backward_plan import BUFFERS
from seqmodels.kernels.selective_scan.mosaic_gpu.backward_roles import Scan, budget
from seqmodels.kernels.selective_scan.mosaic_gpu.stage import kept
from seqmodels.kernels.selective_scan.mosaic_gpu.tile import CHANNELS, STATES

WALKER = 176  # registers per thread of the walk


def walk(scan: Scan) -> None:
    """Process all chunks from the last to the first, with the gradients of the states in registers."""
    plan = scan.plan
    budget(WALKER)
    walker = Walker(scan)

    def step(item, carry):
        adjoint, h = carry
        plgpu.barrier_wait(scan.ready.at[scan.place_of(item)])
        scan.stage.wait(scan.slot_of(item))
        next_h = walker.saved_states(item + 1)
        return walker.walk_chunk(item, h, *adjoint), next_h

    adjoint = walker.load_states(scan.dfinal, scan.b * plan.groups + scan.g), (lanes.zeros(STATES),) * CHANNELS
    (dinitial, dA), _ = lax.fori_loop(0, plan.steps, step, (adjoint, walker.saved_states(jnp.int32(0))))
    parts = plan.steps * len(plan.parts)
    for part in range(max(0, parts - BUFFERS), parts):
        plgpu.barrier_wait(scan.free.at[part % BUFFERS])  # every arrival must be waited for
    walker.store_states(scan.outputs["dinitial"], scan.b * plan.groups + scan.g, dinitial)
    walker.store_states(scan.outputs["dA"], scan.b * plan.groups + scan.g, dA)


class Walker:
    """A thread of the walk: its 2 channels with 4 states each, and its work in each chunk.

    Attributes:
        row, share: [128] int32, see `Tile.owner`.
        matrix: [128] int32, offset of its states in a matrix [E', N]. place: their offset in the saved states.
        A: for each of its channels, A of its states times log2(e).
    """

    def __init__(self, scan: Scan) -> None:
        plan = scan.plan
        self.scan, self.plan = scan, plan
        self.row, self.share = plan.tile.owner(lax.axis_index("role") - 1)
        self.matrix = (scan.e * plan.block + self.row * CHANNELS) * plan.states + self.share * STATES
        self.place = self.share * plan.tile.rows + plan.tile.place(self.row)
        self.A = self.load_states(scan.A, scan.g)

    def load_states(self, ref: Any, number: Array) -> tuple[Lanes, ...]:
        """The thread's part of matrix `number` of [..., E', N]."""
        padded, states = self.plan.padded, self.plan.states
        return tuple(
            load_vector(ref, number * padded * states + self.matrix, STATES, at=c * states) for c in range(CHANNELS)
        )

    def store_states(self, ref: Any, number: Array, values: Sequence[Lanes]) -> None:
        """The counterpart of `load_states`."""
        states = self.plan.states
        for c in range(CHANNELS):
            store_vector(ref, number * self.plan.padded * states + self.matrix, values[c], at=c * states)

    def saved_states(self, item: Array) -> tuple[Lanes, ...]:
        """States at the start of an item's chunk, or of the first chunk if there is no such item."""
        plan, scan = self.plan, self.scan
        chunk = scan.b * plan.saved_steps + jnp.maximum(scan.chunk_of(item), 0)
        at = (chunk * plan.blocks + scan.e) * plan.groups + scan.g
        return tuple(
            load_vector(scan.saved, (at * CHANNELS + c) * plan.saved_channel + self.place * STATES, STATES)
            for c in range(CHANNELS)
        )

    def of_channels(self, ref: Any, item: Array, t: int) -> Lanes:
        """A token's value of each of the thread's channels."""
        place = self.scan.place_of(item)
        return load_vector(ref.at[place], self.row * CHANNELS, CHANNELS, at=t * self.plan.block)

    def of_states(self, name: str, item: Array, t: int) -> Lanes:
        """A token's B or C for each of the thread's states."""
        scan = self.scan
        return scan.stage.load_vector(name, scan.slot_of(item), 0, self.share * STATES, STATES, ahead=t)

    def reset(self, item: Array, t: int) -> Array | None:
        """A token's mark, below 0 where a document begins; None if there are no marks."""
        return self.scan.stage.reset(self.scan.slot_of(item), t) if "marks" in self.scan.stage else None

    def walk_chunk(self, item: Array, h: Sequence[Lanes], dstate: Sequence[Lanes], dA: Sequence[Lanes]) -> tuple:
        """Go forwards from the chunk's first part to its last but one, then back from its last part to its first."""
        scan, parts = self.scan, self.plan.parts
        starts: list = [h]
        known: list = []
        for part in reversed(parts[1:]):
            decays, states = self.forwards(item, starts[-1], self.plan.tokens(part))
            starts.append(states[-1])
            known.append(decays)
        known.append(None)
        for part in parts:
            tokens = self.plan.tokens(part)
            decays, states = self.forwards(item, starts.pop(), tokens, known.pop())
            number, buffer = item * len(parts) + part, scan.buffer_of(item, part)

            def wait(buffer: Array = buffer) -> None:
                plgpu.barrier_wait(scan.free.at[buffer])

            pl.when(number >= BUFFERS)(wait)
            dstate, dA = self.backwards(item, tokens, decays, states, scan.sums.at[buffer], dstate, dA)
            plgpu.barrier_arrive(scan.done.at[buffer])
        return tuple(tuple(row) for row in dstate), tuple(tuple(row) for row in dA)

    def forwards(self, item: Array, h: Sequence[Lanes], tokens: range, decays: list | None = None) -> tuple[list, list]:
        """The decays of each token; and the states before the first token, after it, and so on to the last."""
        scan, channels = self.scan, range(CHANNELS)
        loaded = [
            (self.of_channels(scan.dt_s, item, t), self.of_channels(scan.x_s, item, t), self.of_states("B", item, t))
            for t in tokens
        ]
        if decays is None:
            decays = [[[jnp.exp2(dt[c] * a) for a in self.A[c]] for c in channels] for dt, _, _ in loaded]
        states: list = [h]
        for t, left, (_, x, B) in zip(tokens, decays, loaded):
            old = [kept(s, self.reset(item, t)) for s in states[-1]]
            states.append([[a * s + x[c] * b for a, s, b in zip(left[c], old[c], B)] for c in channels])
        return decays, states

    def backwards(
        self,
        item: Array,
        tokens: range,
        decays: list,
        states: list,
        own: Any,
        dstate: Sequence[Lanes],
        dA: Sequence[Lanes],
    ) -> tuple[list, list]:
        """The adjoint recurrence. Sums over a thread's own states and channels are stored in `own`."""
        dstate, dA = list(dstate), list(dA)
        following = self.operands(item, tokens[-1])
        for t in reversed(tokens):
            number = t - tokens[0]
            current = following
            if number > 0:
                following = self.operands(item, t - 1)  # load before anything is stored
            reset = self.reset(item, t)
            sums = self.token_gradients(current, decays[number], states[number], states[number + 1], reset, dstate, dA)
            self.store_sums(own, number, *sums)
        return dstate, dA

    def operands(self, item: Array, t: int) -> list[Lanes]:
        """dt, dt u, dy, B and C of a token."""
        of_channels = [self.of_channels(x, item, t) for x in (self.scan.dt_s, self.scan.x_s, self.scan.dy_s)]
        return of_channels + [self.of_states(name, item, t) for name in "BC"]

    def token_gradients(
        self,
        operands: Sequence[Lanes],
        left: Sequence[Sequence[Array]],
        old: Sequence[Sequence[Array]],
        new: Sequence[Sequence[Array]],
        reset: Array | None,
        dstate: list,
        dA: list,
    ) -> tuple[list, list]:
        """A token's sums over the thread's states (g B, q A, readout) and over its channels (dB, dC).

        Args:
            operands: result of `operands`. left: decays. old, new: states before and after the token. reset: its mark.
            dstate, dA: running gradients, changed in place.
        """
        dt, x, dy, B, C = operands
        dB: list[Any] = [None] * STATES
        dC: list[Any] = [None] * STATES
        g_B, q_A, y = [], [], []
        for c in range(CHANNELS):
            grad = [d + dy[c] * k for d, k in zip(dstate[c], C)]
            dstate[c] = list(kept([g * a for g, a in zip(grad, left[c])], reset))
            q = [d * s for d, s in zip(dstate[c], kept(old[c], reset))]
            dA[c] = [before + x * dt[c] for before, x in zip(dA[c], q)]
            dB = [add(before, g * x[c]) for before, g in zip(dB, grad)]
            dC = [add(before, dy[c] * s) for before, s in zip(dC, new[c])]
            g_B.append(sum_of(g * b for g, b in zip(grad, B)))
            q_A.append(sum_of(x * a for x, a in zip(q, self.A[c])))
            y.append(sum_of(s * k for s, k in zip(new[c], C)))
        return [g_B, q_A, y], [dB, dC]

    def store_sums(self, own: Any, number: int, over_states: list, over_channels: list) -> None:
        """Store the sums of token `number` of a part for the other warpgroups."""
        plan, shares = self.plan, self.plan.tile.shares
        for kind, values in enumerate(over_states[: 2 + plan.readout]):
            at = number * plan.row + kind * shares * plan.channel_share
            store_vector(own, self.share * plan.channel_share + self.row * CHANNELS, tuple(values), at=at)
        for kind, values in enumerate(over_channels):
            at = number * plan.row + plan.by_states + kind * shares * plan.state_share
            store_vector(own, self.share * plan.state_share + self.row * STATES, tuple(values), at=at)


def add(total: Array | None, term: Array) -> Array:
    return term if total is None else total + term


def sum_of(terms: Iterable[Array]) -> Array:
    """Add the terms one after another, so that each product fuses with the following addition."""
    return functools.reduce(lambda a, b: a + b, terms)
