"""One warpgroup goes through time with the state [K, 64] of 64 columns of V in its registers.

For each chunk it reads the state, adds the contributions of the chunk's own tokens, and updates the state:

    y_i = rin_i x_i S + sum_j exp2(row_i - col_j) (x_i . k_j) v_j,    S <- keep S + sum_j k_j wout_j v_j^T.

Forwards in time, with queries as x, this is the operation itself. Backwards in time, with keys as x, queries as k and
dy as v, y is the gradient of v, and S is the gradient of the state.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from seqmodels.kernels import lanes
from seqmodels.kernels.linear_attention.mosaic_gpu.tile import SLOTS, decayed, weighted
from seqmodels.kernels.tensor_cores import ROW, SIDE, along, gather, load, products, shared, zeros

VECTORS = 5  # row, column, rin, wout, keep
MEANWHILE = 192  # most rows of the state with registers left to compute weighted values while products run


@functools.partial(jax.jit, static_argnames=("reverse", "strict", "save", "dtype"))  # traced once per shape
def walk(
    x: Array | None,
    k: Array,
    v: Array,
    vectors: Array,
    initial_state: Array,
    *,
    reverse: bool,
    strict: bool,
    save: bool,
    dtype: DTypeLike | None,
) -> tuple[Array | None, Array, Array | None]:
    """Process the chunks of time one after the other.

    Args:
        x: [B, T, Hk, K] reads the state. None: compute only states.
        k: [B, T, Hk, K], v: [B, T, H, V]; T, K and V are multiples of 64.
        vectors: [B, H, T / 64, 5, 64] float32. The last one, keep, is one number repeated 64 times.
        initial_state: [B, S, H, K, V] float32, the state before (with `reverse`, after) each of S equally long
            stretches of time, which run in parallel.
        reverse: go from the last chunk to the first. strict: tokens do not see themselves.
        save: also return the state before each chunk.
        dtype: dtype of y.

    Returns:
        y [B, T, H, V] or None; the state after (with `reverse`, before) each stretch, in the shape of initial_state;
        and the state [B, H, T / 64, K, V] before (with `reverse`, after) each chunk in v's dtype, or None.
    """
    batch, length, key_heads, keys = k.shape
    heads, values = v.shape[2:]
    stretches, reads = initial_state.shape[1], x is not None
    rows = keys if reads else next(r for r in (128, 192, 64) if keys % r == 0)
    plan = Plan(
        keys=keys,
        heads_a_key=heads // key_heads,
        stretches=stretches,
        chunks=length // SIDE // stretches,
        rows=rows,
        reads=reads,
        save=save,
        reverse=reverse,
        strict=strict,
        factors=v.dtype,
        dtype=dtype,
    )

    def body(*refs):
        walk_chunks(bind(plan, refs))

    f32, sds = jnp.float32, jax.ShapeDtypeStruct
    out = [sds(initial_state.shape, f32)]
    if reads:
        out.insert(0, sds(v.shape, dtype))
    if save:
        out.append(sds((batch, heads, length // SIDE, keys, values), v.dtype))
    scratch = [
        shared(SLOTS, SIDE, rows, dtype=k.dtype),
        shared(SLOTS, SIDE, SIDE, dtype=v.dtype),
        shared(SIDE, SIDE, dtype=v.dtype),
        shared(rows, SIDE, dtype=v.dtype),
        plgpu.SMEM((SLOTS, VECTORS, SIDE), f32),
        plgpu.Barrier(num_barriers=SLOTS, num_arrivals=4 if reads else 3),
    ]
    if reads:
        scratch.insert(0, scratch[0])
    kernel = lanes.kernel(
        body,
        out_type=tuple(out),
        scratch_types=scratch,
        grid=(batch * stretches, heads, (keys // rows) * (values // SIDE)),
        grid_names=("bs", "h", "tile"),
    )
    results = list(kernel(*([x] if reads else []), k, v, vectors, initial_state))
    y = results.pop(0) if reads else None
    return y, results[0], results[1] if save else None


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static parameters of a walk.

    Attributes:
        keys: K. heads_a_key: value heads that share a key head. stretches: S. chunks: chunks per stretch.
        rows: rows of the state that one block holds.
        reads: whether there are readouts. save, reverse, strict, dtype: as for `walk`.
        factors: dtype of the factors in products.
    """

    keys: int
    heads_a_key: int
    stretches: int
    chunks: int
    rows: int
    reads: bool
    save: bool
    reverse: bool
    strict: bool
    factors: Any
    dtype: Any

    @property
    def staged(self) -> bool:
        """Whether y is written through shared memory."""
        return self.reads and self.dtype == self.factors

    @property
    def kept(self) -> bool:
        """Whether shared memory holds a copy of the state."""
        return self.save or self.reads


