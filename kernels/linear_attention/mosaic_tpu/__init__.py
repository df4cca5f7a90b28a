"""Linear attention as two Pallas TPU kernels, forward and backward, whose products run on the matrix unit.

The grid of a kernel is (sequence, group of heads, chunk of time, heads of the group), heads innermost. Products of
queries and keys are computed once per chunk for all heads that share them. The gradients of both are summed over these
heads in VMEM. The states [K, V] of a group's heads stay in VMEM from chunk to chunk. Each step of the grid processes a
few heads together: the products of one head hide the latencies of the others.

XLA computes from the log decays a few rows of numbers for each chunk: see `chunk_rows`. From these rows a kernel
computes the decay between any two tokens of the chunk, as a sum over only the tokens between them.

The forward kernel writes the states at the start of each chunk. The backward kernel reads them and goes through the
chunks from the last to the first.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from seqmodels.kernels.arrays import pad, round_up
from seqmodels.kernels.finite import finite_or_zero, spoil
from seqmodels.kernels.interpreter import tpu_interpreter
from seqmodels.kernels.isolate import isolate
from seqmodels.kernels.linear_attention.mosaic_tpu import backward, forward
from seqmodels.kernels.linear_attention.mosaic_tpu.decays import ROWS, chunk_rows
from seqmodels.kernels.linear_attention.xla import factors_dtype
from seqmodels.kernels.segments import resets

TOKENS = 128  # per chunk: the side of the matrix unit
TOGETHER = 8  # most heads per step of the grid
FACTORS = 16  # K and V are padded to multiples of this: whole registers of bfloat16
VMEM_LIMIT = 48 * 2**20  # bytes; a core has 64 MiB in a v5p, 128 MiB in a v5e or v6e


class Options(NamedTuple):
    """Static options. packed: whether there are resets."""

    scale: float
    read: str
    packed: bool
    dtype: jnp.dtype


def supports(
    *, platform: str, shape: tuple[int, ...], dtype: DTypeLike, decay: str, chunk: int | None, **facts: object
) -> str | None:
    """Supports TPUs if all channels of a head share one decay and the states of a group's heads fit into VMEM."""
    if platform != "tpu" and not tpu_interpreter():
        return f"it needs a TPU; the platform is {platform}"
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"it takes float32, bfloat16 and float16; the dtype is {jnp.dtype(dtype).name}"
    if decay == "channel":
        return "it takes decays of heads; these are of channels"
    if chunk not in (None, TOKENS):
        return f"its chunks have {TOKENS} tokens; asked for are {chunk}"
    _, _, groups, heads, keys, values = shape
    need = backward_vmem(heads // groups, keys, values)
    return f"its states need {need >> 20} MiB of VMEM; {VMEM_LIMIT >> 20} are allowed" if need > VMEM_LIMIT else None


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None,
    bonus: jax.Array | None,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    initial_segment: jax.Array | None,
    mask: jax.Array | None,
    *,
    scale: float,
    read: str,
    chunk: int | None,
    dtype: DTypeLike,
) -> tuple[jax.Array, jax.Array]:
    """As `kernels.linear_attention.linear_attention`, with padding set to zero and the normaliser as a column of v.

    y is in `dtype`.
    """
    (batch, length, heads, values), (groups, keys) = v.shape, k.shape[2:]
    each, factors = heads // groups, factors_dtype(q, k, v)
    reset = resets(segment_ids, initial_segment, mask)
    q, (k, v), log_decay, spoilt = isolate(q, (k, v), log_decay, reset)
    whole = dict(T=round_up(length, TOKENS), K=round_up(keys, FACTORS), V=round_up(values, FACTORS))

    def fill_up(x, axes):
        """Pad to whole chunks and registers."""
        return pad(x, {i: whole[axis] for i, axis in enumerate(axes) if axis in whole})

    def by_group(x):  # [B, T, G, K] to [B, G, T, K]
        return fill_up(jnp.swapaxes(x, 1, 2).astype(factors), "BGTK")

    def by_head(x):  # [B or 1, T, H, ...] to [B or 1, G, R, T, ...]
        x = x.reshape(*x.shape[:2], groups, each, *x.shape[3:])
        return jnp.moveaxis(x, 1, 3)

    if log_decay is None:  # axes of size one are broadcast over rows and heads
        decay = jnp.zeros((1, 1, 1, length))
    elif log_decay.ndim == 1:
        decay = jnp.broadcast_to(log_decay.reshape(1, groups, each, 1), (1, groups, each, length))
    else:
        decay = by_head(log_decay)
    arrays = dict(
        q=by_group(q),
        k=by_group(k),
        v=fill_up(by_head(v).astype(factors), "BGRTV"),
        rows=chunk_rows(
            fill_up(decay.astype(jnp.float32), "BGRT"), None if reset is None else fill_up(reset, "BT"), read, TOKENS
        ),
        state=fill_up(initial_state.astype(jnp.float32).reshape(batch, groups, each, keys, values), "BGRKV"),
    )
    own = None if bonus is None else _own(q, k, v, bonus, scale)
    # adding rounded numbers would round twice
    inside = jnp.float32 if own is not None or dtype == jnp.float16 else jnp.dtype(dtype)
    y, state = _attend(Options(scale, read, reset is not None, inside), arrays)
    y = jnp.moveaxis(y[..., :length, :values], 3, 1).reshape(v.shape)
    y = y if own is None else y + own
    y, state = y.astype(dtype), state[..., :keys, :values].reshape(batch, heads, keys, values)
    return (y, state) if spoilt is None else (spoil(y, spoilt.reads), spoil(state, spoilt.writes[:, -1]))


