"""Short causal convolution as Pallas Mosaic GPU kernels, for Hopper and later: each array is read or written once.

A thread processes `CHANNELS` neighbouring channels of a piece of time. It goes through the tokens and keeps the last
W - 1 inputs in registers. Threads share nothing.

The backward pass goes through the tokens once, too. At token s a thread recomputes the sum before the activation, and
the gradient g_s of that sum. It adds the contributions of g_s to the gradients of the inputs s, s - 1, .., s - W + 1.
The gradient of input s - W + 1 is then complete; the others stay in registers. The gradients of weight and bias are
sums over tokens, and stay in registers, too. Calls with a few tokens, as in decoding, use a kernel of their own.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from seqmodels.kernels import lanes
from seqmodels.kernels.arrays import mapped, pad, round_up
from seqmodels.kernels.interpreter import gpu_interpreter
from seqmodels.kernels.lanes import THREADS, Lanes, load_vector, store_vector, thread_index
from seqmodels.kernels.short_conv import few, tuning, xla
from seqmodels.kernels.short_conv.tuning import CHANNELS
from seqmodels.kernels.tuning import UNROLLED

f32 = jnp.float32
DTYPES = ("bfloat16", "float16", "float32")


def supports(
    platform: str,
    batch: int = 8,
    length: int = 2048,
    channels: int = 1536,
    dtype: DTypeLike = "bfloat16",
    documents: bool = False,
    named: bool = False,
    **facts: object,
) -> str | None:
    """Why this backend cannot serve the call, or, unless requested by name, why another is faster. None: it can."""
    if platform != "cuda" and not gpu_interpreter():
        return "it needs an NVIDIA GPU"
    if length <= UNROLLED and not named and (reason := few.supports(batch, length, channels, documents)):
        return f"{reason}, and so few tokens are faster in XLA's own fusions"
    if (capability := lanes.compute_capability() or 9) < 9:
        return f"it needs an NVIDIA GPU of compute capability 9.0 (Hopper) or later, this one has {capability}"
    if jnp.dtype(dtype).name not in DTYPES:
        return f"x is {jnp.dtype(dtype).name}; it takes {', '.join(DTYPES)}"
    if min(batch, length, channels) < 1 or batch * length * (channels + CHANNELS) >= 2**31:
        return f"x has {batch * length * channels} elements; it addresses 1 to 2^31 - 1"
    return None


def short_conv(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    *,
    activation: str | None,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    initial_segment: jax.Array | None,
    mask: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """See `kernels.short_conv.short_conv`. Sums in float32."""
    batch, length, channels = x.shape
    documents = segment_ids is not None or mask is not None
    if few.supports(batch, length, channels, documents) is None:
        state = jnp.zeros((x.shape[0], weight.shape[0] - 1, channels)) if initial_state is None else initial_state
        return few_tokens(activation, x, weight, bias, state.astype(f32))
    wide = {-1: round_up(channels, CHANNELS)}
    x, weight, bias, initial_state = (pad(v, wide) for v in (x, weight, bias, initial_state))
    y, state = xla.convolve_real(
        convolve, x, weight, bias, activation, initial_state, segment_ids, initial_segment, mask
    )
    return y[..., :channels], state[..., :channels]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def few_tokens(
    activation: str | None, x: jax.Array, weight: jax.Array, bias: jax.Array | None, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """y and the final state. Gradients are those of XLA's convolution: training on so few tokens is rare."""
    given = dict(x=x, weight=weight.astype(f32), bias=None if bias is None else bias.astype(f32), state=state)
    return mapped(few.few, activation=activation)(given)


def _few_tokens_fwd(activation, *inputs):
    return few_tokens(activation, *inputs), inputs


def _few_tokens_bwd(activation, inputs, cotangents):
    def call(x, weight, bias, state):
        whole = dict(segment_ids=None, initial_segment=None, mask=None)
        return xla.short_conv(x, weight, bias, activation=activation, initial_state=state, **whole)

    return jax.vjp(call, *inputs)[1](cotangents)


