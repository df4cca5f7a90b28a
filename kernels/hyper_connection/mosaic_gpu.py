"""A step of hyper-connections as Pallas Mosaic GPU kernels, for Hopper and later: one forward, one backward.

The 32 threads of a warp share the channels of a token, so its sums over channels are exchanges in the warp, and warps
share nothing. A warp goes through the channels twice: for the sums, and for what depends on them. The second time it
finds its numbers in the caches of the GPU, because few tokens are under way at once; so memory is read once. It asks
for all of its tokens' numbers at the start: those of one round are too few to keep the memory busy.

With g the gradient of X', e that of u, and r the reciprocal of the root mean square, that of what X' is rounded from is

    G_i = g_i + pre_i e + sum_k r dc_k W_ik - r^2 / (n D) (sum_k dc_k c_k) X'_i,
    dc = [a_p dp, a_q dq],    dp_i = (e . X'_i) pre_i (1 - pre_i),    dq = dpost post (1 - post / 2),

where p and q include their biases. The gradient of X_i is G_i, that of s_i is G_i . y, and that of y is sum_i s_i G_i.
Only sums over tokens are left to XLA: the gradients of W, a and b.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from seqmodels.kernels import lanes
from seqmodels.kernels.arrays import mapped
from seqmodels.kernels.interpreter import gpu_interpreter
from seqmodels.kernels.lanes import store_vector
from seqmodels.kernels.warps import WARP, Share, Warp, across, combined, dot, launch, plus

f32 = jnp.float32
DTYPES = ("bfloat16", "float16", "float32")
MOST = 4  # streams; with more, a thread's numbers do not fit into its registers


# The fastest on an H200 (benchmarks/notes/depth.md); with their registers three warpgroups fit on a multiprocessor.
FORWARD, BACKWARD = Share(2, 16), Share(1, 16)


def supports(
    platform: str, shape: tuple[int, ...] = (8, 2048, 4, 768), dtype: DTypeLike = "bfloat16", **facts: object
) -> str | None:
    """Why this backend cannot serve the call; None: it can."""
    batch, length, count, width = shape
    if platform != "cuda" and not gpu_interpreter():
        return "it needs an NVIDIA GPU"
    if (capability := lanes.compute_capability() or 9) < 9:
        return f"it needs an NVIDIA GPU of compute capability 9.0 (Hopper) or later, this one has {capability}"
    if jnp.dtype(dtype).name not in DTYPES:
        return f"streams are {jnp.dtype(dtype).name}; it takes {', '.join(DTYPES)}"
    if count > MOST:
        return f"there are {count} streams; it takes at most {MOST}"
    if width % WARP:
        return f"D is {width}; it takes multiples of {WARP}"
    if min(shape) < 1 or batch * length * count * width >= 2**31:
        return f"streams have {batch * length * count * width} elements; it addresses 1 to 2^31 - 1"
    return None


def hyper_connection(
    streams: jax.Array,
    y: jax.Array,
    weights: jax.Array,
    matrix: jax.Array,
    scale: jax.Array,
    pre_bias: jax.Array,
    post_bias: jax.Array,
    *,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `kernels.hyper_connection.hyper_connection`."""
    flat = [x.reshape(-1, *x.shape[2:]) for x in (streams, y, weights)]
    new, u, post = _step(eps, *flat, matrix, scale, pre_bias, post_bias)
    return new.reshape(streams.shape), u.reshape(y.shape), post.reshape(weights.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _step(
    eps: float,
    streams: jax.Array,
    y: jax.Array,
    weights: jax.Array,
    matrix: jax.Array,
    scale: jax.Array,
    pre_bias: jax.Array,
    post_bias: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The results for M tokens: streams [M, n, D], y [M, D], weights [M, n]."""
    return _step_fwd(eps, streams, y, weights, matrix, scale, pre_bias, post_bias)[0]


def _step_fwd(eps, streams, y, weights, matrix, scale, pre_bias, post_bias):
    own = dict(y=y, weights=weights, rows=jnp.swapaxes(matrix, 1, 2))
    own |= dict(scale=scale, pre_bias=pre_bias, post_bias=post_bias)
    new, u, post, normed, reciprocal = mapped(forward, eps=eps)(dict(streams=streams) | own)
    return (new, u, post), dict(new=new, normed=normed, reciprocal=reciprocal) | own


def _step_bwd(eps, kept, gradients):
    new, normed = kept["new"], kept["normed"]
    given = dict(zip(("dnew", "du", "dpost"), gradients, strict=True))
    dstreams, dy, dweights, dlogits, dproducts = mapped(backward)(kept | given)
    dmatrix = jnp.einsum("mnd,mk->ndk", new, dproducts, precision="highest", preferred_element_type=f32)
    dpre, dpost = jnp.split(jnp.sum(dlogits, axis=0), 2)
    dscale = jnp.sum(jnp.sum(dlogits * normed, axis=0).reshape(2, -1), axis=1)
    return dstreams, dy, dweights, dmatrix.astype(new.dtype), dscale, dpre, dpost


_step.defvjp(_step_fwd, _step_bwd)


@functools.partial(jax.jit, static_argnames="eps")  # traced once per shape, not per layer
def forward(
    streams: jax.Array,
    y: jax.Array,
    weights: jax.Array,
    rows: jax.Array,
    scale: jax.Array,
    pre_bias: jax.Array,
    post_bias: jax.Array,
    *,
    eps: float,
) -> tuple[jax.Array, ...]:
    """X' [M, n, D], u [M, D], post [M, n], c [M, 2 n] and r [M]; the last three are float32.

    Args:
        streams: [M, n, D]. y: [M, D]. weights: [M, n] float32.
        rows: [n, 2 n, D], the matrix with channels last. scale: [2], pre_bias, post_bias: [n], float32.
    """
    tokens, count, width = streams.shape
    share = FORWARD

    def body(x_g, y_g, s_g, w_g, scale_g, pre_g, post_g, new_g, u_g, open_g, normed_g, r_g):
        warp = Streams(share, *streams.shape, streams.dtype)
        warp.prefetch(x_g, y_g)
        weights = [warp.scalars(s_g, token, count) for token in warp.tokens]

        def added(channel):
            """X' of each token and stream."""
            values = []
            for token, s in zip(warp.tokens, weights, strict=True):
                y = warp.load(y_g, token * width + channel)
                xs = [warp.load(x_g, at) for at in warp.streams(token, channel)]
                values.append([plus(x, w, y) for x, w in zip(xs, s, strict=True)])
            return values

        def sums(channel, totals):
            values, new = added(channel), []
            for token, xs, (products, square) in zip(warp.tokens, values, totals, strict=True):
                for at, x in zip(warp.streams(token, channel), xs, strict=True):
                    store_vector(new_g, at, x)
                    square = dot(x, x, square)
                new.append((products, square))
            for i, k, row in warp.rows(w_g, channel):
                for (products, _), xs in zip(new, values, strict=True):
                    products[k] = dot(row, xs[i], products[k])
            return new

        (zero,) = lanes.zeros(1)
        totals = warp.rounds(sums, [([zero] * (2 * count), zero) for _ in warp.tokens])
        gates = Gates(warp, scale_g, pre_g, post_g)
        pre = []
        for token, (products, square) in zip(warp.tokens, totals, strict=True):
            r = lax.rsqrt(across(square) * f32(1 / (count * width)) + f32(eps))
            normed = [across(product) * r for product in products]
            p, q = gates.open(normed)
            pre.append(p)
            warp.store_scalars(open_g, token, [2 * x for x in q])
            warp.store_scalars(normed_g, token, normed)
            warp.store_scalars(r_g, token, [r])

        def read(channel, none):
            for token, xs, p in zip(warp.tokens, added(channel), pre, strict=True):
                store_vector(u_g, token * width + channel, combined(p, xs))
            return none

        warp.rounds(read, jnp.int32(0))

    sds = jax.ShapeDtypeStruct
    out = [sds(streams.shape, streams.dtype), sds(y.shape, y.dtype)]
    out += [sds((tokens, count), f32), sds((tokens, 2 * count), f32), sds((tokens,), f32)]
    return launch(body, out, tokens, share)(streams, y, weights, rows, scale, pre_bias, post_bias)


@jax.jit
def backward(
    new: jax.Array,
    y: jax.Array,
    weights: jax.Array,
    rows: jax.Array,
    scale: jax.Array,
    pre_bias: jax.Array,
    post_bias: jax.Array,
    normed: jax.Array,
    reciprocal: jax.Array,
    dnew: jax.Array,
    du: jax.Array,
    dpost: jax.Array,
) -> tuple[jax.Array, ...]:
    """Gradients of the streams [M, n, D], y [M, D], its weights [M, n], what the gates open by, and c / r [M, 2 n].

    The last is in the dtype of the streams, for a product with them.

    Args:
        new, normed, reciprocal: X', c and r, results of `forward`, which has the other arguments.
        dnew, du: gradients of X' and u, in their dtype. dpost: [M, n] float32.
    """
    tokens, count, width = new.shape
    share = BACKWARD

    def body(*refs):
        new_g, y_g, s_g, w_g, scale_g, pre_g, post_g, normed_g, r_g, g_g, e_g, dpost_g = refs[:12]
        dx_g, dy_g, ds_g, dlogits_g, dproducts_g = refs[12:]
        warp = Streams(share, *new.shape, new.dtype)
        warp.prefetch(new_g, e_g, g_g, y_g)
        (zero,) = lanes.zeros(1)
        none = [[zero] * count for _ in warp.tokens]

        def shares(channel, totals):
            """u's gradient times each stream."""
            sums = []
            for token, total in zip(warp.tokens, totals, strict=True):
                e = warp.load(e_g, token * width + channel)
                xs = [warp.load(new_g, at) for at in warp.streams(token, channel)]
                sums.append([dot(e, x, t) for x, t in zip(xs, total, strict=True)])
            return sums

        gates, factors = Gates(warp, scale_g, pre_g, post_g), []
        for token, total in zip(warp.tokens, warp.rounds(shares, none), strict=True):
            c, (r,) = warp.scalars(normed_g, token, 2 * count), warp.scalars(r_g, token, 1)
            p, q = gates.open(c)
            dp = [across(t) * x * (1 - x) for t, x in zip(total, p, strict=True)]
            dq = [2 * d * x * (1 - x) for d, x in zip(warp.scalars(dpost_g, token, count), q, strict=True)]
            dc = gates.scaled(dp, dq)
            norm = -r * r * f32(1 / (count * width)) * dot(tuple(dc), tuple(c), zero)
            dproducts = [r * d for d in dc]
            warp.store_scalars(dlogits_g, token, [*dp, *dq])
            warp.store_scalars(dproducts_g, token, dproducts)
            factors.append((p, dproducts, norm, warp.scalars(s_g, token, count)))

        def gradients(channel, totals):
            G = []
            for token, (p, _, norm, _) in zip(warp.tokens, factors, strict=True):
                e, own = warp.load(e_g, token * width + channel), []
                for at, weight in zip(warp.streams(token, channel), p, strict=True):
                    own.append(plus(plus(warp.load(g_g, at), weight, e), norm, warp.load(new_g, at)))
                G.append(own)
            for i, k, row in warp.rows(w_g, channel):
                for own, (_, dproducts, _, _) in zip(G, factors, strict=True):
                    own[i] = plus(own[i], dproducts[k], row)
            sums = []
            for token, own, (*_, s), total in zip(warp.tokens, G, factors, totals, strict=True):
                y = warp.load(y_g, token * width + channel)
                for at, x in zip(warp.streams(token, channel), own, strict=True):
                    store_vector(dx_g, at, x)
                store_vector(dy_g, token * width + channel, combined(s, own))
                sums.append([dot(x, y, t) for x, t in zip(own, total, strict=True)])
            return sums

        for token, total in zip(warp.tokens, warp.rounds(gradients, none), strict=True):
            warp.store_scalars(ds_g, token, [across(t) for t in total])

    sds = jax.ShapeDtypeStruct
    out = [sds(new.shape, new.dtype), sds(y.shape, y.dtype), sds((tokens, count), f32)]
    out += [sds((tokens, 2 * count), dtype) for dtype in (f32, new.dtype)]
    run = launch(body, out, tokens, share)
    return run(new, y, weights, rows, scale, pre_bias, post_bias, normed, reciprocal, dnew, du, dpost)


class Streams(Warp):
    """A warp whose tokens have n streams.

    Attributes:
        count: n.
    """

    def __init__(self, share: Share, tokens: int, count: int, width: int, dtype: DTypeLike) -> None:
        super().__init__(share, tokens, width, dtype)
        self.count = count

    def streams(self, token: jax.Array, channel: jax.Array) -> list[jax.Array]:
        """Offset of a token's channels in each of its streams, in arrays [M, n, D]."""
        return [(token * self.count + i) * self.width + channel for i in range(self.count)]

    def rows(self, ref: Any, channel: jax.Array) -> Any:
        """(stream i, product k, the thread's numbers of W_ik) for all of an array [n, 2 n, D]."""
        for i in range(self.count):
            for k in range(2 * self.count):
                yield i, k, self.load(ref, (i * 2 * self.count + k) * self.width + channel)


class Gates:
    """Inside a kernel: how c becomes pre and post."""

    def __init__(self, warp: Streams, scale: Any, pre_bias: Any, post_bias: Any) -> None:
        zero = 0 * warp.lane
        self.scale = warp.scalars(scale, zero, 2)
        self.biases = [warp.scalars(bias, zero, warp.count) for bias in (pre_bias, post_bias)]

    def open(self, normed: Sequence[jax.Array]) -> list[list[jax.Array]]:
        """pre and post / 2, of c."""
        halves = normed[: len(normed) // 2], normed[len(normed) // 2 :]
        return [
            [lanes.sigmoid(a * c + b) for c, b in zip(half, biases, strict=True)]
            for a, half, biases in zip(self.scale, halves, self.biases, strict=True)
        ]

    def scaled(self, dp: Sequence[jax.Array], dq: Sequence[jax.Array]) -> list[jax.Array]:
        """The gradient of c."""
        return [a * d for a, part in zip(self.scale, (dp, dq), strict=True) for d in part]