def _own(q, k, v, bonus, scale):
    """The contribution of the bonus to each token's own output, [B, T, H, V] float32. It needs no recurrence."""
    groups = k.shape[2]
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    bonus = bonus.astype(jnp.float32).reshape(groups, -1, k.shape[3])
    weight = scale * jnp.einsum("btgn,grn,btgn->btgr", q, bonus, k, precision="highest")
    return weight.reshape(*v.shape[:3], 1) * v


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, arrays):
    """y [B, G, R, T, V] and the final state [B, G, R, K, V].

    Args:
        arrays: q, k [B, G, T, K], v [B, G, R, T, V], rows [B or 1, G or 1, R or 1, N, ROWS, C] made by `chunk_rows`,
            and state [B, G, R, K, V] float32.
    """
    out = _forward(options, arrays, for_gradient=False)
    return out["y"], out["state"]


def _attend_fwd(options, arrays):
    out = _forward(options, arrays, for_gradient=True)
    return (out["y"], out["state"]), (arrays, out["start"])


def _attend_bwd(options, residuals, cotangents):
    (arrays, start), (dy, dstate) = residuals, cotangents
    if not options.packed:
        return (_backward(options, arrays, start, dy, dstate),)
    gradients = _backward(options, arrays, start, finite_or_zero(dy), dstate)
    # so that a gradient that is not finite does not go unnoticed; dq is [B, G, T, K]
    bad = jnp.any(~jnp.isfinite(dy), axis=(1, 2, 4))[:, None, :, None]
    return (gradients | dict(q=jnp.where(bad, jnp.nan, gradients["q"])),)


_attend.defvjp(_attend_fwd, _attend_bwd)

# Axes of every input and output. B, G, R, T, K, V are as elsewhere; N: chunks; 8 and C: the axes of a chunk's rows.
# F and L replace R if only the first or the last visited chunk needs the array. A block has a few heads.
AXES = dict(
    q="BGTK", k="BGTK", v="BGRTV", rows="BGRN8C", state="BGFKV", start="BGRNKV", y="BGRTV", dy="BGRTV", dstate="BGFKV"
)
OUTPUT_AXES = AXES | dict(state="BGLKV")


def _specs(arrays, axes, grid, heads, reverse):
    """The block of each array of a dict at each step of the grid (sequence, group, chunk, block of heads)."""
    _, _, chunks, blocks = grid

    def spec(name, shape):
        def index(b, g, n, r):
            time = chunks - 1 - n if reverse else n
            first, last = jnp.where(n == 0, r, blocks - 1), jnp.where(n == chunks - 1, r, 0)
            place = dict(B=b, G=g, R=r, F=first, L=last, N=time, T=time)
            return tuple(0 if size == 1 else place.get(axis, 0) for axis, size in zip(axes[name], shape, strict=True))

        sizes = dict.fromkeys("BGN") | dict.fromkeys("RFL", heads) | dict(T=TOKENS)
        block = tuple(sizes.get(axis, n) for axis, n in zip(axes[name], shape, strict=True))
        return pl.BlockSpec(tuple(n and min(n, size) for n, size in zip(block, shape, strict=True)), index)

    return {name: None if x is None else spec(name, x.shape) for name, x in arrays.items()}