few_tokens.defvjp(_few_tokens_fwd, _few_tokens_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def convolve(
    activation: str | None,
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    state: jax.Array | None,
    reach: jax.Array | None,
) -> jax.Array:
    """y [B, T, E] as of `xla.convolve`, without the final state."""
    return mapped(forward, activation=activation)(arrays(x, weight, bias, state, reach))


def _convolve_fwd(activation, *inputs):
    return convolve(activation, *inputs), inputs


def _convolve_bwd(activation, inputs, dy):
    _, weight, bias, state, _ = inputs
    dx, sums = mapped(backward, activation=activation)(arrays(*inputs) | dict(dy=dy))
    sums = jnp.sum(sums, axis=(0, 1))
    dstate = None if state is None else xla.state_gradient(activation, *inputs, dy).astype(state.dtype)
    dbias = None if bias is None else sums[-1].astype(bias.dtype)
    return dx, sums[:-1].astype(weight.dtype), dbias, dstate, None


convolve.defvjp(_convolve_fwd, _convolve_bwd)


def arrays(
    x: jax.Array, weight: jax.Array, bias: jax.Array | None, state: jax.Array | None, reach: jax.Array | None
) -> dict[str, jax.Array | None]:
    """The kernels' arguments by name. `reach` becomes float32, because the kernels load every array as float32."""
    optional = dict(bias=bias, state=state, reach=reach)
    return dict(x=x, weight=weight.astype(f32)) | {n: None if v is None else v.astype(f32) for n, v in optional.items()}


@functools.partial(jax.jit, static_argnames="activation")  # traced once per shape, not per layer
def forward(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    state: jax.Array | None,
    reach: jax.Array | None,
    *,
    activation: str | None,
) -> jax.Array:
    """y [B, T, E].

    Args:
        x: [B, T, E] with E a multiple of CHANNELS. weight: [W, E]; bias: [E] or None, float32.
        state: [B, W - 1, E] float32 or None. reach: [B, T] float32, how many earlier inputs a token sees. None: all.
    """
    batch, length, channels = x.shape
    walk = Walk("forward", batch, length, channels, weight.shape[0])
    inputs = given(x=x, weight=weight, bias=bias, state=state, reach=reach)

    def body(*refs):
        refs = dict(zip((*inputs, "y"), refs, strict=True))
        thread = walk.thread(refs)

        def several(group, history):
            first = thread.start + group * walk.together
            xs = thread.tokens("x", first)
            ys = []
            for x, reach in zip(xs, thread.reaches(first), strict=True):
                total, _ = thread.sum(x, history, reach)
                ys.append(tuple(v * lanes.sigmoid(v) for v in total) if activation == "silu" else total)
                history = (x, *history[:-1])
            for at, y in enumerate(ys):
                store_vector(refs["y"], thread.place(first), y, at=at * walk.channels)
            return history

        lax.fori_loop(0, walk.piece // walk.together, several, thread.history())

    return walk.kernel(body, jax.ShapeDtypeStruct(x.shape, x.dtype))(*inputs.values())


@functools.partial(jax.jit, static_argnames="activation")
def backward(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    state: jax.Array | None,
    reach: jax.Array | None,
    dy: jax.Array,
    *,
    activation: str | None,
) -> tuple[jax.Array, jax.Array]:
    """dx [B, T, E], and partial sums [B, pieces, W + 1, E] float32 of the gradients of weight and bias.

    Args: as for `forward`; dy [B, T, E].
    """
    (batch, length, channels), taps = x.shape, weight.shape[0]
    walk = Walk("backward", batch, length, channels, taps)
    inputs = given(x=x, weight=weight, bias=bias, state=state, reach=reach, dy=dy)

    def body(*refs):
        refs = dict(zip((*inputs, "dx", "sums"), refs, strict=True))
        thread = walk.thread(refs)

        def tokens(first, count, carry, finish, past_end, counted=None):
            """Process `count` tokens from `first` on. With `finish`, each writes the gradient that is then complete.

            Args:
                carry: history, gradients that are not complete yet, and sums.
                past_end: whether some tokens may be past the end.
                counted: [128] int32, the first token that is added to the sums. None: `first`.
            """
            history, waiting, sums = carry
            xs, dys = (thread.tokens(name, first, count, past_end) for name in ("x", "dy"))
            whole = []
            for at, reach in enumerate(thread.reaches(first, count, past_end)):
                x = xs[at]
                total, seen = thread.sum(x, history, reach)
                g = tuple(slope(v, d) for v, d in zip(total, dys[at], strict=True)) if activation == "silu" else dys[at]
                if past_end:
                    g = tuple(jnp.where(first + at < walk.length, v, 0) for v in g)
                own = g if counted is None else tuple(jnp.where(first + at >= counted, v, 0) for v in g)
                # weight[k] multiplies the input W - 1 - k tokens earlier
                products = [tuple(a * b for a, b in zip(own, seen[taps - 1 - k], strict=True)) for k in range(taps)]
                sums = tuple(add(s, v) for s, v in zip(sums, (*products, own), strict=True))
                back = [tuple(a * b for a, b in zip(g, thread.weight[taps - 1], strict=True))]
                for distance, wait in enumerate(waiting, start=1):
                    term = tuple(a * b for a, b in zip(g, thread.weight[taps - 1 - distance], strict=True))
                    back.append(add(wait, thread.within(term, reach, distance)))
                *waiting, last = back
                whole.append(last)
                history = (x, *history[:-1])
            if finish:
                for at, last in enumerate(whole):
                    store_vector(refs["dx"], thread.place(first - (taps - 1)), last, at=at * walk.channels)
            return history, tuple(waiting), sums

        # This thread writes the gradients of the tokens start .. start + piece - 1. Its sums for weight and bias begin
        # W - 1 tokens after `start`; in the first piece they include those first W - 1 tokens, too.
        zeros = lanes.zeros(CHANNELS)
        carry = thread.history(), (zeros,) * (taps - 1), (zeros,) * (taps + 1)
        never = jnp.int32(walk.length)
        begin = jnp.where(thread.piece == 0, thread.start, never)
        carry = tokens(thread.start, taps - 1, carry, finish=False, past_end=True, counted=begin)
        first = thread.start + (taps - 1)
        counted = thread.piece * walk.piece + (taps - 1) if walk.overlap else None
        groups = walk.piece // walk.together

        def several(group, carry):
            return tokens(
                first + group * walk.together, walk.together, carry, finish=True, past_end=False, counted=counted
            )

        inside = max(0, groups - -(-(taps - 1) // walk.together))  # groups that end before the row does
        carry = lax.fori_loop(0, inside, several, carry)
        for group in range(inside, groups):
            at = first + group * walk.together
            carry = tokens(at, walk.together, carry, finish=True, past_end=True, counted=counted)
        _, _, sums = carry
        part = (thread.row * walk.pieces + thread.piece) * (taps + 1)
        for k, total in enumerate(sums):
            store_vector(refs["sums"], (part + k) * walk.channels + thread.channel, total)

    out = (
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        jax.ShapeDtypeStruct((walk.batch, walk.pieces, taps + 1, walk.channels), f32),
    )
    return walk.kernel(body, out)(*inputs.values())


def given(**arrays: jax.Array | None) -> dict[str, jax.Array]:
    """The arrays that are not None."""
    return {name: x for name, x in arrays.items() if x is not None}


def add(first: Lanes, second: Lanes) -> Lanes:
    return tuple(a + b for a, b in zip(first, second, strict=True))


def slope(total: jax.Array, dy: jax.Array) -> jax.Array:
    """The gradient of a sum, given that of its SiLU."""
    gate = lanes.sigmoid(total)
    return dy * gate * (1 + total * (1 - gate))


@dataclasses.dataclass(frozen=True)
class Walk:
    """How rows, time and channels are assigned to threads.

    All pieces of time have the same length. The last piece ends with the row, so it may overlap the piece before it.
    """

    kind: str
    batch: int
    length: int
    channels: int
    taps: int

    @property
    def together(self) -> int:
        """Tokens loaded before the first of them is worked on."""
        return min(tuning.TOGETHER, self.length)

    @property
    def piece(self) -> int:
        """Tokens per thread."""
        return tuning.piece(self.kind, self.batch, self.length, self.channels)

    @property
    def pieces(self) -> int:
        return -(-self.length // self.piece)

    @property
    def overlap(self) -> bool:
        return self.length % self.piece > 0

    @property
    def threads(self) -> int:
        return self.batch * self.pieces * (self.channels // CHANNELS)

    def kernel(self, body: Callable[..., None], out: Any) -> Callable[..., Any]:
        return lanes.kernel(
            body,
            out_type=out,
            grid=(-(-self.threads // THREADS),),
            grid_names=("block",),
        )

    def thread(self, refs: Mapping[str, Any]) -> "Thread":
        return Thread(self, refs)


class Thread:
    """Inside a kernel: which elements a thread processes, and what it reads. All are [128], one value per thread.

    Attributes:
        row, piece: row and piece of its tokens; start: its first token; channel: its first channel.
        weight: W tuples of its channels' taps; bias: a tuple or None.
    """

    def __init__(self, walk: Walk, refs: Mapping[str, Any]) -> None:
        self.walk, self.refs = walk, refs
        lane = thread_index()
        number = jnp.minimum(lax.axis_index("block") * THREADS + lane, walk.threads - 1)  # spare threads repeat it
        quads = walk.channels // CHANNELS
        self.channel = lax.rem(number, quads) * CHANNELS
        self.piece = lax.rem(lax.div(number, quads), walk.pieces)
        self.row = lax.div(number, quads * walk.pieces)
        self.start = jnp.minimum(self.piece * walk.piece, walk.length - walk.piece)
        self.weight = [
            load_vector(refs["weight"], self.channel, CHANNELS, at=k * walk.channels) for k in range(walk.taps)
        ]
        self.bias = load_vector(refs["bias"], self.channel, CHANNELS) if "bias" in refs else None

    def place(self, token: jax.Array) -> jax.Array:
        """Offset of a token in arrays [B, T, E]."""
        return (self.row * self.walk.length + token) * self.walk.channels + self.channel

    def tokens(self, name: str, first: jax.Array, count: int | None = None, past_end: bool = False) -> list[Lanes]:
        """`count` tokens of an array from `first` on. Tokens past the end are replaced by the last one."""
        ref, step = self.refs[name], self.walk.channels
        offsets = range(count or self.walk.together)
        if past_end:
            return [
                load_vector(ref, self.place(jnp.minimum(first + at, self.walk.length - 1)), CHANNELS) for at in offsets
            ]
        return [load_vector(ref, self.place(first), CHANNELS, at=at * step) for at in offsets]

    def reaches(self, first: jax.Array, count: int | None = None, past_end: bool = False) -> list[jax.Array | None]:
        """How many earlier inputs each of these tokens sees, or None."""
        offsets = range(count or self.walk.together)
        if "reach" not in self.refs:
            return [None for _ in offsets]
        ref, row = self.refs["reach"], self.row * self.walk.length
        if past_end:
            return [load_vector(ref, row + jnp.minimum(first + at, self.walk.length - 1), 1)[0] for at in offsets]
        return [load_vector(ref, row + first, 1, at=at)[0] for at in offsets]

    def history(self) -> tuple[Lanes, ...]:
        """The W - 1 inputs before `start`, newest first. Before the first token they are the state's, or zeros."""
        rows, inputs = self.walk.taps - 1, []
        for distance in range(1, rows + 1):
            token = self.start - distance
            x = load_vector(self.refs["x"], self.place(jnp.maximum(token, 0)), CHANNELS)
            before = lanes.zeros(CHANNELS)
            if "state" in self.refs:
                place = self.row * rows + jnp.minimum(rows + token, rows - 1)
                before = load_vector(self.refs["state"], place * self.walk.channels + self.channel, CHANNELS)
            inputs.append(tuple(jnp.where(token >= 0, a, b) for a, b in zip(x, before, strict=True)))
        return tuple(inputs)

    def sum(self, x: Lanes, history: Sequence[Lanes], reach: jax.Array | None) -> tuple[Lanes, list[Lanes]]:
        """bias + sum_k weight[W-1-k] x_{t-k}, and the inputs in the sum: x and the history, zero where not seen."""
        seen = [x] + [self.within(v, reach, distance) for distance, v in enumerate(history, start=1)]
        total: Any = self.bias
        for distance, v in enumerate(seen):
            products = tuple(a * b for a, b in zip(self.weight[self.walk.taps - 1 - distance], v, strict=True))
            total = products if total is None else add(total, products)
        return total, seen

    def within(self, x: Lanes, reach: jax.Array | None, distance: int) -> Lanes:
        """x where the token sees the input `distance` tokens earlier, else 0."""
        return x if reach is None else tuple(jnp.where(reach >= distance, v, 0) for v in x)
