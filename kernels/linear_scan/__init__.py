"""The linear scan: a diagonal recurrence over time, each channel by itself.

    h_t = exp(log_decay_t) h_{t-1} + x_t          or, in reverse, exp(log_decay_t) h_{t+1} + x_t

HGRN, RG-LRU, minGRU, S5 and LRU are cases of it, the last two with complex numbers. It returns every state; where only
a readout of the states is wanted, `selective_scan` is faster, because it never writes them.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from seqmodels.kernels import dispatch
from seqmodels.kernels.arrays import zero_padding
from seqmodels.kernels.axes import DOCUMENTS, TOKENS, Layout
from seqmodels.kernels.linear_scan import mosaic_gpu, mosaic_tpu, reference, xla

BACKENDS = {"reference": reference, "xla": xla, "mosaic_gpu": mosaic_gpu, "mosaic_tpu": mosaic_tpu}
# By platform, fastest first as measured (an H200); the last one serves everything.
WINNERS = {"cuda": ("mosaic_gpu", "xla"), "default": ("xla",)}
IMPLEMENTATIONS = tuple(BACKENDS)


def choose(platform: str, shape: tuple[int, ...] = (8, 2048, 4096), **facts: object) -> tuple[str, str]:
    """Name of the default implementation on a platform for a shape [B, T, D], and the reason."""
    usual = dict(dtype=jnp.dtype("bfloat16"), accumulator=jnp.dtype("float32"))
    return dispatch.choose("linear_scan", BACKENDS, WINNERS, platform, shape=shape, **usual | facts)


def axes(x: jax.Array, **others: object) -> Layout:
    """Logical axes of the arrays and results of `linear_scan`. Axes between time and the last one stay whole."""
    channels = (*[None] * (x.ndim - 3), "inner")
    tokens, state = (*TOKENS, *channels), ("batch", *channels)
    return Layout(dict(log_decay=tokens, x=tokens, initial_state=state, **DOCUMENTS), (tokens, state))


def linear_scan(
    log_decay: jax.Array,
    x: jax.Array,
    *,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    initial_segment: jax.Array | None = None,
    mask: jax.Array | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Linear scan over time. Both results are differentiable in log_decay, x and initial_state.

    Args:
        log_decay: [B, T, (..,) D] logarithm of the decay; -inf drops the state. Float32 is advised: in 16 bits a decay
            near 1 loses its memory. Complex64 for decays that rotate; then x is complex, too.
        x: [B, T, (..,) D] what is added to the state; float32, bfloat16, float16, float64, complex64 or complex128.
        initial_state: [B, (..,) D], before the first token. None: zeros. In reverse it is after the last token.
        segment_ids: [B, T] int32; a change of id drops the state, at any position. Infinity and NaN of one document
            (or of a dropped initial_state) reach no output and no gradient of another.
        initial_segment: [B] int32, segment of initial_state. None: the segment of the first real token (in reverse, of
            the last one).
        mask: [B, T] bool. A token with False does not change the state, and its inputs (even NaN) are ignored. Its
            output is zero.
        reverse: whether time runs from the last token to the first.
        implementation: one of `IMPLEMENTATIONS`. None: the fastest that supports the call.

    Returns:
        h [B, T, (..,) D], the state after every token, in x's dtype, and the final state [B, (..,) D] in float32
        (float64, complex64 or complex128 if an argument is so). States and decays are computed in that dtype. The
        gradient of log_decay takes h as it was returned, so with 16 bits it has their precision.

    Raises:
        UnsupportedError: the named implementation is unknown or does not support the call.
        ValueError: shapes or dtypes do not fit.
    """
    documents = dict(segment_ids=segment_ids, initial_segment=initial_segment, mask=mask)
    check(log_decay, x, initial_state, **documents)
    accumulator = jnp.result_type(log_decay, x, jnp.float32)
    if jnp.iscomplexobj(x):
        log_decay = log_decay.astype(accumulator)
    if mask is not None:  # where, not a product: padding may hold anything
        log_decay, x = zero_padding(log_decay, mask), zero_padding(x, mask)
    batch, length, *channels = x.shape
    if initial_state is None:
        initial_state = jnp.zeros((batch, *channels), accumulator)
    flat = (batch, length, math.prod(channels))

    def call(backend: Any, arrays: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        return backend.linear_scan(**arrays, reverse=reverse)

    arrays = dict(log_decay=log_decay.reshape(flat), x=x.reshape(flat), **documents)
    arrays |= dict(initial_state=initial_state.astype(accumulator).reshape(batch, flat[2]))
    facts = dict(shape=flat, dtype=x.dtype, accumulator=accumulator)
    h, state = dispatch.dispatch("linear_scan", BACKENDS, WINNERS, implementation, facts, call, arrays)
    return zero_padding(h.reshape(x.shape), mask), state.reshape(batch, *channels)


def check(
    log_decay: jax.Array,
    x: jax.Array,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    initial_segment: jax.Array | None,
    mask: jax.Array | None,
) -> None:
    """Raise a ValueError unless the arguments fit together."""
    if x.ndim < 3:
        raise ValueError(f"linear_scan: x has shape {x.shape}; allowed: [B, T, D], or more axes before the last one")
    batch, length, *channels = x.shape
    if not length:
        raise ValueError("linear_scan: T is 0; allowed: 1 or more")
    if jnp.iscomplexobj(log_decay) and not jnp.iscomplexobj(x):
        raise ValueError(f"linear_scan: log_decay is {log_decay.dtype} and x {x.dtype}; allowed: a complex x")
    want: dict[str, tuple[jax.Array | None, tuple[int, ...]]] = dict(
        log_decay=(log_decay, x.shape),
        initial_state=(initial_state, (batch, *channels)),
        segment_ids=(segment_ids, (batch, length)),
        initial_segment=(initial_segment, (batch,)),
        mask=(mask, (batch, length)),
    )
    for name, (array, shape) in want.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"linear_scan: {name} has shape {array.shape}; allowed with x {x.shape}: {shape}")