@dataclasses.dataclass(frozen=True)
class Block:
    """Inside the kernel: the plan, the references, and this block's indices.

    Attributes:
        x, k, v, vectors, initial, y, final, saved: references in global memory, or None.
        x_s, k_s, v_s, vectors_s: chunks of them in shared memory; the barriers `full` signal that a slot is filled.
        weighted_s: v times its decays, and later y. state_s: the state, as a factor.
        b, s, h, hk: sequence, stretch, value head and key head. key, value: rows and columns of the state.
    """

    plan: Plan
    x: Any
    k: Any
    v: Any
    vectors: Any
    initial: Any
    y: Any
    final: Any
    saved: Any
    x_s: Any
    k_s: Any
    v_s: Any
    weighted_s: Any
    state_s: Any
    vectors_s: Any
    full: Any
    b: Array
    s: Array
    h: Array
    hk: Array
    key: Any
    value: Any

    def chunk(self, step: Array) -> Array:
        """Index in time of the chunk that is processed at `step`."""
        chunks = self.plan.chunks
        return self.s * chunks + (chunks - 1 - step if self.plan.reverse else step)

    def start_copies(self, step: Array) -> None:
        """Start the copies of a chunk's inputs."""
        slot, n = lax.rem(step, SLOTS), self.chunk(step)
        time = pl.ds(n * SIDE, SIDE)
        copies = [
            (self.k.at[self.b, time, self.hk, self.key], self.k_s),
            (self.v.at[self.b, time, self.h, self.value], self.v_s),
            (self.vectors.at[self.b, self.h, n], self.vectors_s),
        ]
        if self.plan.reads:
            copies.append((self.x.at[self.b, time, self.hk, self.key], self.x_s))
        for source, buffer in copies:
            plgpu.copy_gmem_to_smem(source, buffer.at[slot], self.full.at[slot])

    def y_of(self, step: Array) -> tuple:
        """Indices of a chunk's y."""
        return self.b, pl.ds(self.chunk(step) * SIDE, SIDE), self.h, self.value


def bind(plan: Plan, refs: tuple) -> Block:
    """The references in the order of the kernel's arguments, outputs and scratch, by name."""
    left = list(refs)

    def take(given: bool = True) -> Any:
        return left.pop(0) if given else None

    x, k, v, vectors, initial = take(plan.reads), take(), take(), take(), take()
    y, final, saved = take(plan.reads), take(), take(plan.save)
    given: Any = (x, k, v, vectors, initial, y, final, saved, take(plan.reads), *left)
    b, s = lax.div(lax.axis_index("bs"), plan.stretches), lax.rem(lax.axis_index("bs"), plan.stretches)
    h, hk = lax.axis_index("h"), lax.div(lax.axis_index("h"), plan.heads_a_key)
    tile, tiles = lax.axis_index("tile"), plan.keys // plan.rows
    key = pl.ds(lax.rem(tile, tiles) * plan.rows, plan.rows)
    value = pl.ds(lax.div(tile, tiles) * SIDE, SIDE)
    place: Any = (b, s, h, hk, key, value)
    return Block(plan, *given, *place)


