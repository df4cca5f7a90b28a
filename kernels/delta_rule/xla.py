"""The delta rule in plain XLA: matrix products over chunks of time; states are kept only at boundaries of spans.

In a chunk of C tokens with the incoming state S, let u_t = b_t^T S_{t-1} be what token t reads for its correction. Then
the state is the one of linear attention with twice the writes, k_s v_s^T and -a_s u_s^T. With

    E[t, s] = exp(sum of log_decay over the tokens after write s, up to and including t)

where the incoming state counts as a write before the first token, the numbers u solve a triangular system,

    u_t + sum_{s<t} (b_t . a_s) E[t-1, s] u_s  =  E[t-1, start] b_t^T S + sum_{s<t} (b_t . k_s) E[t-1, s] v_s.

T is the inverse of its matrix (the WY or UT form of Yang et al. 2024, arXiv 2406.06484), and does not depend on S. If a
is k, what is written along a_s is X_s = v_s - u_s. It is linear in S, so it has K columns of factors of S beside its
own V columns, and

    X = T [-b' | v],   b'_t = E[t-1, start] b_t.

Else v there is minus the last sum above, X is -u, and the writes of k_s v_s^T are added to what follows. Queries and
the outgoing state read X, which gives again K columns of factors of S, R and N, and V columns:

    [R | Y]_t = sum_s (q_t . a_s) E[t, s] X_s,    y_t = (q'_t + R_t) S + Y_t
    [N | W] = sum_s E[C, s] a_s X_s^T,            S'  = E[C, start] S + N S + W

All chunks of a span compute these at once, and only the last line goes from chunk to chunk. The backward pass keeps the
state before each span, and computes the span again.

No exponent is above zero, because each sum of log decays is over its own tokens. With a decay for each channel, E is a
matrix for each k, (b_t . a_s) E[t-1, s] is one sum over k, and chunks are shorter.

Products over tokens of several documents select, and what is not finite in one document is taken out before them and
put back as NaN afterwards (see `kernels.finite`). Calls with a few tokens, as in decoding, are unrolled token by token.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from seqmodels.kernels.arrays import expand_to, pad, round_up
from seqmodels.kernels.delta_rule.triangular import unit_inverse
from seqmodels.kernels.dispatch import platforms
from seqmodels.kernels.finite import finite_or_zero, not_finite, spoil
from seqmodels.kernels.isolate import isolate
from seqmodels.kernels.linear_attention.xla import factors_dtype, product
from seqmodels.kernels.segments import forget, resets
from seqmodels.kernels.tuning import UNROLLED

CHUNK = 64  # most tokens of a chunk
BLOCK = 16  # least tokens of a chunk, and those of a chunk if every channel has its own decay
SPAN = 4  # chunks of this size between the states that are kept


class Options(NamedTuple):
    """Static options. dtype: of y; factors: dtype of the factors in products; chunk: tokens; span: chunks."""

    scale: float
    read: str
    dtype: DTypeLike
    factors: DTypeLike
    chunk: int
    span: int


class Tokens(NamedTuple):
    """Arrays over time: [B, T, heads, ..], log decays [B or 1, T, H or 1, K or 1], and resets [B, T] bool or None.

    k is None if it is a. Split into chunks (`_split`), they are [n, B, heads, C, ..] in a span, and [n, B, C].
    """

    q: jax.Array
    k: jax.Array | None
    v: jax.Array
    a: jax.Array
    b: jax.Array
    decay: jax.Array
    reset: jax.Array | None


def supports(**facts: object) -> str | None:
    """Supports every call on every platform."""
    return None


def delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    a: jax.Array | None,
    b: jax.Array,
    log_decay: jax.Array | None,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    initial_segment: jax.Array | None,
    mask: jax.Array | None,
    *,
    scale: float,
    read: str,
    chunk: int | None,
) -> tuple[jax.Array, jax.Array]:
    """As `kernels.delta_rule.delta_rule`, with padding set to zero."""
    given = (k, v, b) if a is None else (k, v, b, a)
    accumulator = jnp.result_type(q, *given, jnp.float32)
    state = initial_state.astype(accumulator)
    reset = resets(segment_ids, initial_segment, mask)
    length = v.shape[1]
    if length <= UNROLLED:
        y, state = _few_tokens(scale, read, (q, k, v, k if a is None else a, b, log_decay, reset), state)
        return y.astype(v.dtype), state

    dtype = v.dtype
    q, (k, v, b, *own), log_decay, spoilt = isolate(q, given, log_decay, reset)
    if log_decay is None:  # axes of size one are broadcast over rows and heads: decays are computed once
        log_decay = jnp.zeros((1, length, 1, 1), accumulator)
    decay = log_decay if log_decay.ndim == 4 else log_decay[..., None]
    chunk, span = _lengths(chunk, length, max(state.shape[2:]), decay.shape[-1] > 1)
    options = Options(scale, read, dtype, factors_dtype(q, k, v, b, *own), chunk, span)
    tokens = Tokens(q, k, v, own[0], b, decay, reset) if own else Tokens(q, None, v, k, b, decay, reset)
    y, state = _scan(options, tokens, state)
    return (y, state) if spoilt is None else (spoil(y, spoilt.reads), spoil(state, spoilt.writes[:, -1]))


def _lengths(chunk: int | None, length: int, size: int, channels: bool) -> tuple[int, int]:
    """Tokens of a chunk, and chunks of a span.

    With one decay for each head, chunks are as long as a state's longer side. Then the products of pairs of tokens take
    as much work as those with the state.

    Args:
        chunk: as asked for. size: larger of K and V. channels: whether each channel has its own decay.
    """
    span = SPAN
    if not chunk:
        chunk = BLOCK if channels else min(CHUNK, max(BLOCK, 1 << (size - 1).bit_length()))
        span = SPAN if channels else SPAN * CHUNK // chunk
    chunk = min(chunk, length)
    return chunk, min(span, -(-length // chunk))


def _few_tokens(scale, read, tokens, state):
    """y [B, T, H, V] and the final state [B, H, K, V], token by token.

    Args:
        tokens: q, k, v, a, b as they come, log decays [B, T, H], [B, T, H, K] or None, and resets [B, T] bool or None.
        state: [B, H, K, V]; its layout is kept, so that a donated state is updated in place.
    """
    q, k, v, a, b, decay, reset = tokens
    heads = v.shape[2]
    q, k, a, b = (jnp.repeat(x.astype(state.dtype), heads // x.shape[2], axis=2)[..., None] for x in (q, k, a, b))
    v = v.astype(state.dtype)
    readouts = []
    for t in range(v.shape[1]):
        old = forget(state, None if reset is None else reset[:, t])
        factor = jnp.ones((), state.dtype) if decay is None else jnp.exp(expand_to(decay[:, t], 4))
        values, read_by = v[:, t, :, None, :], q[:, t] if read == "exclusive" else q[:, t] * factor
        # one sum for both reads: the state is then read once, and overwritten in place afterwards
        both = jnp.sum(jnp.stack([b[:, t], read_by], axis=2) * old[:, :, None], axis=-2, keepdims=True)
        seen, y = both[:, :, 0], both[:, :, 1]
        state = factor * old - a[:, t] * seen + k[:, t] * values
        if read == "inclusive":  # y is q_t S_t, from what q_t reads of the old state
            own, taken = (jnp.sum(q[:, t] * x[:, t], axis=-2, keepdims=True) for x in (k, a))
            y = y + own * values - taken * seen
        readouts.append(scale * y[..., 0, :])
    return jnp.stack(readouts, axis=1), state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(options: Options, tokens: Tokens, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """y [B, T, H, V] and the final state [B, H, K, V]."""
    y, state, _ = _forward(options, tokens, state)
    return y, state


def _forward(options, tokens, state):
    """y, the final state, and the state before each span."""

    def body(state, span):
        y, new = _span(options, span, state)
        return new, (y, state)

    final, (y, before) = jax.lax.scan(body, state, _split(options, tokens))
    return _join(y, tokens.v.shape[1]), final, before


def _scan_fwd(options, tokens, state):
    y, final, before = (checkpoint_name(x, "scan") for x in _forward(options, tokens, state))
    return (y, final), (tokens, before)


def _scan_bwd(options, residuals, cotangents):
    tokens, before = residuals
    dy, dstate = cotangents
    bad = None if tokens.reset is None else not_finite(dy)
    dy = dy if bad is None else finite_or_zero(dy)

    def body(dstate, piece):
        (*arrays, reset), dy, state = piece

        def forward(arrays, state):
            return _span(options, Tokens(*arrays, reset), state)

        gradients, dstate = jax.vjp(forward, arrays, state)[1]((dy, dstate))
        return dstate, gradients

    pieces = (tuple(_split(options, tokens)), _split(options, dy), before)
    dstate, gradients = jax.lax.scan(body, dstate, pieces, reverse=True)
    dq, *others = (None if x is None else _join(x, dy.shape[1]) for x in gradients)
    dq = dq if bad is None else spoil(dq, bad)  # so that a gradient that is not finite does not go unnoticed
    return Tokens(dq, *others, None), dstate


_scan.defvjp(_scan_fwd, _scan_bwd)


def _split(options: Options, tree: Any) -> Any:
    """Arrays [B, T, H, ..] as [spans, n, B, H, C, ..], and [B, T] as [spans, n, B, C]; padded with zeros at the end."""
    span, chunk = options.span, options.chunk

    def split(x):
        x = pad(x, {1: round_up(x.shape[1], span * chunk)})
        x = x.reshape(x.shape[0], -1, span, chunk, *x.shape[2:])
        return jnp.moveaxis(x, (1, 2, 0, 4) if x.ndim > 4 else (1, 2, 0), (0, 1, 2, 3) if x.ndim > 4 else (0, 1, 2))

    return jax.tree.map(split, tree)


def _join(x: jax.Array, length: int) -> jax.Array:
    """Arrays [B, T, H, ..] from [spans, n, B, H, C, ..]."""
    x = jnp.moveaxis(x, (2, 0, 1, 4), (0, 1, 2, 3))
    return x.reshape(x.shape[0], -1, *x.shape[4:])[:, :length]


def _counts(options: Options) -> np.ndarray:
    """[2 C + 1] how many tokens of the chunk have passed at each read: those of b, those of q, and the outgoing state.

    As writes there are the incoming state and C tokens. A read of a state after c tokens sees the first 1 + c of them.
    """
    before = np.arange(options.chunk)
    return np.concatenate([before, before + (options.read == "inclusive"), [options.chunk]])


def _decays(decay: jax.Array, counts: np.ndarray, guarded: bool) -> jax.Array:
    """E [n, B, H, reads, writes, K] (axes of size one stay so) from log decays [n, B, H, C, K].

    It is 1 for writes that are yet to come. If `guarded`, gradients that are not finite, which belong to one document,
    become zero.
    """
    size = decay.shape[-2]
    passed = jnp.asarray(np.arange(size) < counts[:, None], decay.dtype)
    after = np.arange(size)[:, None] >= np.arange(size + 1)
    spread = jnp.where(after[..., None], decay[..., None, :], 0)
    sums = jnp.einsum("il,nbhljk->nbhijk", passed, spread, precision="highest")
    return jnp.exp(_finite_gradient(sums) if guarded else sums)


def _seen(counts: np.ndarray, reset: jax.Array | None) -> Any:
    """Which reads see which writes, by time and documents: bool [reads, writes], or [n, B, 1, reads, writes].

    reset: [n, B, C] or None.
    """
    passed = counts[:, None] >= np.arange(int(counts[-1]) + 1)
    if reset is None:
        return passed
    document = jnp.cumsum(reset, axis=-1)[:, :, None]
    of_reads = jnp.concatenate([document, document, document[..., -1:]], axis=-1)
    of_writes = jnp.pad(document, [(0, 0)] * 3 + [(1, 0)])  # the incoming state has the number 0
    return passed & (of_reads[..., :, None] == of_writes[..., None, :])


@jax.custom_vjp
def _finite_gradient(x: jax.Array) -> jax.Array:
    """x, and in the backward pass its gradient, with zeros in place of what is not finite."""
    return x


_finite_gradient.defvjp(lambda x: (x, None), lambda _, dy: (finite_or_zero(dy),))


def _finite(x: jax.Array, bad: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [n, B, H, C, ..] with zeros in place of what is not finite, in its gradient too; and `bad` with these tokens.

    For factors of products over tokens of several documents. `bad`: [n, B, H, C] bool.
    """
    return _finite_gradient(finite_or_zero(x)), bad | jnp.any(~jnp.isfinite(x), axis=-1)


