"""How channels and states of the selective scan are dealt out to the threads of the backward pass."""

import dataclasses

from jax import Array, lax

from seqmodels.kernels import lanes
from seqmodels.kernels.lanes import THREADS, thread_index

WORKERS = 2  # warpgroups that walk through time, each with its own channels
CHANNELS = 2  # held by one thread of these
STATES = 4  # of each channel, held by one thread: 16 bytes
COLUMN = 4  # channels that a thread takes where work is not shared over states
SIZES = (16, 32, 64)  # N that a tile can have; others are padded with states that stay zero


@dataclasses.dataclass(frozen=True)
class Tile:
    """2 x 4 states a thread: 2 neighbouring channels, 4 neighbouring states of each.

    The N / 4 threads that share channels are in one warp, 32 / (N / 4) apart, so that neighbouring threads read
    neighbouring bytes of whatever lies along channels. Sums over N add over a thread's own 4 states, then over `shares`
    partial sums in shared memory; sums over channels likewise over a thread's own 2, then over `rows` partial sums.

    Attributes:
        states: N, one of `SIZES`.
    """

    states: int

    @property
    def workers(self) -> int:
        """Warpgroups that walk."""
        return lanes.warpgroups(WORKERS)

    @property
    def shares(self) -> int:
        """Threads that share a channel."""
        return self.states // STATES

    @property
    def rows(self) -> int:
        """Pairs of channels in the block."""
        return self.workers * THREADS // self.shares

    @property
    def neighbours(self) -> int:
        """Rows in one warp."""
        return 32 // self.shares

    @property
    def channels(self) -> int:
        """Channels of a block."""
        return self.rows * CHANNELS

    def owner(self, worker: Array) -> tuple[Array, Array]:
        """Of each thread of a worker, [128] int32: its row of channels and its share of the states."""
        thread = thread_index()
        lane, warp = lax.rem(thread, 32), lax.div(thread, 32) + worker * (THREADS // 32)
        return warp * self.neighbours + lax.rem(lane, self.neighbours), lax.div(lane, self.neighbours)

    def place(self, row: Array) -> Array:
        """Where a row is among those that the forward pass saves: even ones first, for it writes every other one."""
        return lax.rem(row, 2) * (self.rows // 2) + lax.div(row, 2)

    def tokens(self, chunk: int) -> int:
        """Tokens of a chunk that one pass of `items` covers."""
        return min(THREADS * COLUMN // self.channels, chunk)

    def items(self, chunk: int) -> tuple[Array, Array]:
        """Of each thread, [128] int32: the first of 4 channels and a token, where work is not shared over states.

        Where there are more threads than that, some do the same.
        """
        columns, thread = self.channels // COLUMN, thread_index()
        return lax.rem(thread, columns) * COLUMN, lax.rem(lax.div(thread, columns), chunk)

    def saved(self, channel: Array, group: Array, groups: int) -> Array:
        """Where the states of a channel are among those of [E', G] that were saved of one token: [128] int32.

        The order is that of the threads which read them: [blocks, groups, 2 (channel), shares, rows, 4 (state)]. Shares
        of a channel's states are 4 * rows apart.
        """
        block, channel = lax.div(channel, self.channels), lax.rem(channel, self.channels)
        part = (block * groups + group) * CHANNELS + lax.rem(channel, CHANNELS)
        return (part * (self.shares * self.rows) + self.place(lax.div(channel, CHANNELS))) * STATES
