"""Short causal convolution as two Pallas TPU kernels, forward and backward: each array is read or written once.

The grid is (sequence, block of channels, chunk of time), time innermost. Each step copies columns of 128 channels to a
window in VMEM, in float32. The few inputs before the chunk are stored in front of it. The window is one register wide,
so a load at any row is a plain load: an earlier input is read by the same load at an earlier row.

The backward kernel goes from the last chunk to the first. It recomputes the sum before the activation, and stores the
gradient g of each sum in a second window. The first gradients of the following chunk are stored behind this chunk's.
The gradients of weight and bias are sums over tokens. They stay in VMEM in float32, always added in the same order.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from seqmodels.kernels.arrays import pad, round_up
from seqmodels.kernels.interpreter import tpu_interpreter
from seqmodels.kernels.short_conv import xla

f32 = jnp.float32
LANES, SUBLANES = 128, 8
BEFORE = 16  # tokens that are read before a chunk: the rows of a bfloat16 tile
TILE = 64  # tokens processed together
TOKENS, WIDTH = 512, 2048  # most tokens per chunk and channels per block
VMEM_LIMIT = 32 * 2**20  # bytes; two buffers for each float32 block take 24 MiB
DTYPES = ("bfloat16", "float16", "float32")


def supports(
    platform: str,
    batch: int = 8,
    length: int = 2048,
    channels: int = 1536,
    dtype: DTypeLike = "bfloat16",
    **facts: object,
) -> str | None:
    """Why this backend cannot serve the call; None: it can."""
    if platform != "tpu" and not tpu_interpreter():
        return f"it needs a TPU; the platform is {platform}"
    if jnp.dtype(dtype).name not in DTYPES:
        return f"x is {jnp.dtype(dtype).name}; it takes {', '.join(DTYPES)}"
    return "x is empty" if min(batch, length, channels) < 1 else None


def short_conv(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    *,
    activation: str | None,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    initial_segment: jax.Array | None,
    mask: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """See `kernels.short_conv.short_conv`. Sums in float32."""
    channels, dtype = x.shape[-1], x.dtype
    if dtype == jnp.float16:  # the compiler does not support it
        x = x.astype(f32)

    wide = {-1: round_up(channels, LANES)}
    x, weight, bias, initial_state = (pad(v, wide) for v in (x, weight, bias, initial_state))
    y, state = xla.convolve_real(
        convolve, x, weight, bias, activation, initial_state, segment_ids, initial_segment, mask
    )
    return y[..., :channels].astype(dtype), state[..., :channels]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def convolve(
    activation: str | None,
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    state: jax.Array | None,
    reach: jax.Array | None,
) -> jax.Array:
    """y [B, T, E] as of `xla.convolve`, without the final state. E is a multiple of the number of lanes."""
    return forward(activation, arrays(x, weight, bias, state, reach))[:, : x.shape[1]]


def _convolve_fwd(activation, *inputs):
    return convolve(activation, *inputs), inputs


def _convolve_bwd(activation, inputs, dy):
    x, weight, bias, state, _ = inputs
    dx, sums = backward(activation, arrays(*inputs) | dict(dy=whole_chunks(dy)))
    sums = jnp.sum(sums, axis=0)
    dstate = None if state is None else xla.state_gradient(activation, *inputs, dy).astype(state.dtype)
    dbias = None if bias is None else sums[-1].astype(bias.dtype)
    return dx[:, : x.shape[1]], sums[:-1].astype(weight.dtype), dbias, dstate, None


convolve.defvjp(_convolve_fwd, _convolve_bwd)


def arrays(
    x: jax.Array, weight: jax.Array, bias: jax.Array | None, state: jax.Array | None, reach: jax.Array | None
) -> dict[str, jax.Array | None]:
    """The kernels' arguments by name.

    Returns:
        x, before: [B, T, E], the same array, with T padded to whole chunks. The zeros at the end change no gradient.
        taps: [W + 1, E] float32, the rows of weight and the bias.
        state: [B, 8, E] float32 or None; its last rows are the W - 1 inputs before the first token.
        reach: [B, T, 1] float32, how many earlier inputs a token sees. None: all.
    """
    x = whole_chunks(x)
    bias = jnp.zeros(x.shape[-1:], f32) if bias is None else bias
    taps = jnp.concatenate([weight.astype(f32), bias.astype(f32)[None]])
    if state is not None:
        state = jnp.pad(state.astype(f32), ((0, 0), (SUBLANES - state.shape[1], 0), (0, 0)))
    reach = None if reach is None else whole_chunks(reach.astype(f32)[..., None])
    return dict(x=x, before=x, taps=taps, state=state, reach=reach)


def chunk_tokens(length: int) -> int:
    """Tokens per chunk; all chunks have the same length."""
    return round_up(-(-length // -(-length // TOKENS)), TILE)


def whole_chunks(x: jax.Array) -> jax.Array:
    """x [B, T, ..], with time padded by zeros to whole chunks."""
    return pad(x, {1: round_up(x.shape[1], chunk_tokens(x.shape[1]))})


def block_width(channels: int) -> int:
    """Channels per block: a multiple of the number of lanes that divides the number of channels."""
    return max(w for w in range(LANES, min(channels, WIDTH) + 1, LANES) if channels % w == 0)


def forward(activation: str | None, arrays: dict[str, Any]) -> jax.Array:
    """y [B, T, E] in the dtype of x, from `arrays`."""
    out = dict(y=jax.ShapeDtypeStruct(arrays["x"].shape, arrays["x"].dtype))
    return _run("short_conv_forward", _forward_kernel, activation, arrays, out, {})["y"]


def backward(activation: str | None, arrays: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """dx [B, T, E], and each sequence's gradients of `taps`, [B, W + 1, E] float32, from `arrays` with dy."""
    x, taps = arrays["x"], arrays["taps"].shape[0]
    width = block_width(x.shape[-1])
    out = dict(
        dx=jax.ShapeDtypeStruct(x.shape, x.dtype), sums=jax.ShapeDtypeStruct((x.shape[0], taps, x.shape[-1]), f32)
    )
    scratch = dict(
        gradient=(chunk_tokens(x.shape[1]) + SUBLANES, LANES),
        later=(SUBLANES, width),
        sums=(taps, SUBLANES, width),
    )
    out = _run("short_conv_backward", _backward_kernel, activation, arrays, out, scratch, reverse=True)
    return out["dx"], out["sums"]


