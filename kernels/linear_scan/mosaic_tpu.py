"""The linear scan as two Pallas TPU kernels, forward and backward: each array is read or written once.

The grid is (sequence, block of channels, chunk of time), time innermost, so the state of a block stays in VMEM from
chunk to chunk. Decays and inputs of a chunk are first put into scratch in float32, tile by tile. Then the chunk is
walked token by token, where a token is one row. Last, the rows are written, tile by tile. A decay is never negative, so
-1 in its place says that a document begins.

The backward kernel walks against time with c = exp(log_decay) g, where g is the gradient of a token's state. Its states
have the state before the chunk in front of them, in windows that are one register wide: there a load at any row is a
plain load, so the last pass reads h_{t-1} one row earlier.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from seqmodels.kernels.arrays import pad, round_up
from seqmodels.kernels.interpreter import tpu_interpreter
from seqmodels.kernels.segments import resets, resets_in_reverse

f32 = jnp.float32
LANES, SUBLANES = 128, 8
TILE = 16  # tokens processed together outside of the walk: the rows of a bfloat16 tile
TOKENS, WIDTH = 256, 512  # most tokens per chunk and channels per block
UNROLL = 8  # tokens of the walk in one turn of its loop
VMEM_LIMIT = 32 * 2**20  # bytes; scratch and two buffers for each float32 block take 10 MiB
DTYPES = ("bfloat16", "float16", "float32")


def supports(
    platform: str, shape: tuple[int, ...], dtype: DTypeLike, accumulator: DTypeLike = "float32", **facts: object
) -> str | None:
    """Why this backend cannot serve the call; None: it can."""
    if platform != "tpu" and not tpu_interpreter():
        return f"it needs a TPU; the platform is {platform}"
    if jnp.dtype(dtype).name not in DTYPES:
        return f"x is {jnp.dtype(dtype).name}; it takes {', '.join(DTYPES)}"
    if jnp.dtype(accumulator).name != "float32":
        return f"an argument is {jnp.dtype(accumulator).name}; it computes in float32"
    return "x is empty" if min(shape) < 1 else None


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
    _, length, width = x.shape
    dtype = x.dtype
    log_decay, x = (v.astype(f32) if v.dtype == jnp.float16 else v for v in (log_decay, x))  # the compiler lacks it
    reset = (resets_in_reverse if reverse else resets)(segment_ids, initial_segment, mask)
    tokens, wide = {1: round_up(length, chunk_tokens(length))}, {-1: round_up(width, LANES)}
    log_decay, x = (pad(v, tokens | wide) for v in (log_decay, x))  # tokens that change nothing
    reset = None if reset is None else pad(reset.astype(f32)[..., None], tokens)
    h, state = _scan(reverse, log_decay, x, pad(initial_state, wide)[:, None], reset)
    return h[:, :length, :width].astype(dtype), state[:, 0, :width]


def chunk_tokens(length: int) -> int:
    """Tokens per chunk; all chunks have the same length."""
    return round_up(-(-length // -(-length // TOKENS)), TILE)


def block_width(channels: int) -> int:
    """Channels per block: a multiple of the number of lanes that divides the number of channels."""
    return max(w for w in range(LANES, min(channels, WIDTH) + 1, LANES) if channels % w == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(
    reverse: bool, log_decay: jax.Array, x: jax.Array, state: jax.Array, reset: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """h [B, T, D] and the final state [B, 1, D], for whole chunks and lanes.

    state: [B, 1, D] float32. reset: [B, T, 1] float32, 1 where a document begins, or None.
    """
    out = dict(h=jax.ShapeDtypeStruct(x.shape, x.dtype), final=jax.ShapeDtypeStruct(state.shape, f32))
    arrays = dict(log_decay=log_decay, x=x, state=state, reset=reset)
    found = _run("linear_scan_forward", _forward_kernel, arrays, out, ("decay", "value"), reverse, reverse)
    return found["h"], found["final"]


def _scan_fwd(reverse, log_decay, x, state, reset):
    h, final = (checkpoint_name(y, "scan") for y in _scan(reverse, log_decay, x, state, reset))
    return (h, final), (log_decay, h, state, reset)


def _scan_bwd(reverse, residuals, cotangents):
    log_decay, h, state, reset = residuals
    dh, dfinal = cotangents
    sds = jax.ShapeDtypeStruct
    out = dict(dlog_decay=sds(h.shape, log_decay.dtype), dx=sds(h.shape, h.dtype), dstate=sds(state.shape, f32))
    arrays = dict(log_decay=log_decay, h=h, around=h, dh=dh, end=dfinal, state=state, reset=reset)
    scratch = ("decay", "value", "window")
    found = _run("linear_scan_backward", _backward_kernel, arrays, out, scratch, reverse, not reverse)
    return found["dlog_decay"], found["dx"], found["dstate"], None


_scan.defvjp(_scan_fwd, _scan_bwd)


def _run(
    name: str,
    kernel: Callable[..., None],
    arrays: Mapping[str, Any],
    outputs: Mapping[str, Any],
    scratch: tuple[str, ...],
    reverse: bool,
    backwards: bool,
) -> Any:
    """Call a kernel on dicts of arrays; the outputs by name.

    Args:
        reverse: whether the scan runs against time. backwards: whether the kernel does.
    """
    batch, length, channels = arrays["log_decay"].shape
    tokens, width = chunk_tokens(length), block_width(channels)
    chunks, tiles = length // tokens, tokens // TILE

    def time(c):
        return chunks - 1 - c if backwards else c

    def around(c):
        """The tile of the token that comes before the chunk in the direction of the scan; at its start any."""
        tile = (time(c) + 1) * tiles if reverse else time(c) * tiles - 1
        return jnp.clip(tile, 0, chunks * tiles - 1)

    rows = dict.fromkeys(("state", "final", "end", "dstate"), pl.BlockSpec((None, 1, width), lambda b, e, c: (b, 0, e)))
    rows["reset"] = pl.BlockSpec((None, tokens, 1), lambda b, e, c: (b, time(c), 0))
    rows["around"] = pl.BlockSpec((None, TILE, width), lambda b, e, c: (b, around(c), e))
    of_tokens = pl.BlockSpec((None, tokens, width), lambda b, e, c: (b, time(c), e))
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("decay", "value"), (tokens, width))
    shapes["window"] = (width // LANES, tokens + 2 * SUBLANES, LANES)
    call = pl.pallas_call(
        functools.partial(kernel, reverse=reverse),
        name=name,
        grid=(batch, channels // width, chunks),
        in_specs=[{k: None if v is None else rows.get(k, of_tokens) for k, v in arrays.items()}],
        out_specs={k: rows.get(k, of_tokens) for k in outputs},
        out_shape=outputs,
        scratch_shapes=[{k: pltpu.VMEM(shapes[k], f32) for k in scratch} | dict(carry=pltpu.VMEM((1, width), f32))],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=tpu_interpreter(),
    )
    # Pallas's own rule for vmap adds an axis to the grid but not to dimension_semantics
    return jax.custom_batching.sequential_vmap(call)(arrays)


def _forward_kernel(x, out, scratch, *, reverse):
    _load(x, scratch, "x", x["state"])
    decay, value = scratch["decay"], scratch["value"]

    def token(row, h):
        a = decay[row, :]
        h = jnp.where(a < 0, 0, a * h) + value[row, :]
        value[row, :] = h
        return h

    def store(rows):
        out["h"][rows, :] = value[rows, :].astype(out["h"].dtype)

    out["final"][...] = _walk(scratch, token, reverse)
    _each_tile(decay, store)


def _backward_kernel(x, out, scratch, *, reverse):
    _load(x, scratch, "dh", x["end"])
    decay, value, window = scratch["decay"], scratch["value"], scratch["window"]
    tokens = decay.shape[0]
    first = pl.program_id(2) == pl.num_programs(2) - 1  # the chunk where the scan began
    edge, offset, row = (tokens + SUBLANES, 1, 0) if reverse else (SUBLANES - 1, -1, TILE - 1)
    columns = [slice(i * LANES, (i + 1) * LANES) for i in range(window.shape[0])]
    for i, lanes in enumerate(columns):
        window[i, SUBLANES : tokens + SUBLANES, :] = x["h"][:, lanes].astype(f32)
        before = x["around"][:, lanes].astype(f32)[row : row + 1]
        window[i, edge : edge + 1, :] = jnp.where(first, x["state"][:, lanes], before)

    def token(row, c):
        g, a = value[row, :] + c, decay[row, :]
        value[row, :] = g
        c = jnp.where(a < 0, 0, a * g)
        decay[row, :] = c
        return c

    def store(rows):
        out["dx"][rows, :] = value[rows, :].astype(out["dx"].dtype)
        for i, lanes in enumerate(columns):
            dlog_decay = decay[rows, lanes] * window[i, pl.ds(rows.start + SUBLANES + offset, TILE), :]
            if x["reset"] is not None:
                dlog_decay = jnp.where(x["reset"][rows, :] > 0, 0, dlog_decay)
            out["dlog_decay"][rows, lanes] = dlog_decay.astype(out["dlog_decay"].dtype)

    out["dstate"][...] = _walk(scratch, token, not reverse)
    _each_tile(decay, store)


def _load(x, scratch, name, start):
    """Put the chunk's decays and one of the arrays into scratch; at the walk's first chunk also the carry."""
    decay, value = scratch["decay"], scratch["value"]

    @pl.when(pl.program_id(2) == 0)
    def _():
        scratch["carry"][...] = start[...]

    def tile(rows):
        a = jnp.exp(x["log_decay"][rows, :].astype(f32))
        decay[rows, :] = a if x["reset"] is None else jnp.where(x["reset"][rows, :] > 0, -1, a)
        value[rows, :] = x[name][rows, :].astype(f32)

    _each_tile(decay, tile)


def _each_tile(array, body):
    """Call `body` with the rows of each tile of a chunk."""

    def step(i, _):
        body(pl.ds(pl.multiple_of(i * TILE, TILE), TILE))
        return 0

    lax.fori_loop(0, array.shape[0] // TILE, step, 0)


def _walk(scratch, token, backwards):
    """Apply `token(row, carry)` to every row of the chunk; the carry [1, width], which is kept for the next chunk."""
    tokens = scratch["decay"].shape[0]

    def several(i, carry):
        for k in range(UNROLL):
            t = i * UNROLL + k
            carry = token(pl.ds(tokens - 1 - t if backwards else t, 1), carry)
        return carry

    carry = lax.fori_loop(0, tokens // UNROLL, several, scratch["carry"][...])
    scratch["carry"][...] = carry
    return carry