def _select(seen: Any, x: jax.Array) -> jax.Array:
    """x where `seen`, else zero, even where x is infinite or NaN."""
    return jnp.where(seen, x, 0)


def _scores(times: Callable[..., jax.Array], reads: jax.Array, writes: jax.Array, E: jax.Array, seen: Any):
    """The decayed products of reads [n, B, H, R, K] and writes [n, B, H, C, K] that are `seen`: [n, B, H, R, C].

    E: [n, B, H, R, C, 1 or K].
    """
    if E.shape[-1] == 1:
        return _select(seen, times("nbhik,nbhjk->nbhij", reads, writes) * E[..., 0])
    reads, writes = reads.astype(E.dtype), writes.astype(E.dtype)
    return _select(seen, jnp.einsum("nbhik,nbhjk,nbhijk->nbhij", reads, writes, E, precision="highest"))


def _span(options: Options, tokens: Tokens, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """y [n, B, H, C, V] and the state after n chunks, from tokens of these chunks and the state before them."""
    size, keys, heads, v = options.chunk, tokens.q.shape[-1], tokens.v.shape[2], tokens.v
    packed, times = tokens.reset is not None, functools.partial(product, options.factors)
    by_head = lambda x: jnp.repeat(x, heads // x.shape[2], axis=2)  # noqa: E731
    a, reads = by_head(tokens.a), jnp.concatenate([by_head(tokens.b), by_head(tokens.q)], axis=-2)
    counts = _counts(options)
    E, seen = _decays(tokens.decay, counts, packed), _seen(counts, tokens.reset)
    tokens_seen, start_seen, end_seen = seen[..., :-1, 1:], seen[..., :-1, :1], seen[..., -1, 1:, None]

    scores = _scores(times, reads, a, E[..., :-1, 1:, :], tokens_seen)
    from_start = _select(start_seen, reads * E[..., :-1, 0, :])
    T, bad = unit_inverse(scores[..., :size, :], packed)
    if packed:  # for the backward pass: T is zero and finite where it should be
        T = _finite_gradient(_select(tokens_seen[..., :size, :] | np.eye(size, dtype=bool), T))
    own, Y_of_k, W = v, jnp.zeros((), scores.dtype), jnp.zeros((), scores.dtype)
    if tokens.k is not None:
        k = by_head(tokens.k)
        of_k = times("nbhij,nbhjp->nbhip", _scores(times, reads, k, E[..., :-1, 1:, :], tokens_seen), v)
        own, Y_of_k = -of_k[..., :size, :], of_k[..., size:, :]
        own, bad = _finite(own, bad) if packed else (own, bad)
        W = times("nbhik,nbhip->nbhkp", _select(end_seen, k * E[..., -1, 1:, :]), _select(end_seen, v))

    X = times("nbhij,nbhjp->nbhip", T, jnp.concatenate([-from_start[..., :size, :], own], axis=-1))
    X, bad = _finite(X, bad) if packed else (X, bad)
    RY = times("nbhij,nbhjp->nbhip", scores[..., size:, :], X)
    RY = _finite_gradient(RY) if packed else RY
    NW = times("nbhik,nbhip->nbhkp", _select(end_seen, a * E[..., -1, 1:, :]), _select(end_seen, X))
    W = W + NW[..., keys:]
    if packed:  # of the queries, and of the outgoing state: whether they see a token that is not finite
        spoilt = jnp.any(seen[..., size:, 1:] & bad[..., None, :], axis=-1)
        W = spoil(W, spoilt[..., -1])

    through, N = E[..., -1, 0, :, None], NW[..., :keys].astype(options.factors)
    kept = seen[..., -1:, :1] if packed else None
    before, state = _from_chunk_to_chunk(options.factors, through, N, W, kept, state)
    start_seen = start_seen[..., size:, :]
    of_start = _select(start_seen, from_start[..., size:, :] + RY[..., :keys])
    y = RY[..., keys:] + Y_of_k + _select(start_seen, times("nbhik,nbhkp->nbhip", of_start, before))
    y = (options.scale * y).astype(options.dtype)
    return (spoil(y, spoilt[..., :-1]) if packed else y), state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _from_chunk_to_chunk(
    factors: DTypeLike, through: jax.Array, N: jax.Array, W: jax.Array, kept: jax.Array | None, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The part of a span that is one chunk after the other: S' = through S + N S + W.

    Args:
        factors: dtype of the factors of N S.
        through: [n, B, H, K or 1, 1] (B and H may be 1). N: [n, B, H, K, K]. W: [n, B, H, K, V].
        kept: [n, B, 1, 1, 1] bool, False where the chunk drops S. None: it never does.
        state: [B, H, K, V].

    Returns:
        The state before each chunk [n, B, H, K, V], and the state after the last one.
    """
    return _walk(factors, through, N, W, kept, state)


def _walk(factors, through, N, W, kept, state, reverse=False):
    def step(state, chunk):
        through, N, W, kept = chunk
        new = through * state + product(factors, "bhkl,bhlp->bhkp", N, state)
        return (new if kept is None else _select(kept, new)) + W, state

    unroll = 1 if platforms() == ("cpu",) else min(len(W), SPAN)  # a step is one product, and soon launched
    state, before = jax.lax.scan(step, state, (through, N, W, kept), reverse=reverse, unroll=unroll)
    return before, state


def _from_chunk_to_chunk_fwd(factors, through, N, W, kept, state):
    before, state = _walk(factors, through, N, W, kept, state)
    return (before, state), (through, N, kept, before)


def _from_chunk_to_chunk_bwd(factors, residuals, cotangents):
    """The gradient of the state goes the other way by the transposed matrices, so it is such a walk, too."""
    through, N, kept, before = residuals
    after, dstate = _walk(factors, through, jnp.swapaxes(N, -1, -2), cotangents[0], kept, cotangents[1], reverse=True)
    select = functools.partial(_select, True if kept is None else kept)
    dN = select(product(factors, "nbhkp,nbhlp->nbhkl", after, before))
    broadcast = [axis for axis, size in enumerate(through.shape) if size == 1]
    dthrough = jnp.sum(select(after * before), broadcast, keepdims=True)
    return dthrough, dN.astype(N.dtype), after, None, dstate


_from_chunk_to_chunk.defvjp(_from_chunk_to_chunk_fwd, _from_chunk_to_chunk_bwd)
