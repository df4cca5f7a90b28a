"""How the selective scan's forward pass deals out a block of channels: sizes, threads, shared memory."""

import dataclasses

import jax
import jax.numpy as jnp

from seqmodels.kernels import lanes
from seqmodels.kernels.lanes import THREADS
from seqmodels.kernels.selective_scan.mosaic_gpu.stage import MARKED, SHARED, Stage
from seqmodels.kernels.selective_scan.mosaic_gpu.tile import STATES, Tile

f32 = jnp.float32
MOST, FEWEST = 4, 3  # chunks in shared memory: the more if they fit
WORKERS = 5  # warpgroups that recur, at most
TOKENS = 4  # of a channel, side by side in shared memory
HELD = {128: 8, 64: 8, 32: 4, 16: 2}  # states of a channel that each thread takes, by channels of a block; see WORKERS
# By states a thread: tokens by which operands are loaded before they are worked on, and tokens written out
AHEAD, STRETCH = {1: 8, 2: 8, 4: 4, 8: 4, 16: 1}, {1: 64, 2: 64, 4: 16, 8: 16, 16: 8}
EARLY = {1: 1, 2: 2, 4: 2, 8: 1, 16: 1}  # tokens by which decays are made before they are needed
BRIDGED = 8  # up to so many states a thread, the first operands of a chunk are loaded during the one before it


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static of a forward pass: sizes, and how a block of channels is dealt out to its threads.

    Attributes:
        batch, length, groups, padded, states: b, T, G, E', N of `forward`.
        block, chunk, save, softplus: as of `forward`.
        slots: chunks in shared memory.
    """

    batch: int
    length: int
    groups: int
    padded: int
    states: int
    block: int
    chunk: int
    save: int
    softplus: bool
    slots: int

    @property
    def steps(self) -> int:
        """Chunks."""
        return -(-self.length // self.chunk)

    @property
    def workers(self) -> int:
        """Warpgroups that recur."""
        return workers_of(self.block, self.states, self.groups)

    @property
    def of_worker(self) -> int:
        """Groups of each."""
        return -(-self.groups // self.workers)

    @property
    def shares(self) -> int:
        """Threads that share a channel and group."""
        return shares_of(self.block, self.states, self.groups)

    @property
    def own(self) -> int:
        """States of each of them."""
        return self.states // self.shares

    @property
    def vector(self) -> int:
        """States that are loaded together."""
        return min(self.own, STATES)

    @property
    def tile(self) -> Tile:
        """How the backward pass deals out the states, which are saved in its order."""
        return Tile(self.states)

    @property
    def stretch(self) -> int:
        """Tokens written out."""
        return min(STRETCH.get(self.own, 8), self.chunk)

    @property
    def ahead(self) -> int:
        """Tokens by which operands are loaded before they are worked on."""
        return min(AHEAD.get(self.own, 1), self.stretch)

    @property
    def early(self) -> int:
        """Tokens by which decays are made before they are needed."""
        return min(EARLY.get(self.own, 0), self.ahead)

    @property
    def bridged(self) -> bool:
        """Whether the first operands of a chunk are loaded during the one before it."""
        return self.own <= BRIDGED

    @property
    def columns(self) -> int:
        """Threads side by side where work is not shared over states."""
        return THREADS * TOKENS // self.chunk

    @property
    def wide(self) -> int:
        """Channels of each of them."""
        return self.block // self.columns


def slots_of(u, dt, B, C, z, weights, block: int, chunk: int) -> int:
    """Chunks in shared memory."""
    return MOST if forward_bytes(u, dt, B, C, z, weights, block, chunk, MOST) <= SHARED else FEWEST


def workers_of(block: int, states: int, groups: int) -> int:
    """Warpgroups that recur: one for each of several groups; of a single one, as many as its states want."""
    most = lanes.warpgroups(WORKERS)
    if groups > 1:
        return groups if groups <= most else 1
    return min(most, 4, max(1, block * states // (THREADS * HELD[block])))


def shares_of(block: int, states: int, groups: int) -> int:
    """Threads that share the states of a channel and group."""
    return THREADS // block * (1 if groups > 1 else workers_of(block, states, groups))


def affordable(block: int, states: int, groups: int) -> bool:
    """Whether the registers of so many warpgroups hold a thread's states and operands."""
    return groups == 1 or states // shares_of(block, states, groups) <= (16 if groups <= 4 else 8)


def forward_bytes(u, dt, B, C, z, weights, block: int, chunk: int, slots: int = FEWEST) -> int:
    """Shared memory of a block."""
    groups, states = u.shape[2], B.shape[3]
    BC = jax.ShapeDtypeStruct((*B.shape[:3], 2 * states), f32)
    stage = Stage(dict(u=u, dt=dt, BC=BC, z=z, weights=weights, marks=MARKED), chunk, block, groups, slots)
    return stage.bytes() + slots * chunk * groups * block * (2 + shares_of(block, states, groups)) * 4
