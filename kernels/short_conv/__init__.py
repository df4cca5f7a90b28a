"""Causal depthwise convolution over a few tokens, with a state, packed documents and padding."""

import functools
from typing import Any

import jax

from seqmodels.kernels import dispatch
from seqmodels.kernels.axes import DOCUMENTS, TOKENS, Axes, Layout
from seqmodels.kernels.short_conv import mosaic_gpu, mosaic_tpu, reference, xla

BACKENDS = {"reference": reference, "xla": xla, "mosaic_gpu": mosaic_gpu, "mosaic_tpu": mosaic_tpu}
WINNERS = {"cuda": ("mosaic_gpu", "xla"), "default": ("xla",)}  # by platform, fastest first as measured
IMPLEMENTATIONS = tuple(BACKENDS)


CHANNELS: Axes = (*TOKENS, "inner")
STATE: Axes = ("batch", None, "inner")
LAYOUT = Layout(
    dict(x=CHANNELS, weight=(None, "inner"), bias=("inner",), initial_state=STATE, **DOCUMENTS), (CHANNELS, STATE)
)


def axes(**arrays: object) -> Layout:
    """Logical axes of the arrays and results of `short_conv`."""
    return LAYOUT


def short_conv(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    activation: str | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    initial_segment: jax.Array | None = None,
    mask: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """y_t = activation(bias + sum_k weight[W-1-k] x_{t-k}), channel by channel, over the real tokens of a document.

    Args:
        x: [B, T, E].
        weight: [W, E] with W from 2 to 8; the last row multiplies the current token.
        bias: [E] or None.
        activation: None or "silu".
        initial_state: [B, W-1, E], the real inputs before the first token, oldest first. None: zeros.
        segment_ids: [B, T] int32; tokens see only their own document, which ends at any change of id.
        initial_segment: [B] int32, document of the state. None: the document of the first real token.
        mask: [B, T] bool. A token with False is skipped: no later token sees it, and its own output is zero.
        implementation: one of `IMPLEMENTATIONS`. None: the fastest on the platform.

    Returns:
        y [B, T, E] in the dtype of x, and the final state [B, W-1, E]: the last W-1 real inputs of the last real
        token's document, with zeros if the document has fewer. States and sums are float32 (float64 with float64
        arguments). Differentiable in x, weight, bias and initial_state.

    Raises:
        ValueError: shapes that do not fit, an unknown activation.
        seqmodels.kernels.dispatch.UnsupportedError: the named implementation cannot serve.
    """
    facts = check(x, weight, bias, activation, initial_state)
    facts["documents"] = segment_ids is not None or mask is not None

    def call(backend, x, weight, bias, initial_state, segment_ids, initial_segment, mask):
        return backend.short_conv(
            x,
            weight,
            bias,
            activation=activation,
            initial_state=initial_state,
            segment_ids=segment_ids,
            initial_segment=initial_segment,
            mask=mask,
        )

    arrays = (x, weight, bias, initial_state, segment_ids, initial_segment, mask)
    return dispatch.dispatch("short_conv", BACKENDS, WINNERS, implementation, facts, call, *arrays)


choose = functools.partial(dispatch.choose, "short_conv", BACKENDS, WINNERS)


def check(
    x: jax.Array, weight: jax.Array, bias: jax.Array | None, activation: str | None, initial_state: jax.Array | None
) -> dict[str, Any]:
    """Raise a ValueError unless the arguments fit together; return the static facts of the call."""
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[1] != x.shape[2]:
        raise ValueError(f"short_conv: x must be [B, T, E] and weight [W, E], got {x.shape} and {weight.shape}")
    batch, length, channels = x.shape
    taps = weight.shape[0]
    if not 2 <= taps <= 8:
        raise ValueError(f"short_conv: weight must have 2 to 8 taps, got {taps}")
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"short_conv: bias must be [{channels}], got {bias.shape}")
    if initial_state is not None and initial_state.shape != (batch, taps - 1, channels):
        raise ValueError(f"short_conv: initial_state must be {(batch, taps - 1, channels)}, got {initial_state.shape}")
    if activation not in (None, "silu"):
        raise ValueError(f"short_conv: activation must be None or 'silu', got {activation!r}")
    return dict(batch=batch, length=length, channels=channels, taps=taps, dtype=x.dtype)
