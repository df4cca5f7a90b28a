"""A step of hyper-connections as Pallas Mosaic GPU kernels, for Hopper and later: one forward, one backward.

The 32 threads of a warp share the channels of a token, so its sums over channels are exchanges in the warp, and warps
share nothing. A warp works on several tokens at once, which use what it loads of the matrix. It goes through the
channels twice: for the sums, and for what depends on them. The second time it finds its numbers in the caches of the
GPU, because few tokens are under way at once; so memory is read once.

With g the gradient of X', e that of u, c = r vec(X') W and r the reciprocal of the root mean square, the gradient of
what X' is computed of is

    G_i = g_i + pre_i e + sum_k r dc_k W_ik - r^2 / (n D) (sum_k dc_k c_k) X'_i,    dc = gain [dp, dq],
    dp_i = (e . X'_i) pre_i (1 - pre_i),    dq = dpost post (1 - post / 2).

That of X_i is G_i, that of s_i is G_i . y, and that of y is sum_i s_i G_i. Only the gradient of W is left to XLA.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from seqmodels.kernels import lanes
from seqmodels.kernels.arrays import mapped
from seqmodels.kernels.interpreter import gpu_interpreter
from seqmodels.kernels.lanes import THREADS, Lanes, load_vector, store_vector

f32 = jnp.float32
DTYPES = ("bfloat16", "float16", "float32")
WARP = 32  # threads
TOGETHER = 2  # tokens of a warp at once
VECTOR = 16  # bytes that a thread loads at once
MOST = 4  # streams; with more, a thread's numbers do not fit into its registers


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
    gain: jax.Array,
    bias: jax.Array,
    *,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `kernels.hyper_connection.hyper_connection`."""
    flat = (x.reshape(-1, *x.shape[2:]) for x in (streams, y, weights))
    new, u, post = _step(eps, *flat, matrix, gain, bias)
    return new.reshape(streams.shape), u.reshape(y.shape), post.reshape(weights.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _step(
    eps: float,
    streams: jax.Array,
    y: jax.Array,
    weights: jax.Array,
    matrix: jax.Array,
    gain: jax.Array,
    bias: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The results for M tokens: streams [M, n, D], y [M, D], weights [M, n]."""
    return _step_fwd(eps, streams, y, weights, matrix, gain, bias)[0]


def _step_fwd(eps, streams, y, weights, matrix, gain, bias):
    rows = jnp.swapaxes(matrix, 1, 2)
    arrays = dict(streams=streams, y=y, weights=weights, rows=rows, gain=gain, bias=bias)
    new, u, post, normed, reciprocal = mapped(forward, eps=eps)(arrays)
    return (new, u, post), (new, y, weights, rows, gain, bias, post, normed, reciprocal)


def _step_bwd(eps, kept, gradients):
    new, y, weights, rows, gain, bias, post, normed, reciprocal = kept
    dnew, du, dpost = gradients
    dq = dpost * post * (1 - post / 2)
    arrays = dict(new=new, y=y, weights=weights, rows=rows, gain=gain, bias=bias, normed=normed)
    arrays |= dict(reciprocal=reciprocal, dnew=dnew, du=du, dq=dq)
    dstreams, dy, dweights, dp = mapped(backward)(arrays)
    dlogits = jnp.concatenate([dp, dq], axis=-1)
    dproducts = (gain * dlogits * reciprocal[:, None]).astype(new.dtype)
    dmatrix = jnp.einsum("mnd,mk->ndk", new, dproducts, preferred_element_type=f32).astype(rows.dtype)
    return dstreams, dy, dweights, dmatrix, jnp.sum(dlogits * normed, axis=0), jnp.sum(dlogits, axis=0)


_step.defvjp(_step_fwd, _step_bwd)


@functools.partial(jax.jit, static_argnames="eps")  # traced once per shape, not per layer
def forward(
    streams: jax.Array,
    y: jax.Array,
    weights: jax.Array,
    rows: jax.Array,
    gain: jax.Array,
    bias: jax.Array,
    *,
    eps: float,
) -> tuple[jax.Array, ...]:
    """X' [M, n, D], u [M, D], post [M, n], c [M, 2 n] and r [M]; the last three float32.

    Args:
        streams: [M, n, D]. y: [M, D]. weights: [M, n] float32.
        rows: [n, 2 n, D], the matrix with channels last. gain, bias: [2 n] float32.
    """
    tokens, count, width = streams.shape
    ks = range(2 * count)

    def body(x_g, y_g, s_g, w_g, gain_g, bias_g, new_g, u_g, post_g, normed_g, r_g):
        warp = Warp(tokens, count, width, streams.dtype)
        weights = [warp.scalars(s_g, token, count) for token in warp.tokens]

        def added(channel):
            """X' of each token and stream."""
            values = []
            for token, s in zip(warp.tokens, weights, strict=True):
                y = warp.load(y_g, token * width + channel)
                xs = [warp.load(x_g, at) for at in warp.streams(token, channel)]
                values.append([tuple(a + w * b for a, b in zip(x, y, strict=True)) for x, w in zip(xs, s, strict=True)])
            return values

        def sums(channel, totals):
            values, new = added(channel), []
            for token, xs, (products, square) in zip(warp.tokens, values, totals, strict=True):
                for at, x in zip(warp.streams(token, channel), xs, strict=True):
                    store_vector(new_g, at, x)
                    square = dot(x, x, square)
                new.append((products, square))
            for i in range(count):
                for k in ks:
                    row = warp.load(w_g, (i * 2 * count + k) * width + channel)
                    for (products, _), xs in zip(new, values, strict=True):
                        products[k] = dot(row, xs[i], products[k])
            return new

        (zero,) = lanes.zeros(1)
        totals = warp.rounds(sums, [([zero for _ in ks], zero) for _ in warp.tokens])
        gains, biases = warp.scalars(gain_g, 0 * warp.lane, 2 * count), warp.scalars(bias_g, 0 * warp.lane, 2 * count)
        pre = []
        for token, (products, square) in zip(warp.tokens, totals, strict=True):
            r = lax.rsqrt(across(square) * f32(1 / (count * width)) + f32(eps))
            normed = [across(product) * r for product in products]
            open = [lanes.sigmoid(a * c + b) for a, c, b in zip(gains, normed, biases, strict=True)]
            pre.append(open[:count])
            warp.store_scalars(r_g, token, [r])
            warp.store_scalars(normed_g, token, normed)
            warp.store_scalars(post_g, token, [2 * q for q in open[count:]])

        def read(channel, none):
            for token, xs, p in zip(warp.tokens, added(channel), pre, strict=True):
                store_vector(u_g, token * width + channel, combined(p, xs))
            return none

        warp.rounds(read, jnp.int32(0))

    sds = jax.ShapeDtypeStruct
    out = [sds(streams.shape, streams.dtype), sds(y.shape, y.dtype)]
    out += [sds((tokens, k), f32) for k in (count, 2 * count)] + [sds((tokens,), f32)]
    return launch(body, out, tokens)(streams, y, weights, rows, gain, bias)


@jax.jit
def backward(
    new: jax.Array,
    y: jax.Array,
    weights: jax.Array,
    rows: jax.Array,
    gain: jax.Array,
    bias: jax.Array,
    normed: jax.Array,
    reciprocal: jax.Array,
    dnew: jax.Array,
    du: jax.Array,
    dq: jax.Array,
) -> tuple[jax.Array, ...]:
    """Gradients of the streams [M, n, D], of y [M, D], of its weights [M, n], and dp [M, n].

    Args:
        new, normed, reciprocal: X', c and r, results of `forward`, which has the other arguments.
        dnew, du: gradients of X' and u, in their dtype. dq: [M, n] float32.
    """
    tokens, count, width = new.shape
    ks = range(2 * count)

    def body(new_g, y_g, s_g, w_g, gain_g, bias_g, normed_g, r_g, g_g, e_g, dq_g, dx_g, dy_g, ds_g, dp_g):
        warp = Warp(tokens, count, width, new.dtype)
        (zero,) = lanes.zeros(1)

        def products(channel, totals):
            """u's gradient times each stream."""
            sums = []
            for token, total in zip(warp.tokens, totals, strict=True):
                e = warp.load(e_g, token * width + channel)
                xs = [warp.load(new_g, at) for at in warp.streams(token, channel)]
                sums.append([dot(e, x, t) for x, t in zip(xs, total, strict=True)])
            return sums

        totals = warp.rounds(products, [[zero for _ in range(count)] for _ in warp.tokens])
        gains, biases = warp.scalars(gain_g, 0 * warp.lane, 2 * count), warp.scalars(bias_g, 0 * warp.lane, 2 * count)
        factors = []
        for token, total in zip(warp.tokens, totals, strict=True):
            c, (r,) = warp.scalars(normed_g, token, 2 * count), warp.scalars(r_g, token, 1)
            pre = [lanes.sigmoid(a * x + b) for a, x, b in zip(gains[:count], c, biases, strict=False)]
            dp = [across(t) * p * (1 - p) for t, p in zip(total, pre, strict=True)]
            warp.store_scalars(dp_g, token, dp)
            dc = [a * d for a, d in zip(gains, [*dp, *warp.scalars(dq_g, token, count)], strict=True)]
            inner = sum((d * x for d, x in zip(dc, c, strict=True)), zero)
            norm = -r * r * inner * f32(1 / (count * width))
            factors.append((pre, [r * d for d in dc], norm, warp.scalars(s_g, token, count)))

        def gradients(channel, totals):
            places = [warp.streams(token, channel) for token in warp.tokens]
            G = []
            for token, at, (pre, _, norm, _) in zip(warp.tokens, places, factors, strict=True):
                e, own = warp.load(e_g, token * width + channel), []
                for i in range(count):
                    g, x = warp.load(g_g, at[i]), warp.load(new_g, at[i])
                    own.append(tuple(a + pre[i] * b + norm * c for a, b, c in zip(g, e, x, strict=True)))
                G.append(own)
            for i in range(count):
                for k in ks:
                    row = warp.load(w_g, (i * 2 * count + k) * width + channel)
                    for own, (_, dproducts, _, _) in zip(G, factors, strict=True):
                        own[i] = tuple(a + dproducts[k] * w for a, w in zip(own[i], row, strict=True))
            sums = []
            for token, at, own, (*_, s), total in zip(warp.tokens, places, G, factors, totals, strict=True):
                y = warp.load(y_g, token * width + channel)
                for place, x in zip(at, own, strict=True):
                    store_vector(dx_g, place, x)
                store_vector(dy_g, token * width + channel, combined(s, own))
                sums.append([dot(x, y, t) for x, t in zip(own, total, strict=True)])
            return sums

        totals = warp.rounds(gradients, [[zero for _ in range(count)] for _ in warp.tokens])
        for token, total in zip(warp.tokens, totals, strict=True):
            warp.store_scalars(ds_g, token, [across(t) for t in total])

    sds = jax.ShapeDtypeStruct
    out = [sds(new.shape, new.dtype), sds(y.shape, y.dtype), *[sds((tokens, count), f32)] * 2]
    return launch(body, out, tokens)(new, y, weights, rows, gain, bias, normed, reciprocal, dnew, du, dq)


def launch(body: Callable[..., None], out: Sequence[jax.ShapeDtypeStruct], tokens: int) -> Callable[..., Any]:
    """The kernel of a body, with a block of four warps for so many groups of tokens."""
    blocks = -(-tokens // (TOGETHER * THREADS // WARP))
    return lanes.kernel(body, out_type=tuple(out), grid=(blocks,), grid_names=("block",))


class Warp:
    """Inside a kernel: the tokens and the channels of each thread.

    Attributes:
        lane: [128] int32, number of the thread in its warp.
        tokens: TOGETHER arrays [128] int32. Behind the last token it is the last one again: several threads then write
            the same numbers.
    """

    def __init__(self, tokens: int, count: int, width: int, dtype: DTypeLike) -> None:
        self.count, self.width = count, width
        self.vector = next(n for n in (8, 4, 2, 1) if n * jnp.dtype(dtype).itemsize <= VECTOR and not width % (n * WARP))
        thread = lanes.thread_index()
        self.lane = thread & (WARP - 1)
        first = (lax.axis_index("block") * (THREADS // WARP) + (thread >> 5)) * TOGETHER
        self.tokens = [jnp.minimum(first + j, tokens - 1) for j in range(TOGETHER)]

    def rounds(self, part: Callable[[jax.Array, Any], Any], carry: Any) -> Any:
        """Apply `part(channel, carry)` to all channels; a thread has `vector` of them at once, from `channel` on."""
        size = WARP * self.vector

        def step(index, carry):
            return part(index * size + self.lane * self.vector, carry)

        return lax.fori_loop(0, self.width // size, step, carry)

    def streams(self, token: jax.Array, channel: jax.Array) -> list[jax.Array]:
        """Offset of a token's channels in each of its streams, in arrays [M, n, D]."""
        return [(token * self.count + i) * self.width + channel for i in range(self.count)]

    def load(self, ref: Any, offset: jax.Array) -> Lanes:
        """The thread's numbers of an array, `vector` arrays [128] float32."""
        return load_vector(ref, offset, self.vector)

    def scalars(self, ref: Any, row: jax.Array, size: int) -> list[jax.Array]:
        """A row of an array [.., size], as arrays [128] float32."""
        return [load_vector(ref, row * size, 1, at=i)[0] for i in range(size)]

    def store_scalars(self, ref: Any, row: jax.Array, values: Sequence[jax.Array]) -> None:
        """The counterpart of `scalars`; all threads of the warp have the same values."""
        for i, value in enumerate(values):
            store_vector(ref, row * len(values), (value,), at=i)


def across(x: jax.Array) -> jax.Array:
    """The sum over the threads of a warp, in each of them."""
    distance = WARP // 2
    while distance:
        x, distance = x + lanes.exchange(x, distance), distance // 2
    return x


def dot(a: Lanes, b: Lanes, total: jax.Array) -> jax.Array:
    """total + sum_j a_j b_j."""
    for x, y in zip(a, b, strict=True):
        total = total + x * y
    return total


def combined(weights: Sequence[jax.Array], streams: Sequence[Lanes]) -> Lanes:
    """sum_i weights_i streams_i."""
    return tuple(sum((w * x for w, x in zip(weights[1:], xs[1:], strict=True)), weights[0] * xs[0])
                 for xs in zip(*streams, strict=True))  # fmt: skip