def together(heads: int, keys: int, values: int) -> int:
    """Heads per step of the grid: a divisor of the number of heads in a group."""
    most = min(TOGETHER, max(1, 2**17 // (keys * values)))  # large products alone keep the matrix unit busy
    return max(n for n in range(1, most + 1) if heads % n == 0)


def backward_vmem(heads: int, keys: int, values: int) -> int:
    """Bytes of VMEM for the backward kernel, which needs more: scratch, two buffers per block, and temporaries."""
    keys, values = round_up(keys, FACTORS), round_up(values, TOKENS)
    state, lanes = keys * values, round_up(keys, TOKENS)
    scratch = heads * state + 2 * TOKENS * (TOKENS + lanes)
    blocks = 3 * state + TOKENS * 3 * values + 2 * ROWS * TOKENS
    between = 8 * TOKENS * TOKENS + 4 * TOKENS * (lanes + values) + 3 * state
    return 4 * (scratch + 8 * TOKENS * lanes + together(heads, keys, values) * (2 * blocks + between))


def _run(name, kernel, arrays, outputs, scratch, reverse=False):
    """Call a kernel on dicts of arrays. `outputs` and `scratch` give shapes and dtypes."""
    batch, groups, all_heads, length, values = arrays["v"].shape
    heads = together(all_heads, arrays["k"].shape[-1], values)
    grid = batch, groups, length // TOKENS, all_heads // heads
    call = pl.pallas_call(
        kernel,
        name=name,
        grid=grid,
        in_specs=[_specs(arrays, AXES, grid, heads, reverse)],
        out_specs=_specs(outputs, OUTPUT_AXES, grid, heads, reverse),
        out_shape=outputs,
        scratch_shapes=[{k: pltpu.VMEM(shape, jnp.float32) for k, shape in scratch.items()}],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=tpu_interpreter(),
    )
    # Pallas's own rule for vmap adds an axis to the grid but not to dimension_semantics
    return jax.custom_batching.sequential_vmap(call)(arrays)


def _blocks_of_heads(state):
    """Shape of the states of all heads of a group, with one axis for the steps of the grid."""
    heads = together(*state[2:])
    return state[2] // heads, heads, *state[3:]


def _forward(options, arrays, for_gradient):
    """y, the last state, and with `for_gradient` the states at the chunks' starts [B, G, R, N, K, V]."""
    state, chunks = arrays["state"].shape, arrays["rows"].shape[3]
    start = jax.ShapeDtypeStruct((*state[:3], chunks, *state[3:]), jnp.float32) if for_gradient else None
    outputs = dict(
        y=jax.ShapeDtypeStruct(arrays["v"].shape, options.dtype),
        state=jax.ShapeDtypeStruct(state, jnp.float32),
        start=start,
    )
    scratch = dict(state=_blocks_of_heads(state), products=(TOKENS, TOKENS))
    kernel = functools.partial(forward.kernel, options=options)
    return _run("linear_attention_forward", kernel, arrays, outputs, scratch)


def _backward(options, arrays, start, dy, dstate):
    """Gradients of `arrays` by name."""
    rows = arrays["rows"].shape
    outputs = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}
    outputs["rows"] = jax.ShapeDtypeStruct((*arrays["v"].shape[:3], *rows[3:]), jnp.float32)
    scratch = dict(
        dstate=_blocks_of_heads(arrays["state"].shape),
        products=(TOKENS, TOKENS),
        dproducts=(TOKENS, TOKENS),
        dq=(TOKENS, arrays["q"].shape[-1]),
        dk=(TOKENS, arrays["q"].shape[-1]),
    )
    kernel = functools.partial(backward.kernel, options=options)
    inputs = {name: x for name, x in arrays.items() if name != "state"} | dict(start=start, dy=dy, dstate=dstate)
    gradients = _run("linear_attention_backward", kernel, inputs, outputs, scratch, reverse=True)
    shared = tuple(axis for axis, size in enumerate(rows[:3]) if size == 1)
    return gradients | dict(rows=jnp.sum(gradients["rows"], axis=shared, keepdims=True))
