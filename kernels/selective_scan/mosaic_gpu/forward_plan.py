"""How the selective scan's forward pass divides a block of channels: sizes, threads, shared memory."""

import dataclasses

import jax
import jax.numpy as jnp

from seqmodels.kernels import lanes
from seqmodels.kernels.lanes import THREADS
from seqmodels.kernels.selective_scan.mosaic_gpu.stage import MARKED, SHARED, Stage
from seqmodels.kernels.selective_scan.mosaic_gpu.tile import STATES, Tile

f32 = jnp.float32
MOST, FEWEST = 4, 3  # chunks in shared memory: MOST if they fit
WORKERS = 5  # most warpgroups that run the recurrence
TOKENS = 4  # tokens of a channel that are adjacent in shared memory
HELD = {128: 8, 64: 8, 32: 4, 16: 2}  # states of a channel per thread, by channels per block; see WORKERS
# By states per thread: how many tokens ahead operands are loaded, and how many tokens are unrolled
AHEAD, STRETCH = {1: 8, 2: 8, 4: 4, 8: 4, 16: 1}, {1: 64, 2: 64, 4: 16, 8: 16, 16: 8}
EARLY = {1: 1, 2: 2, 4: 2, 8: 1, 16: 1}  # how many tokens ahead decays are computed
BRIDGED = 8  # with at most so many states per thread, a chunk's first operands are loaded during the previous chunk


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static parameters of a forward pass: sizes, and how a block of channels is assigned to its threads.

    Attributes:
        batch, length, groups, padded, states: b, T, G, E', N of `forward`.
        block, chunk, save, softplus: as for `forward`.
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
        """Warpgroups that run the recurrence."""
        return workers_of(self.block, self.states, self.groups)

    @property
    def of_worker(self) -> int:
        """Groups per such warpgroup."""
        return -(-self.groups // self.workers)

    @property
    def shares(self) -> int:
        """Threads that share the states of a channel and group."""
        return shares_of(self.block, self.states, self.groups)

    @property
    def own(self) -> int:
        """States per thread."""
        return self.states // self.shares

    @property
    def vector(self) -> int:
        """States that are loaded together."""
        return min(self.own, STATES)

    @property
    def tile(self) -> Tile:
        """How the backward pass assigns the states to threads. They are saved in that order."""
        return Tile(self.states)

    @property
    def stretch(self) -> int:
        """Tokens that are unrolled."""
        return min(STRETCH.get(self.own, 8), self.chunk)

    @property
    def ahead(self) -> int:
        """How many tokens ahead operands are loaded."""
        return min(AHEAD.get(self.own, 1), self.stretch)

    @property
    def early(self) -> int:
        """How many tokens ahead decays are computed."""
        return min(EARLY.get(self.own, 0), self.ahead)

    @property
    def bridged(self) -> bool:
        """Whether the first operands of a chunk are loaded during the previous chunk."""
        return self.own <= BRIDGED

    @property
    def columns(self) -> int:
        """Threads along the channels where the states of a channel are not split over threads."""
        return THREADS * TOKENS // self.chunk

    @property
    def wide(self) -> int:
        """Channels of each of these threads."""
        return self.block // self.columns


def slots_of(
    u: jax.Array,
    dt: jax.Array,
    B: jax.Array,
    C: jax.Array,
    z: jax.Array | None,
    weights: jax.Array | None,
    block: int,
    chunk: int,
) -> int:
    """Chunks in shared memory."""
    return MOST if forward_bytes(u, dt, B, C, z, weights, block, chunk, MOST) <= SHARED else FEWEST


def workers_of(block: int, states: int, groups: int) -> int:
    """Warpgroups that run the recurrence: one for each of several groups; for a single group, as its states need."""
    most = lanes.warpgroups(WORKERS)
    if groups > 1:
        return groups if groups <= most else 1
    return min(most, 4, max(1, block * states // (THREADS * HELD[block])))


def shares_of(block: int, states: int, groups: int) -> int:
    """Threads that share the states of a channel and group."""
    return THREADS // block * (1 if groups > 1 else workers_of(block, states, groups))


def affordable(block: int, states: int, groups: int) -> bool:
    """Whether the states and operands of every thread fit into registers with this number of warpgroups."""
    return groups == 1 or states // shares_of(block, states, groups) <= (16 if groups <= 4 else 8)


def forward_bytes(
    u: jax.Array,
    dt: jax.Array,
    B: jax.Array,
    C: jax.Array,
    z: jax.Array | None,
    weights: jax.Array | None,
    block: int,
    chunk: int,
    slots: int = FEWEST,
) -> int:
    """Bytes of shared memory per block."""
    groups, states = u.shape[2], B.shape[3]
    BC = jax.ShapeDtypeStruct((*B.shape[:3], 2 * states), f32)
    stage = Stage(dict(u=u, dt=dt, BC=BC, z=z, weights=weights, marks=MARKED), chunk, block, groups, slots)
    return stage.bytes() + slots * chunk * groups * block * (2 + shares_of(block, states, groups)) * 4
