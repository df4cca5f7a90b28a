"""The selective scan as Pallas Mosaic GPU kernels, for Hopper and later: forward and backward, with initial states.

This module pads the arrays as the kernels require: to whole blocks of channels and to a supported number of states.
Only the inputs and the state at the start of each chunk are saved for the backward pass. Calls with a few tokens, as in
decoding, use a kernel of their own.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from seqmodels.kernels import lanes
from seqmodels.kernels.arrays import mapped, pad, round_up
from seqmodels.kernels.interpreter import gpu_interpreter
from seqmodels.kernels.pieces import chain as chain_devices
from seqmodels.kernels.pieces import chain_unrolled
from seqmodels.kernels.segments import forget, resets
from seqmodels.kernels.selective_scan import xla
from seqmodels.kernels.selective_scan.mosaic_gpu import few, tuning
from seqmodels.kernels.selective_scan.mosaic_gpu.backward import backward
from seqmodels.kernels.selective_scan.mosaic_gpu.backward_plan import backward_bytes
from seqmodels.kernels.selective_scan.mosaic_gpu.forward import forward
from seqmodels.kernels.selective_scan.mosaic_gpu.forward_plan import WORKERS, affordable, forward_bytes
from seqmodels.kernels.selective_scan.mosaic_gpu.stage import SHARED, marks
from seqmodels.kernels.selective_scan.mosaic_gpu.summary import end_of_gradient, end_of_state
from seqmodels.kernels.selective_scan.mosaic_gpu.tile import SIZES, Tile
from seqmodels.kernels.tuning import UNROLLED

OVER_TIME = ("u", "dt", "B", "C", "z", "weights", "dy", "du", "ddt", "dz", "dweights")
DTYPES = ("bfloat16", "float16", "float32")

Axis = str | tuple[str, ...]


def supports(
    platform: str, shape: tuple[int, ...], dtype: DTypeLike, named: bool = False, **facts: object
) -> str | None:
    """Why this backend cannot serve the call, or, unless requested by name, why another is faster. None: it can."""
    batch, length, groups, width, states = shape
    if platform != "cuda" and not gpu_interpreter():
        return "it needs an NVIDIA GPU"
    if length == 1 and not named:
        return "T is 1: XLA fuses the scan with what comes before and after it, and a model's step is faster so"
    if length <= UNROLLED and not named and (reason := few.supports(shape)):
        return f"{reason}, and so few tokens are faster in XLA's own fusions than in chunks"
    if (capability := lanes.compute_capability() or 9) < 9:
        return f"it needs an NVIDIA GPU of compute capability 9.0 (Hopper) or later, this one has {capability}"
    if jnp.dtype(dtype).name not in DTYPES:
        return f"u is {jnp.dtype(dtype).name}; it takes {', '.join(DTYPES)}"
    if states > SIZES[-1]:
        return f"N is {states}; it holds at most {SIZES[-1]} states a channel in registers"
    if groups > WORKERS:
        return f"there are {groups} groups; it gives each a warpgroup, at most {WORKERS}"
    if min(batch, length) < 1 or batch * length * groups * width >= 2**31:
        return f"u has {batch * length * groups * width} elements; it addresses 1 to 2^31 - 1"
    return None


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
    axis: Axis | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As `kernels.selective_scan.selective_scan`, with the group axis present and padding set to zero.

    Args:
        axis: mesh axis (or axes) that time is split over, inside a shard_map; see `kernels.selective_scan.sharded`.
    """
    _, length, groups, width = u.shape
    states = A.shape[-1]
    if axis is None and few.supports((*u.shape, states)) is None:
        arrays = dict(u=u, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, weights=weights)
        documents = dict(segment_ids=segment_ids, initial_segment=initial_segment, mask=mask)
        return few_tokens(arrays | dict(initial_state=initial_state), documents, dt_softplus)
    size = next(size for size in SIZES if size >= states)
    block = max(tuning.WIDEST, Tile(size).channels)
    padded = round_up(width, block)

    def states_to_size(x):
        return pad(x.astype(jnp.float32), {-1: size})

    def channels_to_block(x, axis=-1):
        return pad(x.astype(jnp.float32), {axis: padded})

    def channels_aligned(x):  # rows must be multiples of 16 bytes, blocks no wider than the array
        return pad(x, {-1: padded if width < block else round_up(width, 8)})

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
    count = lanes.processors()
    chunk: Any = forward_chunks(arrays)
    across = axis is not None
    block, ahead = tuning.plan_forward(u.shape[0], length, padded, count, across, tuple(chunk))
    back = tuning.plan_backward(u.shape[0] * groups, length, padded, size, count, across)
    chunk, pieces = chunk[block], max(ahead, back)
    tokens = round_up(length, chunk * pieces)
    if length < tokens and (length < chunk or pieces > 1):  # copies need whole chunks, pieces equal lengths
        arrays = {
            name: pad(x, {1: tokens}) if name in ("u", "dt", "B", "C", "z", "weights") else x
            for name, x in arrays.items()
        }
        mask = jnp.ones(u.shape[:2], bool) if mask is None else mask
    save = min(chunk, backward_chunk(arrays))
    y, state = _scan(arrays, marks(reset, mask, tokens), dt_softplus, block, (chunk, save), (ahead, back), axis)
    return y[:, :length, :width], state[:, :, :width, :states]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def few_tokens(
    arrays: dict[str, Any], documents: dict[str, jax.Array | None], softplus: bool
) -> tuple[jax.Array, jax.Array]:
    """y and the final state. Gradients are those of XLA's scan: training on so few tokens is rare."""
    given = arrays | dict(marks=marks(resets(**documents), documents["mask"], arrays["u"].shape[1]))
    return mapped(few.few, softplus=softplus)(given)


