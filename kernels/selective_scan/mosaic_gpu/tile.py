"""How channels and states of the selective scan are assigned to the threads of the backward pass."""

import dataclasses

from jax import Array, lax

from seqmodels.kernels import lanes
from seqmodels.kernels.lanes import THREADS, thread_index

WORKERS = 2  # warpgroups that go through time, each with its own channels
CHANNELS = 2  # per thread of these warpgroups
STATES = 4  # of each channel per thread: 16 bytes
COLUMN = 4  # channels per thread where the states of a channel are not split over threads
SIZES = (16, 32, 64)  # supported N of a tile; another N is padded with states that stay zero


@dataclasses.dataclass(frozen=True)
class Tile:
    """2 x 4 states per thread: 4 neighbouring states of each of 2 neighbouring channels.

    The N / 4 threads that share the same channels are in one warp, 32 / (N / 4) apart. So neighbouring threads read
    neighbouring bytes of arrays whose last axis is channels. A sum over N adds a thread's own 4 states first, then
    `shares` partial sums in shared memory. A sum over channels adds a thread's own 2 channels first, then `rows`
    partial sums.

    Attributes:
        states: N, one of `SIZES`.
    """

    states: int

    @property
    def workers(self) -> int:
        """Warpgroups that go through time."""
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
        """Channels per block."""
        return self.rows * CHANNELS

    def owner(self, worker: Array) -> tuple[Array, Array]:
        """Row of channels and share of the states of each thread of a worker, [128] int32 each."""
        thread = thread_index()
        lane, warp = lax.rem(thread, 32), lax.div(thread, 32) + worker * (THREADS // 32)
        return warp * self.neighbours + lax.rem(lane, self.neighbours), lax.div(lane, self.neighbours)

    def place(self, row: Array) -> Array:
        """Position of a row in what the forward pass saves. Even rows come first, since it writes every other row."""
        return lax.rem(row, 2) * (self.rows // 2) + lax.div(row, 2)

    def tokens(self, chunk: int) -> int:
        """Tokens of a chunk that one pass of `items` covers."""
        return min(THREADS * COLUMN // self.channels, chunk)

    def items(self, chunk: int) -> tuple[Array, Array]:
        """First of 4 channels, and token, of each thread, [128] int32 each, where states are not split over threads.

        If there are more threads than such pairs, some threads do the same work.
        """
        columns, thread = self.channels // COLUMN, thread_index()
        return lax.rem(thread, columns) * COLUMN, lax.rem(lax.div(thread, columns), chunk)

    def saved(self, channel: Array, group: Array | int, groups: int) -> Array:
        """Offset of a channel's states among the states of [E', G] that were saved at one token: [128] int32.

        The order is that of the threads that read them: [blocks, groups, 2 (channel), shares, rows, 4 (state)]. The
        shares of one channel's states are 4 * rows apart.
        """
        block, channel = lax.div(channel, self.channels), lax.rem(channel, self.channels)
        part = (block * groups + group) * CHANNELS + lax.rem(channel, CHANNELS)
        return (part * (self.shares * self.rows) + self.place(lax.div(channel, CHANNELS))) * STATES
