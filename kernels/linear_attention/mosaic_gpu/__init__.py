"""Linear attention as Pallas Mosaic GPU kernels, for Hopper: matrix products of 64 x 64 tiles by the tensor cores.

The forward pass is one kernel (`walk`), which goes through time and keeps the states in registers. If K is above 256,
it is two kernels: the first writes the states to memory, and the second reads them. The backward pass recomputes the
state before each chunk. Then it goes back through time for the gradients of values and states. Last, it computes the
gradients of queries, keys and decays for each chunk separately.

If there are too few heads to fill the GPU, time is split into stretches that run in parallel. The state before each
stretch is computed first, by a `walk` without readouts. All channels of a head share one decay, which may depend on the
token.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from seqmodels.kernels import lanes
from seqmodels.kernels.arrays import mapped, pad, round_up
from seqmodels.kernels.finite import finite_or_zero, not_finite, spoil
from seqmodels.kernels.interpreter import gpu_interpreter
from seqmodels.kernels.isolate import isolate
from seqmodels.kernels.lanes import LN2
from seqmodels.kernels.linear_attention.mosaic_gpu.decay import exponents, gradient, spoilt_reads, starts, vectors
from seqmodels.kernels.linear_attention.mosaic_gpu.keys import keys_gradient
from seqmodels.kernels.linear_attention.mosaic_gpu.readout import readout
from seqmodels.kernels.linear_attention.mosaic_gpu.walk import walk
from seqmodels.kernels.segments import resets
from seqmodels.kernels.tensor_cores import SIDE

WIDEST = 256  # largest K for which one warpgroup can hold the states while it reads them
LEAST = 16  # up to so many tokens, a chunk is not worthwhile
FACTORS = jnp.bfloat16  # dtype of factors in products: states and scores of float16 inputs may overflow float16
DTYPES = ("bfloat16", "float16")


def supports(
    platform: str,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    decay: str,
    chunk: int | None = None,
    named: bool = False,
    **facts: object,
) -> str | None:
    """Why this backend cannot serve the call, or, unless requested by name, why another is faster. None: it can."""
    batch, length, _, heads, _, values = shape
    if platform != "cuda" and not gpu_interpreter():
        return "it needs an NVIDIA GPU"
    if length <= LEAST and not named:
        return f"T is {length}: up to {LEAST} tokens are not worth a chunk of {SIDE}"
    if (capability := lanes.compute_capability() or 9) != 9:
        return f"it needs an NVIDIA GPU of compute capability 9.0 (Hopper), this one has {capability}"
    if jnp.dtype(dtype).name not in DTYPES:
        return f"arrays are {jnp.dtype(dtype).name}; it multiplies bfloat16 numbers, and takes {', '.join(DTYPES)}"
    if decay == "channel":
        return "log_decay is [B, T, H, K]; it takes decays of the head"
    if min(batch, length) < 1 or max(batch * heads, heads * values // SIDE) > 65535:
        return f"B is {batch}, T {length}, H {heads}, V {values}; its grid has 1 to 65535 blocks on an axis"
    return None


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
    """As `kernels.linear_attention.linear_attention`, with padding set to zero; y in `dtype`. `chunk` is always 64."""
    batch, length, heads, values = v.shape
    keys = k.shape[-1]
    strict = read == "exclusive"
    reset = resets(segment_ids, initial_segment, mask)
    if log_decay is not None:
        log_decay = jnp.broadcast_to(log_decay, (batch, length, heads))
    q, (k, v), log_decay, spoilt = isolate(q, (k, v), log_decay, reset)
    own = None if bonus is None else own_token(q, k, v, bonus, scale)
    if scale <= 0:  # the kernels add the logarithm of the scale to those of the decays, so it must be positive
        q, scale = q * scale, 1.0
    q, k, v = (x.astype(FACTORS) for x in (q, k, v))
    pieces = stretches(batch * heads * -(-values // SIDE), length)
    tokens = round_up(length, SIDE * pieces)
    wide, deep = round_up(values, SIDE), round_up(keys, SIDE)
    arrays = dict(
        q=pad(q, {1: tokens, -1: deep}),
        k=pad(k, {1: tokens, -1: deep}),
        v=pad(v, {1: tokens, -1: wide}),
        g=exponents(log_decay, reset, (batch, length, heads), tokens),
        initial_state=pad(initial_state.astype(jnp.float32), {-2: deep, -1: wide}),
        spoilt=None if spoilt is None else pad(spoilt.reads, {1: tokens}).reshape(batch, -1, SIDE),
    )
    once = jnp.dtype(dtype) == FACTORS and bonus is None  # the kernel rounds y; otherwise y is rounded at the end
    y, state = attend(arrays, float(scale), strict, pieces, FACTORS if once else jnp.float32)
    y, state = y[:, :length, :, :values], state[:, :, :keys, :values]
    state = state if spoilt is None else spoil(state, spoilt.writes[:, -1])
    return (y if own is None else y + own).astype(dtype), state


def own_token(q: jax.Array, k: jax.Array, v: jax.Array, bonus: jax.Array, scale: float) -> jax.Array:
    """scale (q_t . (u * k_t)) v_t: [B, T, H, V] float32."""
    batch, length, heads, keys = q.shape
    group = v.shape[2] // heads
    q, k = (x.astype(jnp.float32) for x in (q, k))
    weight = jnp.einsum("bthk,hgk->bthg", q * k, bonus.astype(jnp.float32).reshape(heads, group, keys))
    return scale * weight.reshape(batch, length, heads * group, 1) * v


def stretches(blocks: int, length: int) -> int:
    """Number of stretches of time that run in parallel: as few as fill the GPU, of at least 512 tokens each."""
    pieces = 1
    while pieces * blocks < lanes.processors() * 3 // 4 and length >= 1024 * pieces:
        pieces *= 2
    return pieces


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def attend(
    arrays: dict[str, Any], scale: float, strict: bool, pieces: int, dtype: DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """y in `dtype` and the final state. The arrays are padded to whole chunks and tiles.

    arrays: q, k, v, g, initial_state; and spoilt, [B, T / 64, 64] bool, tokens whose y is NaN, or None if there is one
        document.
    """
    return forward(arrays, scale, strict, pieces, dtype)[0]


def forward(
    arrays: dict[str, Any], scale: float, strict: bool, pieces: int, dtype: DTypeLike
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """(y, final state), and the states before each stretch."""
    ahead, _ = vectors(arrays["g"], scale, strict)
    inputs = dict(k=arrays["k"], v=arrays["v"], vectors=spoilt_reads(ahead, arrays["spoilt"]))
    start = begin(inputs, arrays["initial_state"], arrays["g"], pieces, reverse=False)
    y, final, _ = attended(arrays["q"], inputs, start, reverse=False, strict=strict, save=False, dtype=dtype)
    return (y, final[:, -1]), start


def begin(inputs: dict[str, jax.Array], state: jax.Array, g: jax.Array, pieces: int, reverse: bool) -> jax.Array:
    """The state before each stretch, [B, S, H, K, V], from the state before the first stretch.

    With `reverse`: the state after each stretch, from the state after the last one.
    """
    if pieces == 1:
        return state[:, None]
    nothing = jnp.zeros((state.shape[0], pieces, *state.shape[1:]))
    ends, _ = states_of(inputs, nothing, reverse, save=False)
    return starts(state, ends, g, pieces, reverse)


def states_of(
    inputs: dict[str, jax.Array], start: jax.Array, reverse: bool, save: bool
) -> tuple[jax.Array, jax.Array | None]:
    """The state after each stretch; and, with `save`, the state before each chunk, else None."""
    options = dict(x=None, reverse=reverse, strict=False, save=save, dtype=None)
    return mapped(walk, **options)(inputs | dict(initial_state=start))[1:]


def attended(
    x: jax.Array, inputs: dict[str, jax.Array], start: jax.Array, *, save: bool, **options: Any
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Results of `walk` with readouts, for a state of any size."""
    if x.shape[-1] <= WIDEST:
        return mapped(walk, save=save, **options)(inputs | dict(x=x, initial_state=start))
    final, states = states_of(inputs, start, options["reverse"], save=True)
    y = mapped(readout, **options)(inputs | dict(x=x, states=states))
    return y, final, states