def _few_tokens_fwd(arrays, documents, softplus):
    return few_tokens(arrays, documents, softplus), (arrays, documents)


def _few_tokens_bwd(softplus, residuals, cotangents):
    arrays, documents = residuals
    _, pull = jax.vjp(lambda arrays: xla.selective_scan(**arrays, **documents, dt_softplus=softplus), arrays)
    return *pull(cotangents), None


few_tokens.defvjp(_few_tokens_fwd, _few_tokens_bwd)


def forward_chunks(arrays: Mapping[str, Any]) -> dict[int, int]:
    """Forward pass: maps channels per block to tokens per chunk, which are as many as fit into shared memory."""
    inputs = {name: arrays[name] for name in ("u", "dt", "B", "C", "z", "weights")}
    _, length, groups, states = inputs["B"].shape
    fit = {}
    for block in tuning.FORWARD:
        shortest = 512 // block  # the first warpgroup processes this many tokens at once
        sizes = [size for size in (64, 32, 16, 8, 4) if shortest <= size <= min(tuning.CHUNK[block], length)]
        fitting = (size for size in sizes or [shortest] if forward_bytes(block=block, chunk=size, **inputs) <= SHARED)
        if (chunk := next(fitting, None)) is not None:
            fit[block] = chunk
    good = {block: chunk for block, chunk in fit.items() if affordable(block, states, groups)}
    return good or fit


def backward_chunk(arrays: Mapping[str, Any]) -> int:
    """Tokens per chunk of the backward pass: as many as fit. The forward pass saves the states once for each chunk."""
    inputs = {name: arrays[name] for name in ("u", "dt", "B", "C", "z", "weights")}
    states = arrays["A"].shape[-1]
    return next((chunk for chunk in (8, 4) if backward_bytes(chunk=chunk, states=states, **inputs) <= SHARED), 4)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5, 6))
def _scan(arrays, marks, softplus, block, chunk, pieces, axis):
    """y [b, T', E'] and the final state; `arrays` are arguments of `forward`."""
    return _forward(arrays, marks, softplus, block, chunk, pieces[0], axis, save=False)[0]


def _forward(arrays, marks, softplus, block, chunk, pieces, axis, save):
    """(y, final state), and the states saved for the backward pass."""
    end = None
    if pieces > 1 or axis:
        start, arrays = arrays["initial_state"], {name: cut(name, x, pieces) for name, x in arrays.items()}
        marks = cut("marks", marks, pieces)
        inputs = {name: arrays[name] for name in ("u", "dt", "A", "B", "dt_bias")}
        stretches = stretches_of(
            arrays["A"], *mapped(end_of_state, softplus=softplus)(inputs | dict(marks=marks)), marks
        )
        if axis:
            start, end = across(axis, arrays["A"], start, stretches, pieces)
        arrays["initial_state"] = chain(start, stretches, pieces)
    run = mapped(forward, softplus=softplus, block=block, chunk=chunk[0], save=chunk[1] if save else 0)
    y, final, saved = run(arrays | dict(marks=marks))
    if pieces > 1:
        y = y.reshape(-1, pieces * y.shape[1], y.shape[2])
        final = final.reshape(-1, pieces, *final.shape[1:])[:, -1]
    return (y, final if end is None else end), saved


def _scan_fwd(arrays, marks, softplus, block, chunk, pieces, axis):
    out = _forward(arrays, marks, softplus, block, chunk, pieces[0], axis, save=True)
    out, saved = jax.tree.map(lambda x: checkpoint_name(x, "scan"), out)
    return out, (arrays, marks, saved)


