"""The selective scan as two Pallas TPU kernels, forward and backward.

The grid of a kernel is (sequence, chunk of time, block of channels), channels innermost. A state has the layout
[N, channels]: states in sublanes, channels in lanes. A token's step and input are rows; a load broadcasts them over the
sublanes at no cost. Its B and C are columns; they are broadcast over the lanes once per chunk, for all blocks of
channels. Sums over states are sums across sublanes. They are computed for 8 tokens at a time.

The forward kernel writes the states at the start of each chunk. The backward kernel goes through the chunks from the
last to the first. It recomputes the states of a chunk in VMEM, and runs the adjoint recurrence backwards. As channels
are innermost, the gradients of B and C are summed over them in VMEM, in float32 and always in the same order.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from seqmodels.kernels.arrays import pad, round_up
from seqmodels.kernels.interpreter import tpu_interpreter
from seqmodels.kernels.segments import resets
from seqmodels.kernels.selective_scan.mosaic_tpu import backward, forward
from seqmodels.kernels.selective_scan.mosaic_tpu.tiles import LANES, LOG2_E, STRIDE, SUBLANES, TILE, parts_shape

TOKENS = 128  # most tokens per chunk
WIDTH, STATES = 512, 12288  # most channels per block, and most numbers in their states (12 registers)
VMEM_LIMIT = 48 * 2**20  # bytes; a core has 64 MiB in a v5p, 128 MiB in a v5e or v6e

NO_STEP = -1e30  # step before softplus whose softplus is 0


def supports(*, platform: str, shape: tuple[int, ...], dtype: DTypeLike, **facts: object) -> str | None:
    """Supports TPUs if the states of all channels fit into VMEM."""
    if platform != "tpu" and not tpu_interpreter():
        return f"it needs a TPU; the platform is {platform}"
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"it takes float32, bfloat16 and float16; the dtype is {jnp.dtype(dtype).name}"
    _, length, groups, width, state = shape
    need = backward_vmem(length, groups, width, state, jnp.dtype(dtype).itemsize)
    return f"its states need {need >> 20} MiB of VMEM; {VMEM_LIMIT >> 20} are allowed" if need > VMEM_LIMIT else None


def selective_scan(
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None,
    z: jax.Array | None,
    dt_bias: jax.Array | None,
    weights: jax.Array | None,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    initial_segment: jax.Array | None,
    mask: jax.Array | None,
    dt_softplus: bool,
) -> tuple[jax.Array, jax.Array]:
    """As `kernels.selective_scan.selective_scan`, with the group axis present and padding set to zero."""
    batch, length, groups, width = u.shape
    state, dtype = A.shape[-1], u.dtype
    if dtype == jnp.float16:  # the compiler does not support it
        u, dt = u.astype(jnp.float32), dt.astype(jnp.float32)
        z, weights = (None if x is None else x.astype(jnp.float32) for x in (z, weights))
    if not dt_softplus:
        dt = dt if dt_bias is None else dt + dt_bias.astype(jnp.float32)
    no_step = NO_STEP if dt_softplus else 0
    if mask is not None:
        dt = jnp.where(mask[:, :, None, None], dt, no_step)
    if weights is not None:
        weights = jnp.broadcast_to(weights, (batch, length, groups - 1, width)) if groups > 1 else None

    tokens = chunk_tokens(length, groups, state)
    whole = dict(T=round_up(length, tokens), E=round_up(width, LANES), N=round_up(state, SUBLANES))

    def fill_up(x, axes, fill=0):
        """Pad to whole chunks, lanes and sublanes."""
        return pad(x, {i: whole[axis] for i, axis in enumerate(axes) if axis in whole}, fill)

    def groups_first(x):
        return None if x is None else jnp.swapaxes(x, 1, 2)

    def channels_last(x):
        return fill_up(jnp.swapaxes(x.astype(jnp.float32), -1, -2), ("",) * (x.ndim - 2) + ("N", "E"))

    bias = jnp.zeros((groups, width)) if dt_bias is None else dt_bias
    skip = jnp.zeros((width,)) if D is None else D
    reset = resets(segment_ids, initial_segment, mask)
    y, final = _scan(
        dt_softplus,
        dict(
            u=fill_up(groups_first(u), "BGTE"),
            dt=fill_up(groups_first(dt), "BGTE", no_step),
            A=channels_last(A),
            B=fill_up(groups_first(B.astype(jnp.float32)), "BGTN"),
            C=fill_up(groups_first(C.astype(jnp.float32)), "BGTN"),
            D=fill_up(skip.astype(jnp.float32)[None], "1E"),
            z=fill_up(z, "BTE"),
            bias=fill_up(bias.astype(jnp.float32)[:, None], "G1E") if dt_softplus else None,
            weights=fill_up(groups_first(weights), "BGTE"),
            state=channels_last(initial_state),
        ),
        None if reset is None else fill_up(reset.astype(jnp.float32)[..., None], "BT1"),
    )
    return y[:, :length, :width].astype(dtype), jnp.swapaxes(final[:, :, :state, :width], -1, -2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(softplus, arrays, reset):
    """y [B, T, E] and the final state [B, G, N, E].

    Args:
        softplus: whether bias and softplus are still to be applied to dt.
        arrays: u, dt [B, G, T, E], A [G, N, E], B, C [B, G, T, N], D [1, E], z [B, T, E] or None, bias [G, 1, E] or
            None, weights [B, G - 1, T, E] or None, state [B, G, N, E].
        reset: [B, T, 1] float32, 1 where the state is reset, or None.
    """
    out = _forward(softplus, arrays, reset, for_gradient=False)
    return out["y"], out["state"]


def _scan_fwd(softplus, arrays, reset):
    out = _forward(softplus, arrays, reset, for_gradient=True)
    return (out["y"], out["state"]), (arrays, reset, out["start"], out["ungated"])


def _scan_bwd(softplus, residuals, cotangents):
    arrays, reset, start, ungated = residuals
    gradients = _backward(softplus, arrays, reset, start, ungated, *cotangents)
    return {k: None if x is None else gradients[k].astype(x.dtype) for k, x in arrays.items()}, None


_scan.defvjp(_scan_fwd, _scan_bwd)


# Axes of every input and output. B, G, T, E, N are as elsewhere; K: chunks; L: tokens of a chunk, padded to full lanes.
# F and Z replace E if only the first or the last visited chunk needs the array. Other axes are whole in each block.
AXES = dict(
    u="BGTE",
    dt="BGTE",
    A="GNE",
    B="BKGNL",
    C="BKGNL",
    D="1E",
    z="BTE",
    bias="G1E",
    weights="BGTE",
    reset="BT1",
    state="BGNF",
    start="BKGNE",
    ungated="BTE",
    dy="BTE",
    dstate="BGNF",
)
FORWARD_AXES = dict(y="BTE", ungated="BTE", start="BKGNE", state="BGNZ")
BACKWARD_AXES = AXES | dict(A="BGNZ", B="BGTN", C="BGTN", D="B8Z", bias="BG8Z", state="BGNZ")


def _specs(arrays, axes, grid, tokens, width, reverse):
    """The block of each array of a dict at each step of the grid (sequence, chunk, block of channels)."""
    _, chunks, blocks = grid

    def spec(name, shape):
        def index(b, c, e):
            time = chunks - 1 - c if reverse else c
            first, last = jnp.where(c == 0, e, blocks - 1), jnp.where(c == chunks - 1, e, 0)
            place = dict(B=b, K=time, T=time, E=e, F=first, Z=last)
            return tuple(place.get(axis, 0) for axis in axes[name])

        sizes = dict(B=None, K=None, T=tokens, E=width, F=width, Z=width)
        return pl.BlockSpec(tuple(sizes.get(axis, n) for axis, n in zip(axes[name], shape, strict=True)), index)

    return {name: None if x is None else spec(name, x.shape) for name, x in arrays.items()}


def chunk_tokens(length: int, groups: int, state: int) -> int:
    """Tokens per chunk: fewer if states are large. All chunks have the same length."""
    most = max(TILE, min(TOKENS, 8192 // (groups * round_up(state, SUBLANES)) // TILE * TILE))
    return round_up(-(-length // -(-length // most)), TILE)


def block_width(channels: int, groups: int, state: int) -> int:
    """Channels per block: whole registers, and a divisor of the number of channels."""
    most = min(WIDTH, channels, STATES // (groups * round_up(state, SUBLANES)))
    return max(w for w in range(LANES, max(LANES, most) + 1, LANES) if channels % w == 0)


def backward_vmem(length: int, groups: int, channels: int, state: int, itemsize: int) -> int:
    """Bytes of VMEM for the backward kernel, which needs more: its scratch, and two buffers per block."""
    channels, state = round_up(channels, LANES), round_up(state, SUBLANES)
    tokens, width = chunk_tokens(length, groups, state), block_width(channels, groups, state)
    carried = 2 * (state + SUBLANES) * channels
    scratch = carried + tokens * (state * (width + 4 * LANES) + 5 * width) + 3 * TILE * STRIDE * width
    blocks = 5 * (state + SUBLANES) * width + tokens * (2 * state + 3 * LANES)
    return 4 * groups * (scratch + 2 * blocks) + 2 * tokens * width * itemsize * 6 * (groups + 1)


def _run(name, kernel, arrays, outputs, output_axes, scratch, grid, tokens, width, reverse=False):
    """Call a kernel on dicts of arrays. `outputs` and `scratch` give shapes and dtypes."""
    specs = functools.partial(_specs, grid=grid, tokens=tokens, width=width, reverse=reverse)
    call = pl.pallas_call(
        kernel,
        name=name,
        grid=grid,
        in_specs=[specs(arrays, AXES)],
        out_specs=specs(outputs, output_axes),
        out_shape=outputs,
        scratch_shapes=[{k: pltpu.VMEM(shape, jnp.float32) for k, shape in scratch.items()}],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=tpu_interpreter(),
    )
    # Pallas's own rule for vmap adds an axis to the grid but not to dimension_semantics
    return jax.custom_batching.sequential_vmap(call)(arrays)


def _columns(x, tokens):
    """[B, G, T, N] to columns by chunk [B, K, G, N, L], with tokens padded to whole lanes."""
    batch, groups, length, state = x.shape
    x = x.reshape(batch, groups, length // tokens, tokens, state).transpose(0, 2, 1, 4, 3)
    return pad(x, {-1: round_up(tokens, LANES)})


def _inputs(arrays, reset, tokens, **more):
    """Inputs of both kernels. Decays are computed as powers of 2."""
    columns = {name: _columns(arrays[name], tokens) for name in "BC"}
    return arrays | columns | dict(A=arrays["A"] * LOG2_E, reset=reset) | more


def _forward(softplus, arrays, reset, for_gradient):
    """y, the last state, and with `for_gradient` the states at the chunks' starts [B, K, G, N, E] and the ungated y."""
    batch, groups, length, channels = arrays["u"].shape
    state, dtype = arrays["A"].shape[1], arrays["u"].dtype
    tokens, width = chunk_tokens(length, groups, state), block_width(channels, groups, state)
    grid = (batch, length // tokens, channels // width)
    outputs = dict(
        y=jax.ShapeDtypeStruct((batch, length, channels), dtype),
        state=jax.ShapeDtypeStruct((batch, groups, state, channels), jnp.float32),
        start=None,
        ungated=None,
    )
    if for_gradient:
        outputs["start"] = jax.ShapeDtypeStruct((batch, grid[1], groups, state, channels), jnp.float32)
        outputs["ungated"] = None if arrays["z"] is None else outputs["y"]
    rows = (groups, width // LANES, tokens, LANES)
    scratch = dict(
        state=(grid[2], groups, state, width),
        B=(groups, tokens, state, LANES),
        C=(groups, tokens, state, LANES),
        step=rows,
        write=rows,
        weights=rows,
        readout=parts_shape(width),
    )
    kernel = functools.partial(forward.kernel, softplus=softplus)
    arrays = _inputs(arrays, reset, tokens)
    return _run("selective_scan_forward", kernel, arrays, outputs, FORWARD_AXES, scratch, grid, tokens, width)


def _backward(softplus, arrays, reset, start, ungated, dy, dstate):
    """Gradients of `arrays` by name, in float32 where they are sums over tokens or channels."""
    batch, groups, length, channels = arrays["u"].shape
    state = arrays["A"].shape[1]
    tokens, width = chunk_tokens(length, groups, state), block_width(channels, groups, state)
    grid = (batch, length // tokens, channels // width)
    outputs = {k: None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in arrays.items()}
    sums = jax.ShapeDtypeStruct((batch, SUBLANES, channels), jnp.float32)
    outputs |= dict(A=outputs["state"], D=sums)
    if softplus:
        outputs["bias"] = jax.ShapeDtypeStruct((batch, groups, SUBLANES, channels), jnp.float32)
    wide = (groups, tokens, state, LANES)
    tile, rows = (groups, tokens, width), (groups, width // LANES, tokens, LANES)
    carried = (grid[2], groups, state, width)
    scratch = dict(B=wide, C=wide, dB=wide, dC=wide, step=rows, write=rows, dreadout=rows, dt=tile, slope=tile)
    scratch |= dict(dstate=carried, dA=carried, states=(tokens, groups, state, width))
    scratch |= dict(dD=(grid[2], SUBLANES, width), dbias=(grid[2], groups, SUBLANES, width))
    parts = (groups, *parts_shape(width))
    scratch |= dict(dwrite=parts, dstep=parts, readout=parts)
    kernel = functools.partial(backward.kernel, softplus=softplus)
    inputs = _inputs(arrays, reset, tokens, start=start, ungated=ungated, dy=dy, dstate=dstate)
    del inputs["state"]
    gradients = _run(
        "selective_scan_backward", kernel, inputs, outputs, BACKWARD_AXES, scratch, grid, tokens, width, reverse=True
    )
    gradients |= dict(A=jnp.sum(gradients["A"], axis=0), D=jnp.sum(gradients["D"], axis=(0, 1))[None])
    if softplus:
        gradients["bias"] = jnp.sum(gradients["bias"], axis=(0, 2))[:, None]
    return gradients
