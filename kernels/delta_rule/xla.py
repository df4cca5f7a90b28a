"""The delta rule in plain XLA: matrix products over chunks of time; states are kept only at boundaries of spans.

In a chunk of C tokens with the incoming state S, let u_t = b_t^T S_{t-1} be what token t reads for its correction. Then
the state is the one of linear attention with twice the writes, k_s v_s^T and -a_s u_s^T. With

    E[t, s] = exp(sum of log_decay over the tokens after write s, up to and including t)

where the incoming state counts as a write before the first token, the numbers u solve a triangular system,

    u_t + sum_{s<t} (b_t . a_s) E[t-1, s] u_s  =  E[t-1, start] b_t^T S + sum_{s<t} (b_t . k_s) E[t-1, s] v_s.

T is the inverse of its matrix (the WY or UT form of Yang et al. 2024, arXiv 2406.06484). It does not depend on S, and
neither do the factors `read` and `own` in u = read S + own. So all chunks of a span compute them at once, and only

    S' = E[C, start] S + sum_s E[C, s] (k_s v_s^T - a_s u_s^T)

goes from chunk to chunk. The backward pass keeps the state before each span, and computes the span again.

No exponent is above zero, because each sum of log decays is over its own tokens. With a decay for each channel, E is a
matrix for each k, (b_t . a_s) E[t-1, s] is one sum over k, and chunks are shorter.

Products over tokens of several documents select, and what is not finite in one document is taken out before them and
put back as NaN afterwards (see `kernels.finite`). Calls with a few tokens, as in decoding, are unrolled token by token.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from seqmodels.kernels.arrays import expand_to, join_time, split_time
from seqmodels.kernels.delta_rule.triangular import unit_inverse
from seqmodels.kernels.finite import finite_or_zero, not_finite, spoil, spoilt_so_far
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
    """Arrays over time: [B, T, heads, ..], log decays [B or 1, T, H or 1, K or 1], and resets [B, T] bool or None."""

    q: jax.Array
    k: jax.Array
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
    a: jax.Array,
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
    accumulator = jnp.result_type(q, k, v, a, b, jnp.float32)
    state = initial_state.astype(accumulator)
    reset = resets(segment_ids, initial_segment, mask)
    length = v.shape[1]
    if length <= UNROLLED:
        y, state = _few_tokens(scale, read, (q, k, v, a, b, log_decay, reset), state)
        return y.astype(v.dtype), state

    dtype = v.dtype
    q, (k, v, a, b), log_decay, spoilt = isolate(q, (k, v, a, b), log_decay, reset)
    if log_decay is None:  # axes of size one are broadcast over rows and heads: decays are computed once
        log_decay = jnp.zeros((1, length, 1, 1), accumulator)
    decay = log_decay if log_decay.ndim == 4 else log_decay[..., None]
    chunk, span = _lengths(chunk, length, max(state.shape[2:]), decay.shape[-1] > 1)
    options = Options(scale, read, dtype, factors_dtype(q, k, v, a, b), chunk, span)
    y, state = _scan(options, Tokens(q, k, v, a, b, decay, reset), state)
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

    final, (y, before) = jax.lax.scan(body, state, split_time(tokens, options.chunk * options.span))
    return join_time(y, tokens.v.shape[1]), final, before


def _scan_fwd(options, tokens, state):
    y, final, before = (checkpoint_name(x, "scan") for x in _forward(options, tokens, state))
    return (y, final), (tokens, before)


def _scan_bwd(options, residuals, cotangents):
    tokens, before = residuals
    dy, dstate = cotangents
    bad = None if tokens.reset is None else not_finite(dy)
    dy = dy if bad is None else finite_or_zero(dy)
    size, length = options.chunk * options.span, dy.shape[1]

    def body(dstate, piece):
        (*arrays, reset), dy, state = piece

        def forward(arrays, state):
            return _span(options, Tokens(*arrays, reset), state)

        gradients, dstate = jax.vjp(forward, arrays, state)[1]((dy, dstate))
        return dstate, gradients

    pieces = (split_time(tuple(tokens), size), split_time(dy, size), before)
    dstate, gradients = jax.lax.scan(body, dstate, pieces, reverse=True)
    dq, *others = (join_time(x, length) for x in gradients)
    dq = dq if bad is None else spoil(dq, bad)  # so that a gradient that is not finite does not go unnoticed
    return Tokens(dq, *others, None), dstate


_scan.defvjp(_scan_fwd, _scan_bwd)


class Visible(NamedTuple):
    """Which read sees which write, by time and documents: bool, [B or 1, 1, n, ..].

    Attributes:
        corrections: [.., C, C] writes by the reads of b, which come before them.
        reads: [.., C, C] writes by the reads of q.
        start: [.., C, 1] the incoming state by both.
        end: [.., C, 1] writes by the outgoing state.
        through: [.., 1, 1] the incoming state by the outgoing state.
        together: [.., C, C] tokens of the same document.
    """

    corrections: jax.Array
    reads: jax.Array
    start: jax.Array
    end: jax.Array
    through: jax.Array
    together: jax.Array


def _visible(options: Options, reset: jax.Array | None) -> Visible:
    """reset: [B, n, C] or None."""
    if reset is None:
        reset = jnp.zeros((1, options.span, options.chunk), bool)
    document = jnp.cumsum(reset, axis=-1)[:, None]
    last = document[..., -1:]
    same = document[..., :, None] == document[..., None, :]
    before, up_to = (jnp.tril(same, own) for own in (-1, 0))
    reads = up_to if options.read == "inclusive" else before
    return Visible(before, reads, document[..., None] == 0, (document == last)[..., None], last[..., None] == 0, same)


@jax.custom_vjp
def _finite(x: jax.Array) -> jax.Array:
    """x, and in the backward pass its gradient, with zeros in place of what is not finite."""
    return finite_or_zero(x)


_finite.defvjp(lambda x: (finite_or_zero(x), None), lambda _, dy: (finite_or_zero(dy),))


class Guard:
    """Takes out what is not finite before a product over tokens of several documents, and remembers the tokens."""

    def __init__(self, active: bool) -> None:
        self.active, self.found = active, jnp.zeros((), bool)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, H, n, C, ..] with zeros in place of what is not finite."""
        if not self.active:
            return x
        self.note(jnp.any(~jnp.isfinite(x), axis=-1))
        return _finite(x)

    def note(self, bad: jax.Array) -> None:
        """Remember the tokens that are `bad` [B, H, n, C]: `found` is [B, n, C]."""
        self.found = self.found | jnp.any(bad, axis=1)