def _run(name, kernel, activation, arrays, outputs, scratch, reverse=False):
    """Call a kernel on dicts of arrays. `outputs` gives shapes and dtypes, `scratch` gives shapes."""
    batch, length, channels = arrays["x"].shape
    tokens, width = chunk_tokens(length), block_width(channels)
    chunks = length // tokens

    def time(c):
        return chunks - 1 - c if reverse else c

    def spec(name):
        rows = arrays["taps"].shape[0]
        of_tokens = pl.BlockSpec((None, tokens, width), lambda b, e, c: (b, time(c), e))
        return dict(
            # The rows that are read before the first chunk are not used.
            before=pl.BlockSpec(
                (None, BEFORE, width), lambda b, e, c: (b, jnp.maximum(time(c) * (tokens // BEFORE) - 1, 0), e)
            ),
            reach=pl.BlockSpec((None, tokens, 1), lambda b, e, c: (b, time(c), 0)),
            taps=pl.BlockSpec((rows, width), lambda b, e, c: (0, e)),
            sums=pl.BlockSpec((None, rows, width), lambda b, e, c: (b, 0, e)),
            state=pl.BlockSpec((None, SUBLANES, width), lambda b, e, c: (b, 0, e)),
        ).get(name, of_tokens)

    scratch = scratch | dict(window=(SUBLANES + tokens, LANES))
    if arrays["reach"] is not None:
        scratch |= dict(reach=(tokens + SUBLANES, LANES))
    call = pl.pallas_call(
        functools.partial(kernel, activation=activation),
        name=name,
        grid=(batch, channels // width, chunks),
        in_specs=[{k: None if v is None else spec(k) for k, v in arrays.items()}],
        out_specs={k: spec(k) for k in outputs},
        out_shape=outputs,
        scratch_shapes=[{k: pltpu.VMEM(shape, f32) for k, shape in scratch.items()}],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=tpu_interpreter(),
    )
    # Pallas's own rule for vmap adds an axis to the grid but not to dimension_semantics
    return jax.custom_batching.sequential_vmap(call)(arrays)


def _forward_kernel(x, out, scratch, *, activation):
    first = pl.program_id(2) == 0
    if x["reach"] is not None:
        _spread_reach(x, scratch)

    def column(lanes):
        _fill_window(x, scratch, lanes, first)
        taps = _taps(x, lanes)

        def tile(i, _):
            start = pl.multiple_of(i * TILE, TILE)
            total, _ = _sum(taps, scratch, start)
            y = total * _sigmoid(total) if activation == "silu" else total
            out["y"][pl.ds(start, TILE), lanes] = y.astype(out["y"].dtype)
            return 0

        lax.fori_loop(0, x["x"].shape[0] // TILE, tile, 0)

    _each_column(column, x)


def _backward_kernel(x, out, scratch, *, activation):
    tokens = x["x"].shape[0]
    step, steps = pl.program_id(2), pl.num_programs(2)
    first = step == steps - 1  # in time

    @pl.when(step == 0)
    def _():
        scratch["later"][...] = jnp.zeros(scratch["later"].shape, f32)
        scratch["sums"][...] = jnp.zeros(scratch["sums"].shape, f32)
        if x["reach"] is not None:
            scratch["reach"][:SUBLANES, :] = jnp.zeros((SUBLANES, LANES), f32)

    if x["reach"] is not None:
        scratch["reach"][tokens:, :] = scratch["reach"][:SUBLANES, :]  # of the chunk after this one
        _spread_reach(x, scratch)

    def column(lanes):
        _fill_window(x, scratch, lanes, first)
        scratch["gradient"][tokens:, :] = scratch["later"][:, lanes]
        taps = _taps(x, lanes)
        count = len(taps) - 1

        def tile(i, sums):
            start = pl.multiple_of(tokens - TILE - i * TILE, TILE)
            rows = pl.ds(start, TILE)
            g = x["dy"][rows, lanes].astype(f32)
            total, seen = _sum(taps, scratch, start)
            if activation == "silu":
                gate = _sigmoid(total)
                g = g * gate * (1 + total * (1 - gate))
            scratch["gradient"][rows, :] = g
            dx = taps[count - 1] * g
            for d in range(1, count):
                later = pl.ds(start + d, TILE)
                dx += taps[count - 1 - d] * _within(scratch["gradient"][later, :], scratch, later, d)
            out["dx"][rows, lanes] = dx.astype(out["dx"].dtype)
            products = [_fold(g * v) for v in reversed(seen)]
            return tuple(s + v for s, v in zip(sums, [*products, _fold(g)], strict=True))

        sums = tuple(scratch["sums"][k, :, lanes] for k in range(count + 1))
        sums = lax.fori_loop(0, tokens // TILE, tile, sums)
        for k, total in enumerate(sums):
            scratch["sums"][k, :, lanes] = total
        scratch["later"][:, lanes] = scratch["gradient"][:SUBLANES, :]

    _each_column(column, x)

    @pl.when(first)
    def _():
        out["sums"][...] = jnp.sum(scratch["sums"][...], axis=1)


def _each_column(column, x):
    """Call `column` with the lanes of each column of the block."""

    def body(i, _):
        column(pl.ds(pl.multiple_of(i * LANES, LANES), LANES))
        return 0

    lax.fori_loop(0, x["x"].shape[1] // LANES, body, 0)


def _spread_reach(x, scratch):
    """Broadcast each token's reach over the lanes, for all columns."""
    tokens = x["x"].shape[0]
    scratch["reach"][:tokens, :] = jnp.broadcast_to(x["reach"][...], (tokens, LANES))


def _fill_window(x, scratch, lanes, first):
    """Copy a column of the chunk, behind the 8 inputs before it: the state's for the first chunk, or zeros."""
    state = jnp.zeros((SUBLANES, LANES), f32) if x["state"] is None else x["state"][:, lanes]
    before = x["before"][:, lanes].astype(f32)[BEFORE - SUBLANES :]
    scratch["window"][:SUBLANES, :] = jnp.where(first, state, before)
    scratch["window"][SUBLANES:, :] = x["x"][:, lanes].astype(f32)


def _taps(x, lanes):
    """The W taps and the bias of a column, each one row broadcast to [TILE, LANES]."""
    return [jnp.broadcast_to(x["taps"][k : k + 1, lanes], (TILE, LANES)) for k in range(x["taps"].shape[0])]


def _sum(taps, scratch, start):
    """bias + sum_d weight[W-1-d] x_{t-d} of a tile [TILE, LANES], and the inputs in the sum, newest first."""
    *weight, total = taps
    seen = []
    for d, tap in enumerate(reversed(weight)):
        v = scratch["window"][pl.ds(start + SUBLANES - d, TILE), :]
        seen.append(_within(v, scratch, pl.ds(start, TILE), d) if d else v)
        total = total + tap * seen[-1]
    return total, seen


def _within(x, scratch, rows, distance):
    """x where the tokens of these rows see the input `distance` tokens earlier, else 0."""
    return jnp.where(scratch["reach"][rows, :] >= distance, x, 0) if "reach" in scratch else x


def _fold(x):
    """Sum [TILE, LANES] to [SUBLANES, LANES]."""
    return sum(x[row : row + SUBLANES] for row in range(0, TILE, SUBLANES))


def _sigmoid(x):
    return 0.5 * jnp.tanh(0.5 * x) + 0.5  # tanh is one instruction; the absolute error is 1e-7