def _scan_bwd(softplus, block, chunk, pieces, axis, residuals, cotangents):
    arrays, marks, saved = residuals
    dy, dfinal = cotangents
    if axis:
        dfinal = jax.lax.psum(dfinal, axis)  # every device holds a copy of the final state; their gradients add up
    batch, length, _, width = arrays["u"].shape
    pieces = pieces[1]
    saved = saved.reshape(batch * pieces, -1, *saved.shape[2:])
    inputs = {name: x for name, x in arrays.items() if name != "initial_state"}
    dy = dy[:, :length, :width]
    if pieces > 1 or axis:
        inputs = {name: cut(name, x, pieces) for name, x in inputs.items()}
        marks, dy = cut("marks", marks, pieces), cut("dy", dy, pieces)
        read = {name: x for name, x in inputs.items() if name not in ("u", "B", "D")}
        ends = mapped(end_of_gradient, softplus=softplus)(read | dict(marks=marks, dy=dy))
        stretches = stretches_of(arrays["A"], *ends, marks)
        if axis:
            dfinal, _ = across(axis, arrays["A"], dfinal, stretches, pieces, reverse=True)
        dfinal = chain(dfinal, stretches, pieces, reverse=True)
    run = mapped(backward, softplus=softplus, chunk=chunk[1])
    g = run(inputs | dict(marks=marks, saved=saved, dy=dy, dfinal=dfinal))
    dBC = jnp.sum(g["dBC"], axis=1)
    if pieces > 1:
        whole = {name: x.reshape(-1, pieces * x.shape[1], *x.shape[2:]) for name, x in g.items() if name in OVER_TIME}
        g = {**g, **whole, "dinitial": g["dinitial"].reshape(-1, pieces, *g["dinitial"].shape[1:])[:, 0]}
        dBC = dBC.reshape(-1, pieces * dBC.shape[1], *dBC.shape[2:])
    if axis:  # the initial state is that of the first device
        g = {**g, "dinitial": jnp.where(jax.lax.axis_index(axis) == 0, g["dinitial"], 0)}
    dB, dC = jnp.moveaxis(dBC[:, :length], 3, 0)
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
        D=jnp.sum(g["dD"][:, :, 0], axis=(0, 1)),
        z=None if arrays["z"] is None else jnp.sum(g["dz"][:, :length, :, :width], axis=2, dtype=jnp.float32),
        dt_bias=jnp.sum(g["dbias"], axis=(0, 1)),
        weights=dweights,
        initial_state=g["dinitial"],
    )
    gradients = {name: None if x is None else x.astype(arrays[name].dtype) for name, x in gradients.items()}
    return gradients, None


def cut(name: str, x: jax.Array | None, pieces: int) -> jax.Array | None:
    """Split the time of an array into pieces, each its own sequence: [b, T, ...] to [b pieces, T / pieces, ...]."""
    if x is None or name not in (*OVER_TIME, "marks"):
        return x
    return x.reshape(x.shape[0] * pieces, x.shape[1] // pieces, *x.shape[2:])


class Stretches(NamedTuple):
    """What stretches of time [b, ...] map the state before them to: decay * state + end.

    Attributes:
        decay: exp(A steps) [b, G, E', N], 0 if a document begins in the stretch.
        end: [b, G, E', N].
        steps: sum of the steps, [b, G, E'].
        begins: whether a document begins in it, [b] bool; None: without documents.
    """

    decay: jax.Array
    end: jax.Array
    steps: jax.Array
    begins: jax.Array | None


def stretches_of(A: jax.Array, end: jax.Array, steps: jax.Array, marks: jax.Array | None) -> Stretches:
    """The stretches of whole sequences, from the results of `summary`."""
    begins = None if marks is None else jnp.any(marks[..., 0] < 0, axis=1)
    return Stretches(forget(jnp.exp(A * steps[..., None]), begins), end, steps, begins)


def chain(start: jax.Array, stretches: Stretches, pieces: int, reverse: bool = False) -> jax.Array:
    """The state before each piece [b pieces, G, E', N], from the state before the first piece.

    With `reverse`: the state after each piece, from the state after the last piece.
    """
    decay, end, _, begins = by_sequence(stretches, pieces)
    states = chain_unrolled(decay, end, start, begins, reverse)
    return states.reshape(-1, *states.shape[2:])


def by_sequence(stretches: Stretches, pieces: int) -> Stretches:
    """The pieces of each sequence as the second axis: [b pieces, ...] to [b, pieces, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, pieces, *x.shape[1:]), stretches)


def across(
    axis: Axis, A: jax.Array, state: jax.Array, stretches: Stretches, pieces: int, reverse: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The state before this device's pieces of time and the state after all devices, from the state before them.

    With `reverse`: the state after this device's pieces and the state before all devices. Devices exchange the ends
    and the steps of their time.
    """
    own = by_sequence(stretches, pieces)
    last = 0 if reverse else pieces - 1
    before = chain_unrolled(own.decay, own.end, jnp.zeros_like(state), own.begins, reverse)[:, last]
    begins = None if own.begins is None else own.begins[:, last]
    end = own.decay[:, last] * forget(before, begins) + own.end[:, last]
    begins = None if own.begins is None else jnp.any(own.begins, axis=1)
    end, steps, begins = jax.lax.all_gather((end, jnp.sum(own.steps, axis=1), begins), axis)
    decay = forget(jnp.exp(A * steps[..., None]), begins)
    befores, after = chain_devices(decay, end, state, begins, reverse)
    return befores[jax.lax.axis_index(axis)], after


_scan.defvjp(_scan_fwd, _scan_bwd)
