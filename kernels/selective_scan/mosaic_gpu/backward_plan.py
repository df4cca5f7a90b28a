"""How the selective scan's backward pass divides a block of channels: sizes, parts of a chunk, shared memory."""

import dataclasses

import jax
import jax.numpy as jnp

from seqmodels.kernels.selective_scan.mosaic_gpu.stage import MARKED, Stage
from seqmodels.kernels.selective_scan.mosaic_gpu.tile import CHANNELS, STATES, Tile

SLOTS = 3  # chunks of inputs in shared memory
AHEAD = 3  # chunks of dt, dt u and dy in shared memory
PART = 4  # tokens whose states a thread holds in registers, and whose sums are written to shared memory together
BUFFERS = 2  # parts whose sums are in shared memory


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static parameters of a backward pass: sizes, and where a token's sums are in shared memory.

    The sums of a token form a row. First come the sums over states: for each share, the block's channels and a gap that
    avoids bank conflicts. Then come the sums over channels: for each share and row of the tile, 4 states.

    Attributes:
        length, groups, padded: T, G, E' of `backward`. saved_steps: chunks whose states were saved.
        chunk, softplus: as for `backward`.
        readout: whether a gradient (of z or weights) needs each group's readout.
    """

    tile: Tile
    length: int
    groups: int
    padded: int
    saved_steps: int
    chunk: int
    softplus: bool
    readout: bool

    @property
    def states(self) -> int:
        """N."""
        return self.tile.states

    @property
    def block(self) -> int:
        """Channels per block."""
        return self.tile.channels

    @property
    def blocks(self) -> int:
        """Blocks of a group's channels."""
        return self.padded // self.block

    @property
    def steps(self) -> int:
        """Chunks."""
        return -(-self.length // self.chunk)

    @property
    def parts(self) -> range:
        """Parts of a chunk, from the last to the first."""
        return range(self.chunk // PART)

    @property
    def saved_channel(self) -> int:
        """Distance between the states of a thread's two channels in the saved states, in numbers."""
        return self.tile.shares * self.tile.rows * STATES

    @property
    def channel_share(self) -> int:
        """Size of a share in the sums over states, in numbers."""
        return self.block + self.tile.neighbours * CHANNELS

    @property
    def state_share(self) -> int:
        """Size of a share in the sums over channels, in numbers."""
        return self.tile.rows * STATES

    @property
    def by_states(self) -> int:
        """Offset of the sums over channels in a token's row."""
        return (2 + self.readout) * self.tile.shares * self.channel_share

    @property
    def row(self) -> int:
        """Size of a token's row, in numbers."""
        return row_bytes(self.tile, self.readout) // 4

    def tokens(self, part: int) -> range:
        """Tokens of a part, as indices in its chunk."""
        end = self.chunk - part * PART
        return range(end - PART, end)


def row_bytes(tile: Tile, readout: bool) -> int:
    """Bytes of shared memory for a token's sums."""
    by_channel = (2 + readout) * tile.shares * (tile.channels + tile.neighbours * CHANNELS)
    return (by_channel + 2 * tile.states * tile.rows) * 4


def backward_bytes(
    u: jax.Array,
    dt: jax.Array,
    B: jax.Array,
    C: jax.Array,
    z: jax.Array | None,
    weights: jax.Array | None,
    states: int,
    chunk: int,
) -> int:
    """Bytes of shared memory per block."""
    tile = Tile(states)
    dy = jax.ShapeDtypeStruct((*u.shape[:2], u.shape[3]), u.dtype)
    arrays = dict(u=u, dt=dt, B=B, C=C, dy=dy, z=z, weights=weights, marks=MARKED)
    inputs = Stage(arrays, chunk, tile.channels, groups=1, slots=SLOTS).bytes()
    return inputs + AHEAD * 3 * chunk * tile.channels * 4 + BUFFERS * PART * row_bytes(tile, True)


def output_shapes(
    plan: Plan, u: jax.Array, dt: jax.Array, z: jax.Array | None, weights: jax.Array | None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the kernel's results, by name; see `backward`."""
    sds, f32 = jax.ShapeDtypeStruct, jnp.float32
    batch, groups, padded, states = u.shape[0], plan.groups, plan.padded, plan.states
    time, sums = plan.steps * plan.chunk, plan.tile.tokens(PART)
    out = dict(
        du=sds((batch, time, groups, padded), u.dtype),
        ddt=sds((batch, time, groups, padded), dt.dtype),
        dA=sds((batch, groups, padded, states), f32),
        dBC=sds((batch, plan.blocks, time, groups, 2, states), f32),
        dD=sds((batch, sums, groups, padded), f32),
        dbias=sds((batch, sums, groups, padded), f32),
        dz=sds((batch, time, groups, padded), z.dtype) if z is not None else None,
        dweights=sds((batch, time, groups - 1, padded), weights.dtype) if weights is not None else None,
        dinitial=sds((batch, groups, padded, states), f32),
    )
    return {name: x for name, x in out.items() if x is not None}