def _decays(decay: jax.Array, active: bool) -> jax.Array:
    """E [B, H, n, C + 1, C + 1, K] (axes of size one stay so) from log decays [B, H, n, C, K].

    Rows are numbers of tokens that have passed. Columns are writes, the incoming state first; it is zero for writes
    that are yet to come. If `active`, gradients that are not finite, which belong to one document, become zero.
    """
    size = decay.shape[-2]
    passed, after = jnp.tril(jnp.ones((size + 1, size), decay.dtype), -1), jnp.tril(jnp.ones((size, size + 1), bool))
    spread = jnp.where(after[..., None], decay[..., None, :], 0)
    sums = jnp.einsum("il,bhnljk->bhnijk", passed, spread, precision="highest")
    sums = _finite(sums) if active else sums
    return jnp.exp(jnp.where(jnp.tril(jnp.ones((size + 1, size + 1), bool))[..., None], sums, -jnp.inf))


def _select(visible: jax.Array, x: jax.Array) -> jax.Array:
    """x where `visible`, else zero, even where x is infinite or NaN."""
    return jnp.where(visible, x, 0)


def _scores(times: Callable[..., jax.Array], reads: jax.Array, writes: jax.Array, E: jax.Array, seen: jax.Array):
    """The decayed products of reads and writes [B, H, n, C, K] where they are `seen`: [B, H, n, C, C].

    E: [B, H, n, C, C + 1, 1 or K], rows of the reads.
    """
    E = E[..., 1:, :]
    if E.shape[-1] == 1:
        return _select(seen, times("bhnik,bhnjk->bhnij", reads, writes) * E[..., 0])
    reads, writes = reads.astype(E.dtype), writes.astype(E.dtype)
    return _select(seen, jnp.einsum("bhnik,bhnjk,bhnijk->bhnij", reads, writes, E, precision="highest"))


def _chunks(x: jax.Array, count: int) -> jax.Array:
    """[B, n C, H, ..] to [B, H, n, C, ..]."""
    return jnp.moveaxis(x.reshape(x.shape[0], count, -1, *x.shape[2:]), 3, 1)