def attend_forward(
    arrays: dict[str, Any], *options: Any
) -> tuple[tuple[jax.Array, jax.Array], tuple[dict[str, Any], jax.Array]]:
    out, start = jax.tree.map(lambda x: checkpoint_name(x, "scan"), forward(arrays, *options))
    return out, (arrays, start)


def attend_backward(
    scale: float,
    strict: bool,
    pieces: int,
    dtype: DTypeLike,
    residuals: tuple[dict[str, Any], jax.Array],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[dict[str, Any]]:
    arrays, start = residuals
    dy, dfinal = cotangents
    q, k, v, g = (arrays[name] for name in ("q", "k", "v", "g"))
    ahead, back = vectors(g, scale, strict)
    _, states = states_of(dict(k=k, v=v, vectors=ahead), start, reverse=False, save=True)
    packed = arrays["spoilt"] is not None
    bad = not_finite(dy) if packed else None
    dy = (finite_or_zero(dy) if packed else dy).astype(FACTORS)
    inputs = dict(k=q, v=dy, vectors=back)
    end = begin(inputs, dfinal, g, pieces, reverse=True)
    dv, dstart, dstates = attended(k, inputs, end, reverse=True, strict=strict, save=True, dtype=FACTORS)
    dq, dk, sums = mapped(keys_gradient, strict=strict)(
        dict(q=q, k=k, v=v, dy=dy, vectors=ahead, states=states, dstates=dstates)
    )
    dg = gradient(sums, ahead[..., 4, :], strict) * LN2
    dq = dq if bad is None else spoil(dq, bad)  # so that a gradient that is not finite does not go unnoticed
    return (dict(q=dq, k=dk, v=dv, g=dg, initial_state=dstart[:, 0], spoilt=None),)


attend.defvjp(attend_forward, attend_backward)
