"""The gradient of a source of Attention Residuals as one Pallas Mosaic GPU kernel, for Hopper and later.

The 32 threads of a warp share the channels of a token, and keep the source and the sum of its gradient in registers.
So the gradient of what each step has read comes from memory once: for its product with the source, a sum over the
warp's threads, and then, still in registers, for the sum. The scores are a matrix product, and are left to XLA.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from seqmodels.kernels import lanes
from seqmodels.kernels.arrays import mapped
from seqmodels.kernels.attn_residual import reference
from seqmodels.kernels.interpreter import gpu_interpreter
from seqmodels.kernels.lanes import Lanes, load_vector, store_vector
from seqmodels.kernels.warps import WARP, Share, Warp, across, dot, launch, plus

f32 = jnp.float32
DTYPES = ("bfloat16", "float16", "float32")
WIDEST = 1536  # channels; of more, three numbers each do not fit into the registers of a warp
MOST = 128  # steps, each with an array of its own
AHEAD = 2  # steps whose arrays are asked for before they are needed
SHARE = Share(1, 16)


def supports(
    platform: str, shape: tuple[int, ...] = (8, 2048, 768, 24), dtype: DTypeLike = "bfloat16", **facts: object
) -> str | None:
    """Why this backend cannot serve the call; None: it can. The shape is B, T, D, K."""
    batch, length, width, steps = shape
    if platform != "cuda" and not gpu_interpreter():
        return "it needs an NVIDIA GPU"
    if (capability := lanes.compute_capability() or 9) < 9:
        return f"it needs an NVIDIA GPU of compute capability 9.0 (Hopper) or later, this one has {capability}"
    if jnp.dtype(dtype).name not in DTYPES:
        return f"sources are {jnp.dtype(dtype).name}; it takes {', '.join(DTYPES)}"
    if width % WARP or width > WIDEST:
        return f"D is {width}; it takes multiples of {WARP} up to {WIDEST}"
    if steps > MOST:
        return f"{steps} steps read a source; it takes at most {MOST}"
    if min(shape) < 1 or batch * length * max(width, steps) >= 2**31:
        return f"a source has {batch * length * width} elements; it addresses 1 to 2^31 - 1"
    return None


def attn_residual(value: jax.Array, mean_square: jax.Array, vectors: jax.Array, *, eps: float) -> tuple[jax.Array, ...]:
    """See `kernels.attn_residual.attn_residual`."""
    return reference.source(gradient, eps, value, mean_square, vectors)


def gradient(
    value: jax.Array,
    scores: jax.Array,
    reciprocal: jax.Array,
    vectors: jax.Array,
    reads: tuple[jax.Array, ...],
    weights: jax.Array,
    offsets: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """See `kernels.attn_residual.reference.gradient`."""
    tokens, width = math.prod(value.shape[:2]), value.shape[2]
    rows = {f"read_{k}": x.reshape(tokens, width) for k, x in enumerate(reads)}
    numbers = dict(scores=scores, weights=weights, offsets=offsets)
    numbers = {name: x.reshape(-1, tokens) for name, x in numbers.items()}
    own = dict(value=value.reshape(tokens, width), reciprocal=reciprocal.reshape(tokens), vectors=vectors)
    dvalue, dproducts = mapped(backward)(rows | numbers | own)
    return dvalue.reshape(value.shape), dproducts.reshape(scores.shape)


@jax.jit  # traced once per shape
def backward(
    *,
    value: jax.Array,
    scores: jax.Array,
    reciprocal: jax.Array,
    vectors: jax.Array,
    weights: jax.Array,
    offsets: jax.Array,
    **reads: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of the source [M, D], and of its products with `vectors` [K, M].

    Args:
        value: [M, D]. scores, weights, offsets: [K, M] float32. reciprocal: [M] float32. vectors: [K, D].
        **reads: arrays [M, D], read_0 to read_{K - 1}.
    """
    tokens, width = value.shape
    steps = len(reads)

    def body(value_g, scores_g, reciprocal_g, vectors_g, weights_g, offsets_g, once_g, *refs):
        reads_g, (dvalue_g, dproducts_g) = refs[:steps], refs[steps:]
        warp = Warp(SHARE, tokens, width, value.dtype)
        (token,), (zero,), once = warp.tokens, lanes.zeros(1), once_g[0]
        warp.prefetch(*reads_g[:AHEAD])
        channels = [first + warp.lane * warp.vector for first in range(0, width, WARP * warp.vector)]

        def row(ref, index) -> Lanes:
            """The thread's numbers of a row, of all rounds."""
            return sum((warp.load(ref, index * width + channel) for channel in channels), ())

        v, total, norm = row(value_g, token), (zero,) * (width // WARP), zero
        (r,) = warp.scalars(reciprocal_g, token, 1)
        products = [zero] * -(-steps // WARP)  # the thread k has that of step k
        for k in range(steps):
            if k + AHEAD < steps:
                warp.prefetch(reads_g[k + AHEAD])

            # Runs once, which only the running program knows: else the compiler would load the numbers of many steps at
            # once, or keep them for sums at the end, and has no registers for them.
            def add(_, sums, k=k):
                total, norm, product = sums
                a, d, score = (load_vector(x, token, 1, at=k * tokens)[0] for x in (weights_g, offsets_g, scores_g))
                g = row(reads_g[k], token)
                dscore = a * (across(dot(g, v, zero)) - d)
                total = plus(plus(total, a, g), dscore * r, row(vectors_g, 0 * token + k))
                return total, norm + dscore * score, jnp.where(warp.lane >= k % WARP, dscore * r, product)

            total, norm, products[k // WARP] = lax.fori_loop(0, once, add, (total, norm, products[k // WARP]))
        total = plus(total, -r * r * norm * f32(1 / width), v)
        for i, channel in enumerate(channels):
            store_vector(dvalue_g, token * width + channel, total[i * warp.vector : (i + 1) * warp.vector])
        for i, product in enumerate(products):
            step = jnp.minimum(i * WARP + warp.lane, steps - 1)  # threads behind the last step store its number again
            store_vector(dproducts_g, step * tokens + token, (product,))

    sds = jax.ShapeDtypeStruct
    out = [sds(value.shape, value.dtype), sds(weights.shape, value.dtype)]
    once = jnp.ones(1, jnp.int32)
    rows = [reads[f"read_{k}"] for k in range(steps)]
    return launch(body, out, tokens, SHARE)(value, scores, reciprocal, vectors, weights, offsets, once, *rows)