def _span(options: Options, tokens: Tokens, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """y [B, n C, H, V] and the state after n chunks, from tokens of these chunks and the state before them."""
    n, heads, packed = options.span, tokens.v.shape[2], tokens.reset is not None
    reset = None if tokens.reset is None else tokens.reset.reshape(-1, n, options.chunk)
    times, guard = functools.partial(product, options.factors), Guard(packed)
    q, k, a, b = (
        jnp.repeat(_chunks(x, n), heads // x.shape[2], axis=1) for x in (tokens.q, tokens.k, tokens.a, tokens.b)
    )
    v, seen, E = _chunks(tokens.v, n), _visible(options, reset), _decays(_chunks(tokens.decay, n), packed)
    of_b, of_q = E[..., :-1, :, :], E[..., 1:, :, :] if options.read == "inclusive" else E[..., :-1, :, :]

    # what each token reads for its correction is u = read S + own
    T, bad = unit_inverse(guard(_scores(times, b, a, of_b, seen.corrections)), packed)
    if packed:
        guard.note(bad)
        T = guard(_select(seen.together, T))
    read = times("bhnij,bhnjk->bhnik", T, _select(seen.start, b * of_b[..., 0, :]))
    read = guard(_select(seen.start, read))
    own = guard(times("bhnij,bhnjp->bhnip", _scores(times, b, k, of_b, seen.corrections), v))
    own = times("bhnij,bhnjp->bhnip", T, own)

    to_end, through = E[..., -1, 1:, :], E[..., -1, 0, :, None]
    written = times("bhnik,bhnip->bhnkp", _select(seen.end, k * to_end), _select(seen.end, v))
    moves = (read, own, written, _select(seen.end, a * to_end), through)
    before, u, spoilt, state = _from_chunk_to_chunk(times, guard, moves, seen, reset, state)

    y = times("bhnij,bhnjp->bhnip", _scores(times, q, k, of_q, seen.reads), v)
    y = y - times("bhnij,bhnjp->bhnip", _scores(times, q, a, of_q, seen.reads), u)
    from_start = times("bhnik,bhnkp->bhnip", _select(seen.start, q * of_q[..., 0, :]), before)
    y = options.scale * (y + _select(seen.start, from_start))
    y = jnp.moveaxis(y, 1, 3)
    y = y.reshape(y.shape[0], -1, *y.shape[3:]).astype(options.dtype)
    return (spoil(y, spoilt) if packed else y), state


def _from_chunk_to_chunk(
    times: Callable[..., jax.Array],
    guard: Guard,
    moves: tuple[jax.Array, ...],
    seen: Visible,
    reset: jax.Array | None,
    state: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]:
    """The part of a span that is one chunk after the other.

    Args:
        moves: factors `read` [B, H, n, C, K] and `own` [B, H, n, C, V] of u; what the values add to the outgoing state,
            [B, H, n, K, V]; decayed a [B, H, n, C, K]; factors of the incoming state [B, H, n, K or 1, 1].
        guard: has found the tokens that are not finite already, apart from those that the state spoils.

    Returns:
        The state before each chunk [B, H, n, K, V], u [B, H, n, C, V], the tokens [B, n C] whose document is spoilt
        (None without resets), and the state after the last chunk.
    """

    def step(state, chunk):
        (read, own, written, taken, through), (start, end, stays), found, reset = chunk
        u = _select(start, times("bhik,bhkp->bhip", read, state)) + own
        spoilt = None
        if reset is not None:
            spoilt = spoilt_so_far(found | jnp.any(~jnp.isfinite(u), axis=(1, 3)), reset)
            u = _finite(u)
        new = _select(stays, through * state) + written - times("bhik,bhip->bhkp", taken, _select(end, u))
        return (new if spoilt is None else spoil(new, spoilt[:, -1])), (state, u, spoilt)

    by_head = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), (moves, (seen.start, seen.end, seen.through)))
    by_token = (None, None) if reset is None else (jnp.moveaxis(x, 1, 0) for x in (guard.found, reset))
    state, (before, u, spoilt) = jax.lax.scan(step, state, (*by_head, *by_token))
    spoilt = None if spoilt is None else join_time(spoilt, u.shape[0] * u.shape[3])
    return jnp.moveaxis(before, 0, 2), jnp.moveaxis(u, 0, 2), spoilt, state