def walk_chunks(block: Block) -> None:
    """Process the chunks of a stretch, from its initial state to the state after it."""
    plan = block.plan
    for first in range(min(SLOTS, plan.chunks)):
        block.start_copies(jnp.int32(first))
    state = gather(block.initial.at[block.b, block.s, block.h, block.key, block.value])
    if plan.kept:
        block.state_s[...] = state.astype(plan.factors)
        plgpu.commit_smem()
    state = lax.fori_loop(0, plan.chunks, functools.partial(walk_chunk, block), state)
    block.final[block.b, block.s, block.h, block.key, block.value] = state
    plgpu.wait_smem_to_gmem(0)


def walk_chunk(block: Block, step: Array, state: Array) -> Array:
    """Process one chunk: store its y, save the state before it, and return the state after it."""
    plan, slot = block.plan, lax.rem(step, SLOTS)
    plgpu.barrier_wait(block.full.at[slot])
    if plan.save:
        saved = block.saved.at[block.b, block.h, block.chunk(step), block.key, block.value]
        plgpu.copy_smem_to_gmem(block.state_s, saved)
    weight = along(load(block.vectors_s.at[slot, 3], ROW), 0, (SIDE, SIDE))
    weigh = functools.partial(weigh_values, block, slot, weight)
    state = weighted(state, block.vectors_s[slot, 4, 0])
    if plan.reads:
        state = read_and_update(block, step, slot, weigh, state)
    else:
        state = update(block, slot, weigh, state)
        if plan.save:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    if plan.kept:
        block.state_s[...] = state.astype(plan.factors)
    plgpu.commit_smem()
    if plan.staged:
        plgpu.copy_smem_to_gmem(block.weighted_s, block.y.at[block.y_of(step)])
    pl.when(step + SLOTS < plan.chunks)(lambda: block.start_copies(step + SLOTS))
    return state


def weigh_values(block: Block, slot: Array, weight: Array) -> None:
    """weighted_s <- wout_j v_j."""
    if block.plan.reads:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # y of the previous chunk has been copied from weighted_s
    block.weighted_s[...] = (load(block.v_s.at[slot]) * weight).astype(block.plan.factors)


def update(block: Block, slot: Array, weigh: Any, state: Array) -> Array:
    """The state after a chunk, from `state`, which is decayed already."""
    keys_s = block.k_s.at[slot].transpose((1, 0))
    weigh()
    plgpu.commit_smem()
    (state,) = products((state, (keys_s, block.weighted_s)))
    return state


def read_and_update(block: Block, step: Array, slot: Array, weigh: Any, state: Array) -> Array:
    """As `update`, and computes the chunk's y, which is stored or, if it is staged, left in weighted_s."""
    plan = block.plan
    keys_s = block.k_s.at[slot].transpose((1, 0))
    if plan.rows > MEANWHILE:
        weigh()
    scores, y = products(
        (zeros(SIDE, SIDE), (block.x_s.at[slot], keys_s)),
        (zeros(SIDE, SIDE), (block.x_s.at[slot], block.state_s)),
        meanwhile=weigh if plan.rows <= MEANWHILE else lambda: None,
    )
    scores = decayed(scores, block.vectors_s, slot, plan.reverse, plan.strict).astype(plan.factors)
    y = weighted(y, along(load(block.vectors_s.at[slot, 2], ROW), 0, (SIDE, SIDE)))
    plgpu.commit_smem()
    y, state = products((y, (scores, block.v_s.at[slot])), (state, (keys_s, block.weighted_s)))
    if plan.staged:
        plgpu.commit_smem()  # all warps have read weighted_s
        block.weighted_s[...] = y.astype(plan.dtype)
    else:
        block.y[block.y_of(step)] = y.astype(plan.dtype)
    return state
