"""The short convolution of a few tokens on Hopper, as in decoding: one kernel that updates the state in place.

A thread processes 4 neighbouring channels of a row. It loads the state and the tokens. Then it stores the outputs, and
overwrites the state with the last W - 1 inputs. XLA needs three kernels: for the outputs, for the new state, and for a
copy of the new state over the old one.
"""

import functools

import jax
from jax import lax

from seqmodels.kernels import lanes
from seqmodels.kernels.lanes import THREADS, load_vector, store_vector, thread_index
from seqmodels.kernels.short_conv.tuning import CHANNELS
from seqmodels.kernels.tuning import UNROLLED


def supports(batch: int, length: int, channels: int, documents: bool) -> str | None:
    """Why the kernel cannot serve; None: it can. documents: whether there are segments or padding."""
    if length > UNROLLED:
        return f"T is {length}; it writes out at most {UNROLLED} tokens"
    if documents:
        return "there are documents or padding"
    if channels % CHANNELS or batch * channels % (THREADS * CHANNELS):
        return f"{batch} x {channels} channels are not a multiple of {THREADS * CHANNELS}"
    return None


@functools.partial(jax.jit, static_argnames="activation")  # traced once per shape, not per layer
def few(
    x: jax.Array, weight: jax.Array, bias: jax.Array | None, state: jax.Array, *, activation: str | None
) -> tuple[jax.Array, jax.Array]:
    """y [B, T, E] and the final state, which reuses the memory of `state` if that is donated.

    Args:
        x: [B, T, E]. weight: [W, E]; bias: [E] or None; state: [B, W - 1, E]; float32. activation: "silu" or None.
    """
    batch, length, channels = x.shape
    taps = weight.shape[0]
    arrays = dict(x=x, weight=weight) | ({} if bias is None else dict(bias=bias))
    quads = channels // CHANNELS

    def body(*refs):
        *sources, state_g, y_g = refs
        sources = dict(zip(arrays, sources, strict=True))
        lane = thread_index()
        number = lax.axis_index("block") * THREADS + lane
        channel, row = lax.rem(number, quads) * CHANNELS, lax.div(number, quads)
        old, tokens = row * ((taps - 1) * channels) + channel, row * (length * channels) + channel
        inputs = [load_vector(state_g, old, CHANNELS, at=k * channels) for k in range(taps - 1)]
        inputs += [load_vector(sources["x"], tokens, CHANNELS, at=t * channels) for t in range(length)]
        weights = [load_vector(sources["weight"], channel, CHANNELS, at=k * channels) for k in range(taps)]
        start = load_vector(sources["bias"], channel, CHANNELS) if "bias" in sources else lanes.zeros(CHANNELS)
        for t in range(length):
            y = start
            for x, w in zip(inputs[t : t + taps], weights, strict=True):
                y = tuple(total + a * b for total, a, b in zip(y, x, w, strict=True))
            y = tuple(v * lanes.sigmoid(v) for v in y) if activation == "silu" else y
            store_vector(y_g, tokens, y, at=t * channels)
        for k, x in enumerate(inputs[length:]):
            store_vector(state_g, old, x, at=k * channels)

    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    kernel = lanes.kernel(
        body,
        out_type=out,
        grid=(batch * quads // THREADS,),
        grid_names=("block",),
    )
    return lanes.in_place(kernel, arrays.values(), state, out)
