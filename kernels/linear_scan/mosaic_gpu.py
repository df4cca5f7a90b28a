"""The linear scan as Pallas Mosaic GPU kernels, for Hopper and later: each array is read or written once.

A thread takes one channel of a sequence through time, with its state in a register. A block is the 128 threads of
neighbouring channels. Copies bring chunks of their inputs to shared memory, several chunks ahead. So the bytes on their
way do not depend on the number of threads, and a GPU needs only about one block for each multiprocessor. Where there
are fewer, time is split into pieces that run in parallel. A first pass then finds what each piece adds, from zero.

The backward pass goes against time with c = exp(log_decay) g, where g is the gradient of a token's state. When it
reaches token t, c is that of token t + 1. So it stores c h_t, the gradient of log_decay_{t+1}, then g_t = dh_t + c.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from seqmodels.kernels import lanes
from seqmodels.kernels.arrays import mapped, pad, round_up
from seqmodels.kernels.interpreter import gpu_interpreter
from seqmodels.kernels.lanes import THREADS, load_vector, store_vector, thread_index
from seqmodels.kernels.pieces import chain_unrolled
from seqmodels.kernels.segments import forget, resets, resets_in_reverse
from seqmodels.kernels.tuning import UNROLLED

f32 = jnp.float32
DTYPES = ("bfloat16", "float16", "float32")
BLOCK = THREADS  # channels
CHUNK = 32  # tokens that are copied together; a row of resets must have 128 bytes
TOGETHER = 16  # tokens that are loaded from shared memory before the first of them is worked on
SHARED = 108 * 1024  # bytes of a block's chunks, so that two blocks share a multiprocessor
SLOTS = 4  # most chunks in shared memory
SHORTEST = 128  # least tokens of a piece
MOST = 32  # most pieces


def supports(
    platform: str,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    accumulator: DTypeLike = "float32",
    named: bool = False,
    **facts: object,
) -> str | None:
    """Why this backend cannot serve the call, or, unless requested by name, why another is faster. None: it can."""
    batch, length, width = shape
    if platform != "cuda" and not gpu_interpreter():
        return "it needs an NVIDIA GPU"
    if length <= UNROLLED and not named:
        return f"T is {length}, and so few tokens are faster in XLA's own fusions than in chunks"
    if (capability := lanes.compute_capability() or 9) < 9:
        return f"it needs an NVIDIA GPU of compute capability 9.0 (Hopper) or later, this one has {capability}"
    if jnp.dtype(dtype).name not in DTYPES:
        return f"x is {jnp.dtype(dtype).name}; it takes {', '.join(DTYPES)}"
    if jnp.dtype(accumulator).name != "float32":
        return f"an argument is {jnp.dtype(accumulator).name}; it computes in float32"
    if min(shape) < 1 or batch * round_up(length, CHUNK * MOST) * round_up(width, BLOCK) >= 2**31:
        return f"x has {batch * length * width} elements; it addresses 1 to 2^31 - 1"
    return None


def linear_scan(
    log_decay: jax.Array,
    x: jax.Array,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    initial_segment: jax.Array | None,
    mask: jax.Array | None,
    *,
    reverse: bool,
) -> tuple[jax.Array, jax.Array]:
    """As `kernels.linear_scan.linear_scan`, with one axis of channels and padding set to zero."""
    batch, length, width = x.shape
    pieces = pieces_of(batch, length, round_up(width, BLOCK))
    tokens = {1: round_up(length, CHUNK * pieces)}
    reset = (resets_in_reverse if reverse else resets)(segment_ids, initial_segment, mask)
    marks = None if reset is None else pad(jnp.where(reset, -1.0, 0.0).astype(f32), tokens)
    wide = {-1: round_up(width, BLOCK)}
    log_decay, x = (pad(v, tokens | wide) for v in (log_decay, x))
    h, state = _scan(reverse, pieces, log_decay, x, pad(initial_state, wide), marks)
    return h[:, :length, :width], state[:, :width]


def pieces_of(batch: int, length: int, width: int) -> int:
    """Pieces of time: 1, unless blocks are so few that most multiprocessors would have none."""
    blocks, count, pieces = batch * width // BLOCK, lanes.processors(), 1
    if 3 * blocks < count:
        while pieces < MOST and blocks * pieces < count and length >= 2 * SHORTEST * pieces:
            pieces *= 2
    return pieces


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(
    reverse: bool, pieces: int, log_decay: jax.Array, x: jax.Array, state: jax.Array, marks: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """h [B, T', D'] and the final state [B, D'], for whole pieces of whole chunks, and whole blocks of channels.

    marks: [B, T'] float32, -1 where a document begins, else 0; or None.
    """
    log_decay, x, marks = cut(log_decay, pieces), cut(x, pieces), None if marks is None else cut(marks, pieces)
    starts = state
    if pieces > 1:
        added, logs = mapped(summary, reverse=reverse, retreat=False)(dict(log_decay=log_decay, x=x, marks=marks))
        starts = chain(state, added, logs, marks, pieces, reverse)
    run = mapped(forward, reverse=reverse)
    h, final = run(dict(log_decay=log_decay, x=x, state=starts, marks=marks))
    return joined(h, pieces), edge(final, pieces, first=reverse)


def _scan_fwd(reverse, pieces, log_decay, x, state, marks):
    h, final = (checkpoint_name(y, "scan") for y in _scan(reverse, pieces, log_decay, x, state, marks))
    return (h, final), (log_decay, h, state, marks)


def _scan_bwd(reverse, pieces, residuals, cotangents):
    log_decay, h, state, marks = residuals
    dh, dfinal = cotangents
    log_decay, h, dh = (cut(v, pieces) for v in (log_decay, h, dh))
    marks = None if marks is None else cut(marks, pieces)
    before, ends = state, dfinal
    if pieces > 1:
        given = dict(log_decay=log_decay, x=dh, marks=marks)
        added, logs = mapped(summary, reverse=not reverse, retreat=True)(given)
        ends = chain(dfinal, added, logs, marks, pieces, not reverse)
        outer = h[:, 0 if reverse else -1].astype(f32).reshape(-1, pieces, h.shape[2])
        around = [outer[:, 1:], state[:, None]] if reverse else [state[:, None], outer[:, :-1]]
        before = jnp.concatenate(around, axis=1).reshape(-1, h.shape[2])
    run = mapped(backward, reverse=not reverse)
    arrays = dict(log_decay=log_decay, h=h, dh=dh, end=ends, before=before, marks=marks)
    dx, dlog_decay, dstart = run(arrays)
    return joined(dlog_decay, pieces), joined(dx, pieces), edge(dstart, pieces, first=not reverse), None


_scan.defvjp(_scan_fwd, _scan_bwd)


def cut(x: jax.Array, pieces: int) -> jax.Array:
    """Split time into pieces, each its own sequence: [B, T, ...] to [B pieces, T / pieces, ...]."""
    return x.reshape(x.shape[0] * pieces, -1, *x.shape[2:])


def joined(x: jax.Array, pieces: int) -> jax.Array:
    """The inverse of `cut`."""
    return x.reshape(x.shape[0] // pieces, -1, *x.shape[2:])


def edge(state: jax.Array, pieces: int, first: bool) -> jax.Array:
    """The states [B, D'] of the first or the last pieces, from [B pieces, D']."""
    return state.reshape(-1, pieces, state.shape[1])[:, 0 if first else -1]


def chain(
    state: jax.Array, added: jax.Array, logs: jax.Array, marks: jax.Array | None, pieces: int, reverse: bool
) -> jax.Array:
    """The state before each piece in the direction of the walk, [B pieces, D'], from `state` [B, D'] before the first.

    added, logs: [B pieces, D'], results of `summary`.
    """
    fresh = None if marks is None else jnp.any(marks < 0, axis=1)
    factors = forget(jnp.exp(logs), fresh)
    factors, added = (x.reshape(-1, pieces, x.shape[1]) for x in (factors, added))
    fresh = None if fresh is None else fresh.reshape(-1, pieces)
    return chain_unrolled(factors, added, state, fresh, reverse).reshape(-1, state.shape[1])


@functools.partial(jax.jit, static_argnames="reverse")  # traced once per shape, not per layer
def forward(
    log_decay: jax.Array, x: jax.Array, state: jax.Array, marks: jax.Array | None, *, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    """h [b, T, D] in x's dtype, and the final state [b, D] float32; T and D whole chunks and blocks.

    Args:
        state: [b, D] float32. marks: [b, T] float32, below 0 where a document begins; or None.
        reverse: whether the walk goes from the last token to the first.
    """
    walk = Walk(dict(log_decay=log_decay, x=x, marks=marks), reverse)

    def body(*refs):
        block, (state_g, h_g, final_g) = walk.bind(refs)

        def tokens(group, h):
            hs = []
            for a, x, mark in zip(group.exps(), group.load("x"), group.marks(), strict=True):
                h = a * kept(h, mark) + x
                hs.append(h)
            for k, h in enumerate(hs):
                store_vector(h_g, group.place, (h,), at=group.row(k))
            return h

        (start,) = load_vector(state_g, block.channel, 1)
        store_vector(final_g, block.channel, (block.walk_chunks(tokens, start),))

    out = (jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct(state.shape, f32))
    return walk.kernel(body, out)(*walk.arrays.values(), state)


@functools.partial(jax.jit, static_argnames=("reverse", "retreat"))
def summary(
    log_decay: jax.Array, x: jax.Array, marks: jax.Array | None, *, reverse: bool, retreat: bool
) -> tuple[jax.Array, jax.Array]:
    """What each sequence adds to the state, from zero, and the sum of its log decays: [b, D] float32 each.

    retreat: whether it is about gradients: a token adds x, and then decays.
    """
    walk = Walk(dict(log_decay=log_decay, x=x, marks=marks), reverse)

    def body(*refs):
        block, (added_g, logs_g) = walk.bind(refs)

        def tokens(group, carry):
            h, total = carry
            logs = group.load("log_decay")
            for log, x, mark in zip(logs, group.load("x"), group.marks(), strict=True):
                h = kept(lanes.exp(log) * (h + x), mark) if retreat else lanes.exp(log) * kept(h, mark) + x
                total = total + log
            return h, total

        (zero,) = lanes.zeros(1)
        for ref, value in zip((added_g, logs_g), block.walk_chunks(tokens, (zero, zero)), strict=True):
            store_vector(ref, block.channel, (value,))

    state = jax.ShapeDtypeStruct((x.shape[0], x.shape[2]), f32)
    return walk.kernel(body, (state, state))(*walk.arrays.values())


@functools.partial(jax.jit, static_argnames="reverse")
def backward(
    log_decay: jax.Array,
    h: jax.Array,
    dh: jax.Array,
    end: jax.Array,
    before: jax.Array,
    marks: jax.Array | None,
    *,
    reverse: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of x [b, T, D] in its dtype, of log_decay, and of the state before the sequence [b, D] float32.

    Args:
        h, dh: [b, T, D] states, and their gradients. marks: as for `forward`.
        end: [b, D] float32, gradient of the final state. before: [b, D] float32, the state before the sequence.
        reverse: the direction of this walk, which is against time.
    """
    walk = Walk(dict(log_decay=log_decay, h=h, dh=dh, marks=marks), reverse)

    def body(*refs):
        block, (end_g, before_g, dx_g, dlog_g, dstart_g) = walk.bind(refs)

        def tokens(group, carry):
            c, held = carry  # held: the mark of the token that c belongs to
            gradients = []
            for a, h, dh, mark in zip(group.exps(), group.load("h"), group.load("dh"), group.marks(), strict=True):
                g = dh + c
                gradients.append((g, kept(c * h, held)))
                c, held = kept(a * g, mark), mark
            for k, (g, dlog) in enumerate(gradients):
                store_vector(dx_g, group.place, (g,), at=group.row(k))
                if k:
                    store_vector(dlog_g, group.place, (dlog,), at=group.row(k - 1))
                else:
                    store_vector(dlog_g, group.place_before, (dlog,))
            return c, held

        (end,) = load_vector(end_g, block.channel, 1)
        c, held = block.walk_chunks(tokens, (end, None if marks is None else f32(0)))
        (before,) = load_vector(before_g, block.channel, 1)
        store_vector(dlog_g, block.last, (kept(c * before, held),))
        store_vector(dstart_g, block.channel, (c,))

    sds = jax.ShapeDtypeStruct
    out = (sds(h.shape, h.dtype), sds(h.shape, log_decay.dtype), sds(end.shape, f32))
    return walk.kernel(body, out)(*walk.arrays.values(), end, before)


def kept(x: jax.Array, mark: jax.Array | None) -> jax.Array:
    """x [128], or zero where a document begins: then x may be infinite or NaN."""
    return x if mark is None else jnp.where(mark < 0, 0, x)


class Walk:
    """How blocks of threads walk through sequences: the arrays over time, by name, and the direction.

    Arrays are [b, T, D], and marks [b, T] or None.
    """

    def __init__(self, arrays: Mapping[str, jax.Array | None], reverse: bool) -> None:
        self.arrays = {name: x for name, x in arrays.items() if x is not None}
        self.reverse = reverse
        self.batch, self.length, self.width = self.arrays["log_decay"].shape
        self.steps = self.length // CHUNK
        size = sum(x.dtype.itemsize * CHUNK * (BLOCK if x.ndim == 3 else 1) for x in self.arrays.values())
        self.slots = max(2, min(SLOTS, SHARED // size))

    def kernel(self, body: Callable[..., None], out: Any) -> Callable[..., Any]:
        """The kernel of a body that gets references to the arrays, to other inputs, to the outputs, and scratch."""
        shapes = [(CHUNK, BLOCK) if x.ndim == 3 else (CHUNK,) for x in self.arrays.values()]
        buffers = [
            plgpu.SMEM((self.slots, *shape), x.dtype) for shape, x in zip(shapes, self.arrays.values(), strict=True)
        ]
        full = plgpu.Barrier(num_arrivals=len(buffers), num_barriers=self.slots)
        return lanes.kernel(
            body,
            out_type=out,
            scratch_types=[*buffers, full],
            grid=(self.batch, self.width // BLOCK),
            grid_names=("b", "e"),
        )

    def bind(self, refs: Sequence[Any]) -> tuple["Block", Sequence[Any]]:
        """Inside the kernel: this block, and the references that are not its own."""
        count = len(self.arrays)
        sources, others, buffers, full = refs[:count], refs[count : -count - 1], refs[-count - 1 : -1], refs[-1]
        names = self.arrays.keys()
        block = Block(self, dict(zip(names, sources, strict=True)), dict(zip(names, buffers, strict=True)), full)
        return block, others


class Block:
    """Inside a kernel: one block of threads.

    Attributes:
        channel: [128] int32, offset of each thread's channel in arrays [b, D].
        last: [128] int32, offset of the walk's last token in arrays [b, T, D].
    """

    def __init__(self, walk: Walk, sources: Mapping[str, Any], buffers: Mapping[str, Any], full: Any) -> None:
        self.walk, self.sources, self.buffers, self.full = walk, sources, buffers, full
        self.b, self.e, self.lane = lax.axis_index("b"), lax.axis_index("e"), thread_index()
        self.channel = self.b * walk.width + self.e * BLOCK + self.lane
        self.last = self.place(0 if walk.reverse else walk.length - 1)

    def place(self, token: Any) -> jax.Array:
        """Offset of a token of the thread's channel in arrays [b, T, D]."""
        return (self.b * self.walk.length + token) * self.walk.width + self.e * BLOCK + self.lane

    def chunk(self, index: jax.Array | int) -> jax.Array | int:
        """Number of the chunk that the walk reaches at step `index`."""
        return self.walk.steps - 1 - index if self.walk.reverse else index

    def start_copy(self, slot: jax.Array | int, index: jax.Array | int) -> None:
        """Start copying the chunk of a step into a slot."""
        time = pl.ds(self.chunk(index) * CHUNK, CHUNK)
        for name, source in self.sources.items():
            part = source.at[self.b, time] if name == "marks" else source.at[self.b, time, pl.ds(self.e * BLOCK, BLOCK)]
            plgpu.copy_gmem_to_smem(part, self.buffers[name].at[slot], self.full.at[slot])

    def walk_chunks(self, tokens: Callable[["Group", Any], Any], carry: Any) -> Any:
        """Apply `tokens(group, carry)` to all groups of tokens in the order of the walk."""
        walk = self.walk
        for index in range(min(walk.slots, walk.steps)):
            self.start_copy(index, index)

        def step(index, carry):
            slot = lax.rem(index, walk.slots)
            plgpu.barrier_wait(self.full.at[slot])
            groups = CHUNK // TOGETHER

            def several(i, carry):
                return tokens(Group(self, slot, index, groups - 1 - i if walk.reverse else i), carry)

            carry = lax.fori_loop(0, groups, several, carry)
            plgpu.commit_smem()  # all threads have finished with this slot
            pl.when(index + walk.slots < walk.steps)(lambda: self.start_copy(slot, index + walk.slots))
            return carry

        return lax.fori_loop(0, walk.steps, step, carry)


class Group:
    """Neighbouring tokens in shared memory; the k-th is the k-th in the order of the walk.

    Attributes:
        place: [128] int32, offset of the earliest of them in arrays [b, T, D]; the others are `row(k)` further on.
        place_before: the offset of the token before the first one in the walk; at the walk's start, of the first one.
    """

    def __init__(self, block: Block, slot: jax.Array, index: jax.Array, number: jax.Array) -> None:
        self.block, self.slot, self.number = block, slot, number
        earliest = block.chunk(index) * CHUNK + number * TOGETHER
        self.place = block.place(earliest)
        reverse, length = block.walk.reverse, block.walk.length
        self.place_before = block.place(
            jnp.minimum(earliest + TOGETHER, length - 1) if reverse else jnp.maximum(earliest - 1, 0)
        )

    def at(self, k: int) -> int:
        """Tokens between the earliest one and the k-th of the walk."""
        return TOGETHER - 1 - k if self.block.walk.reverse else k

    def row(self, k: int) -> int:
        """The same in arrays [b, T, D], as a number of elements."""
        return self.at(k) * self.block.walk.width

    def load(self, name: str) -> list[jax.Array]:
        """The thread's numbers of an array, [128] float32 each."""
        ref, first = self.block.buffers[name].at[self.slot], self.number * (TOGETHER * BLOCK) + self.block.lane
        return [load_vector(ref, first, 1, at=self.at(k) * BLOCK)[0] for k in range(TOGETHER)]

    def exps(self) -> list[jax.Array]:
        """The decays."""
        return [lanes.exp(log) for log in self.load("log_decay")]

    def marks(self) -> list[jax.Array | None]:
        """Scalars, below 0 where a document begins; or None."""
        if "marks" not in self.block.buffers:
            return [None] * TOGETHER
        return [self.block.buffers["marks"][self.slot, self.number * TOGETHER + self.at(k)] for k in range(TOGETHER)]
