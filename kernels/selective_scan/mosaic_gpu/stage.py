"""Copies of a block's inputs to shared memory: chunk by chunk, several chunks at a time."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from seqmodels.kernels import lanes
from seqmodels.kernels.lanes import Lanes, load_vector

SHARED = 226 * 1024  # bytes of shared memory that a block may take, barriers aside
MARKS = 8  # numbers per token in `marks`, because copies must be multiples of 128 bytes
MARKED = jax.ShapeDtypeStruct((1, 1, MARKS), jnp.float32)


def marks(reset: Any, mask: jax.Array | None, length: int) -> jax.Array | None:
    """Documents and padding as the kernels read them: [b, length, 8] float32, or None if there are neither.

    Column 0 is -1 where a document begins, else 0; see `kept`. Column 1 is 0 on padding, else 1.
    reset, mask: [b, T] bool or None, T <= length.
    """
    if reset is None and mask is None:
        return None
    shape = (reset if mask is None else mask).shape
    columns = [jnp.zeros(shape) if reset is None else jnp.where(reset, -1.0, 0.0)]
    columns.append(jnp.ones(shape) if mask is None else mask)
    both = jnp.stack([c.astype(jnp.float32) for c in columns], axis=-1)
    return jnp.pad(both, ((0, 0), (0, length - shape[1]), (0, MARKS - 2)))


class Stage:
    """Chunks of the inputs in shared memory.

    Args:
        arrays: by name: u, dt, weights [b, T, G, E]; z, dy [b, T, E]; B, C [b, T, G, N]; BC [b, T, G, 2 N];
            marks [b, T', 8]. Entries that are None are left out.
        chunk: tokens. block: channels.
        groups: groups in a slot: all, or 1 for one after another.
        slots: chunks in shared memory at a time.
    """

    def __init__(self, arrays: Mapping[str, Any], chunk: int, block: int, groups: int, slots: int) -> None:
        self.arrays = {name: x for name, x in arrays.items() if x is not None}
        self.chunk, self.block, self.groups, self.slots = chunk, block, groups, slots

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def scratch(self) -> list[Any]:
        """Scratch that `plgpu.kernel` allocates: buffers, and barriers that signal when a slot is full."""
        buffers = [plgpu.SMEM((self.slots, *self._shape(name)), x.dtype) for name, x in self.arrays.items()]
        return [*buffers, plgpu.Barrier(num_arrivals=len(buffers), num_barriers=self.slots)]

    def bytes(self) -> int:
        """Bytes of shared memory for the buffers."""
        return sum(self.slots * math.prod(self._shape(name)) * x.dtype.itemsize for name, x in self.arrays.items())

    def bind(self, sources: Sequence[Any], scratch: Sequence[Any], b: jax.Array, e: jax.Array) -> None:
        """Inside the kernel: set the references of the arrays and of `scratch`, and the block's indices."""
        *buffers, self.full = scratch
        self.sources, self.buffers = dict(zip(self.arrays, sources)), dict(zip(self.arrays, buffers))
        self.b, self.e = b, e

    def start_copy(self, slot: jax.Array | int, index: jax.Array, group: jax.Array | int = 0) -> None:
        """Start copying chunk `index` into a slot."""
        time, channels = pl.ds(index * self.chunk, self.chunk), pl.ds(self.e * self.block, self.block)
        for name in self.arrays:
            source = self.sources[name]
            if name in ("u", "dt", "weights"):
                source = source.at[self.b, time, self._groups(name, group), channels]
            elif name in ("B", "C", "BC"):
                source = source.at[self.b, time, self._groups(name, group)]
            elif name in ("z", "dy"):
                source = source.at[self.b, time, channels]
            else:
                source = source.at[self.b, time]
            plgpu.copy_gmem_to_smem(source, self.buffers[name].at[slot], self.full.at[slot])

    def wait(self, slot: jax.Array | int) -> None:
        plgpu.barrier_wait(self.full.at[slot])

    def load_vector(
        self,
        name: str,
        slot: jax.Array | int,
        token: jax.Array | int,
        offset: jax.Array | int,
        width: int,
        group: int = 0,
        ahead: int = 0,
    ) -> Lanes:
        """`width` numbers of `name` per thread, from `offset` on in the row of a token (and group), `ahead` rows on."""
        _, *inner = self._shape(name)
        row = math.prod(inner)
        group = min(group, inner[0] - 1) * inner[-1] if len(inner) == 2 else 0
        return load_vector(self.buffers[name].at[slot], token * row + offset, width, at=ahead * row + group)

    def reset(self, slot: jax.Array | int, t: jax.Array | int) -> jax.Array:
        """Column 0 of `marks` at token t: a scalar, below 0 where a document begins."""
        return self.buffers["marks"][slot, t, 0]

    def real(self, slot: jax.Array | int, token: jax.Array, index: jax.Array, length: int) -> jax.Array | None:
        """[128] bool: tokens that are neither padding nor past the end. None: all tokens are real."""
        valid = token + index * self.chunk < length if length % self.chunk else None
        if "marks" in self:
            mark = self.load_vector("marks", slot, token, 1, 1)[0] > 0
            valid = mark if valid is None else mark & valid
        return valid

    def _groups(self, name, group):
        if self.groups > 1:
            return pl.ds(0, self.arrays[name].shape[2])
        if name == "weights":
            group = jnp.clip(group - 1, 0, self.arrays[name].shape[2] - 1)
        return pl.ds(group, 1)

    def _shape(self, name):
        x = self.arrays[name]
        if name in ("u", "dt", "weights", "B", "C", "BC"):
            groups = x.shape[2] if self.groups > 1 else 1
            return self.chunk, groups, self.block if name in ("u", "dt", "weights") else x.shape[3]
        return self.chunk, MARKS if name == "marks" else self.block


def kept(state: Sequence[jax.Array], reset: jax.Array | None) -> Lanes:
    """Numbers of the state [128] each, or zeros where a document begins: then the state may be infinite or NaN.

    reset: result of `Stage.reset`, or None if there are no marks.
    """
    return tuple(state) if reset is None else tuple(jnp.where(reset < 0, 0, s) for s in state)


def prepare(
    stage: Stage,
    slot: jax.Array | int,
    index: jax.Array,
    tokens: Sequence[jax.Array],
    offset: jax.Array,
    bias: Lanes,
    softplus: bool,
    length: int,
    group: int = 0,
) -> list[tuple[jax.Array, Lanes]]:
    """The steps dt of a chunk, float32, zero on padding. softplus is computed once per channel, not once per state.

    Args:
        tokens: [128] int32 each. offset: [128] int32, first of the thread's channels in the block. bias: of each
            channel.

    Returns:
        List of (token, dt), one for each of `tokens`. Everything is loaded before anything is used.
    """
    loaded = [
        (stage.load_vector("dt", slot, t, offset, len(bias), group), stage.real(slot, t, index, length)) for t in tokens
    ]
    out = []
    for token, (dt, real) in zip(tokens, loaded):
        dt = tuple(d + o for d, o in zip(dt, bias))
        dt = tuple(lanes.softplus(d) for d in dt) if softplus else dt
        out.append((token, dt if real is None else tuple(jnp.where(real, d, 0) for d in dt)))
    return out
