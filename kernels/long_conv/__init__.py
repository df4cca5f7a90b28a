"""The long convolution: causal, of every channel with its own filter, which may be as long as the sequence.

    y_t = sum_k weight_k x_{t - k} + skip x_t          over the tokens of t's document

S4, S4D and H3 are trained by it, as their recurrence is the same for all tokens, and Hyena has no other form. It has no
state: what goes on from a state is a recurrence (`linear_scan`), or reads a cache (Hyena). `diagonal.py` and `dplr.py`
compute the filters of state space models.
"""

import functools

import jax
import jax.numpy as jnp

from seqmodels.kernels import dispatch
from seqmodels.kernels.arrays import zero_padding
from seqmodels.kernels.axes import DOCUMENTS, Axes, Layout
from seqmodels.kernels.long_conv import reference, xla
from seqmodels.kernels.segments import resets

BACKENDS = {"reference": reference, "xla": xla}
WINNERS = {"default": ("xla",)}
IMPLEMENTATIONS = tuple(BACKENDS)

# Every token needs all earlier ones, so time stays whole on each device.
TOKENS: Axes = ("batch", None)
ROWS: Axes = (*TOKENS, "inner")
WHOLE = {name: tuple(None if axis == "length" else axis for axis in axes) for name, axes in DOCUMENTS.items()}
LAYOUT = Layout(dict(x=ROWS, weight=(None, "inner"), skip=("inner",), **WHOLE), (ROWS,))

choose = functools.partial(dispatch.choose, "long_conv", BACKENDS, WINNERS)


def axes(**arrays: object) -> Layout:
    """Logical axes of the arrays and the result of `long_conv`."""
    return LAYOUT


def long_conv(
    x: jax.Array,
    weight: jax.Array,
    skip: jax.Array | None = None,
    *,
    segment_ids: jax.Array | None = None,
    initial_segment: jax.Array | None = None,
    mask: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Causal convolution with a long filter. Differentiable in x, weight and skip.

    Args:
        x: [B, T, E], in any floating dtype.
        weight: [L, E], the taps, of which the first multiplies the token itself. Tokens L or more ago have no effect.
            Where L is greater than T, the other taps are not used.
        skip: [E] or None, added to the first tap.
        segment_ids: [B, T] int32; tokens see only their own document, which ends at any change of id. Infinity and NaN
            of one document reach no output and no gradient of another.
        initial_segment: [B] int32. It changes nothing, as nothing comes before the first token.
        mask: [B, T] bool. A token with False is skipped: no token sees it, and its output is zero.
        implementation: one of `IMPLEMENTATIONS`. None: the fastest that supports the call.

    Returns:
        y [B, T, E] in x's dtype, computed in float32 (float64 for float64 arguments).

    Raises:
        UnsupportedError: the named implementation is unknown or does not support the call.
        ValueError: shapes do not fit.
    """
    check(x, weight, skip, segment_ids, mask)
    dtype = jnp.result_type(x, weight, jnp.float32)
    weight = jnp.asarray(weight[: x.shape[1]], dtype)
    if skip is not None:
        weight = weight.at[0].add(skip.astype(dtype))
    reset = resets(segment_ids, None, mask)
    inputs = zero_padding(x, mask).astype(dtype)
    if mask is not None:  # real tokens to the front: the convolution never meets padding
        order = jnp.argsort(~mask, axis=1, stable=True)
        inputs = jnp.take_along_axis(inputs, order[..., None], axis=1)
        reset = None if reset is None else jnp.take_along_axis(reset, order, axis=1)
    document = jnp.zeros(x.shape[:2], jnp.int32) if reset is None else jnp.cumsum(reset, axis=1, dtype=jnp.int32)

    def call(backend, inputs, weight, document):
        return backend.long_conv(inputs, weight, document if reset is not None else None)

    facts = dict(shape=x.shape, taps=weight.shape[0], dtype=x.dtype)
    y = dispatch.dispatch("long_conv", BACKENDS, WINNERS, implementation, facts, call, inputs, weight, document)
    if mask is not None:
        rank = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        y = zero_padding(jnp.take_along_axis(y, rank[..., None], axis=1), mask)
    return y.astype(x.dtype)


def check(
    x: jax.Array,
    weight: jax.Array,
    skip: jax.Array | None,
    segment_ids: jax.Array | None,
    mask: jax.Array | None,
) -> None:
    """Raise a ValueError unless the arguments fit together."""
    if x.ndim != 3 or not x.shape[1]:
        raise ValueError(f"long_conv: x has shape {x.shape}; allowed: [B, T, E] with T of 1 or more")
    batch, length, channels = x.shape
    if weight.ndim != 2 or not len(weight) or weight.shape[1] != channels:
        raise ValueError(f"long_conv: weight has shape {weight.shape}; allowed with x {x.shape}: (L, {channels})")
    want = dict(skip=(skip, (channels,)), segment_ids=(segment_ids, (batch, length)), mask=(mask, (batch, length)))
    for name, (array, shape) in want.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"long_conv: {name} has shape {array.shape}; allowed with x {x.shape}: {shape}")
