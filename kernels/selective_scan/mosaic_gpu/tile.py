"""How channels and states of the selective scan are dealt out to the threads of a warpgroup."""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.lanes import LANES, THREADS

STATES = 4  # of a channel, held by one thread: 16 bytes
CHANNELS = 4  # held by one thread
SIZES = (8, 16, 32, 64)  # N that a tile can have; others are padded with states that stay zero


def thread_index():
    """[128] int32."""
    return plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, (THREADS,), 0), LANES)


@dataclasses.dataclass(frozen=True)
class Tile:
    """4 x 4 states a thread: 4 neighbouring channels, 4 neighbouring states of each.

    The N / 4 threads that share channels are in one warp, 32 / (N / 4) apart, so that 8 neighbouring threads read 128
    neighbouring bytes of whatever lies along channels. Sums over N add over a thread's own 4 states, then over `shares`
    partial sums in shared memory; sums over channels likewise over a thread's own 4, then over `rows` partial sums.

    Attributes:
        states: N, one of `SIZES`.
    """

    states: int

    @property
    def shares(self) -> int:
        """Threads that share a channel."""
        return self.states // STATES

    @property
    def rows(self) -> int:
        """Groups of 4 channels in the block."""
        return THREADS // self.shares

    @property
    def channels(self) -> int:
        """Channels of a block."""
        return self.rows * CHANNELS

    def owner(self):
        """Of each thread, [128] int32: its row of channels, its share of the states, and its place.

        The place orders threads by share, then row.
        """
        thread = thread_index()
        in_warp = 32 // self.shares
        lane = lax.rem(thread, 32)
        row = lax.div(thread, 32) * in_warp + lax.rem(lane, in_warp)
        share = lax.div(lane, in_warp)
        return row, share, share * self.rows + row

    def tokens(self, chunk) -> int:
        """Tokens of a chunk that one pass of `items` covers."""
        return min(THREADS // self.rows, chunk)

    def items(self, chunk):
        """Of each thread, [128] int32: a group of 4 channels and a token, where work is not shared over states.

        Where there are more threads than that, some do the same.
        """
        thread = thread_index()
        return lax.rem(thread, self.rows), lax.rem(lax.div(thread, self.rows), chunk)

    def saved(self, channel, group, groups):
        """Where the states of a channel are among those of [E', G] that were saved of one token: [128] int32.

        The order is that of the threads which read them: [blocks, groups, 4 (channel), 128 (place), 4 (state)]. Shares
        of a channel's states are 4 * rows apart.
        """
        block, channel = lax.div(channel, self.channels), lax.rem(channel, self.channels)
        part = (block * groups + group) * CHANNELS + lax.rem(channel, CHANNELS)
        return (part * THREADS + lax.div(channel, CHANNELS)) * STATES
