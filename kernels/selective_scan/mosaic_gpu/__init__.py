"""The selective scan as Pallas Mosaic GPU kernels, for Hopper and later: forward, backward, states in and out.

The kernels want whole blocks of channels and a padded number of states; that is seen to here. Between forward and
backward pass only the inputs and the states at the start of every chunk are kept.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels import lanes
from kernels.segments import resets
from kernels.selective_scan.mosaic_gpu.backward import backward, backward_bytes
from kernels.selective_scan.mosaic_gpu.forward import BLOCK, forward, forward_bytes
from kernels.selective_scan.mosaic_gpu.stage import marks
from kernels.selective_scan.mosaic_gpu.tile import SIZES, Tile
from kernels.selective_scan.xla import FEW

MULTIPLE = 16  # tokens; the largest chunk
DTYPES = ("bfloat16", "float16", "float32")
SHARED = 226 * 1024  # bytes of shared memory that a block may take, barriers aside


def supports(platform, shape, dtype, named=False, **facts) -> str | None:
    """Why this backend cannot serve the call, or should not where it is not asked for by name; None: it can."""
    batch, length, groups, width, states = shape
    if platform != "cuda" and lanes.INTERPRET is None:
        return "it needs an NVIDIA GPU"
    if length <= FEW and not named:
        return f"T is {length}: up to {FEW} tokens are faster in XLA's own fusions"
    if lanes.INTERPRET is None and (capability := _compute_capability()) and capability < 9:
        return f"it needs an NVIDIA GPU of compute capability 9.0 (Hopper) or later, this one has {capability}"
    if jnp.dtype(dtype).name not in DTYPES:
        return f"u is {jnp.dtype(dtype).name}; it takes {', '.join(DTYPES)}"
    if states > SIZES[-1]:
        return f"N is {states}; it holds at most {SIZES[-1]} states a channel in registers"
    if groups > 4:
        return f"there are {groups} groups; it holds at most 4 in registers"
    if min(batch, length) < 1 or batch * length * groups * width >= 2**31:
        return f"u has {batch * length * groups * width} elements; it addresses 1 to 2^31 - 1"
    return None


def _compute_capability() -> float | None:
    """Of the GPU at hand; None where there is none (compiling ahead of time)."""
    if jax.default_backend() != "gpu":
        return None
    return float(jax.devices()[0].compute_capability)


def selective_scan(
    u, dt, A, B, C, D, z, dt_bias, weights, initial_state, segment_ids, initial_segment, mask, dt_softplus
):
    """As `kernels.selective_scan.selective_scan`, groups given, padding zeroed."""
    _, length, groups, width = u.shape
    states = A.shape[-1]
    size = next(size for size in SIZES if size >= states)
    block = max(BLOCK, Tile(size).channels)
    padded = -(-width // block) * block

    def states_to_size(x):
        return pad(x.astype(jnp.float32), -1, size)

    def channels_to_block(x, axis=-1):
        return pad(x.astype(jnp.float32), axis, padded)

    def channels_aligned(x):  # rows must be multiples of 16 bytes, blocks no wider than the array
        return pad(x, -1, padded if width < block else -(-width // 8) * 8)

    arrays = dict(
        u=channels_aligned(u),
        dt=channels_aligned(dt),
        A=channels_to_block(states_to_size(A), -2),
        B=states_to_size(B),
        C=states_to_size(C),
        D=jnp.zeros(padded) if D is None else channels_to_block(D),
        z=channels_aligned(z),
        dt_bias=jnp.zeros((groups, padded)) if dt_bias is None else channels_to_block(dt_bias),
        weights=channels_aligned(weights) if groups > 1 else None,
        initial_state=channels_to_block(states_to_size(initial_state), -2),
    )
    reset = resets(segment_ids, initial_segment, mask)
    tokens = -(-length // MULTIPLE) * MULTIPLE
    if length < tokens and length < MULTIPLE:  # copies need whole chunks
        arrays = {
            name: pad(x, 1, tokens) if name in ("u", "dt", "B", "C", "z", "weights") else x
            for name, x in arrays.items()
        }
        mask = jnp.ones(u.shape[:2], bool) if mask is None else mask
    y, state = _scan(arrays, marks(reset, mask, tokens), dt_softplus, chunks(arrays))
    return y[:, :length, :width], state[:, :, :width, :states]


def pad(x, axis, size):
    """x with zeros at the end of an axis; None is None."""
    if x is None or x.shape[axis] == size:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths)


def chunks(arrays) -> tuple[int, int]:
    """Tokens of a chunk of the forward and of the backward pass: as many, up to 16 and 8, as fit in shared memory.

    The forward pass saves states for each chunk of the backward pass.
    """
    states = arrays["A"].shape[-1]
    inputs = {name: arrays[name] for name in ("u", "dt", "B", "C", "z", "weights")}
    ahead = next((chunk for chunk in (16, 8, 4) if forward_bytes(chunk=chunk, **inputs) <= SHARED), 4)
    back = next((chunk for chunk in (8, 4) if backward_bytes(chunk=chunk, states=states, **inputs) <= SHARED), 4)
    return ahead, min(ahead, back)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _scan(arrays, marks, softplus, chunks):
    """y [b, T', E'] and the final state; the arguments of `forward`."""
    y, final, _ = forward(**arrays, marks=marks, softplus=softplus, chunk=chunks[0], save=0)
    return y, final


def _scan_fwd(arrays, marks, softplus, chunks):
    out = forward(**arrays, marks=marks, softplus=softplus, chunk=chunks[0], save=chunks[1])
    y, final, saved = (checkpoint_name(x, "scan") for x in out)
    return (y, final), (arrays, marks, saved)


def _scan_bwd(softplus, chunks, residuals, cotangents):
    arrays, marks, saved = residuals
    dy, dfinal = cotangents
    length, width = arrays["u"].shape[1], arrays["u"].shape[-1]
    inputs = {name: x for name, x in arrays.items() if name != "initial_state"}
    dy = dy[:, :length, :width]
    g = backward(**inputs, marks=marks, saved=saved, dy=dy, dfinal=dfinal, softplus=softplus, chunk=chunks[1])
    dB, dC = jnp.moveaxis(jnp.sum(g["dBC"], axis=1)[:, :length], 3, 0)
    dweights = None
    if arrays["weights"] is not None:
        dweights = g["dweights"][:, :length, :, :width]
        if arrays["weights"].shape[2] == 1:
            dweights = jnp.sum(dweights, axis=2, keepdims=True, dtype=jnp.float32)
    gradients = dict(
        u=g["du"][:, :length, :, :width],
        dt=g["ddt"][:, :length, :, :width],
        A=jnp.sum(g["dA"], axis=0),
        B=dB,
        C=dC,
        D=jnp.sum(g["dD"], axis=(0, 1)),
        z=None if arrays["z"] is None else g["dz"][:, :length, :width],
        dt_bias=jnp.sum(g["dbias"], axis=(0, 1)),
        weights=dweights,
        initial_state=g["dinitial"],
    )
    gradients = {name: None if x is None else x.astype(arrays[name].dtype) for name, x in gradients.items()}
    return gradients, None


_scan.defvjp(_scan_fwd, _scan_bwd)
