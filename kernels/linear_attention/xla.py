"""Linear attention in plain XLA: matrix products over chunks of time; states are kept only at chunk boundaries.

Inside a block of C tokens, the incoming state counts as one more token before the first. The outgoing state counts as
one more read after the last. Then one matrix holds all decays,

    D[i, j] = exp(sum of log_decay over the tokens l that read i sees after token j)          [C + 1, C + 1]

which is zero where i does not see j. Products with these zeros are selected, not multiplied, because the other factor
may be infinite or NaN. For one head, the block computes

    y_i = sum_j (q_i . k_j) D[i, j] v_j + D[i, start] q_i S,     S' = D[end, start] S + sum_j D[end, j] k_j v_j^T.

Each sum of log decays is computed directly over its own tokens. The difference of two running sums would suffer from
cancellation. No exponent is above zero.

If all channels of a head share one decay, D is the same matrix for all K, and each chunk is one block. With a decay for
each channel, there is a matrix D for each k. Blocks are then shorter, and a chunk consists of several blocks: the
backward pass starts from the states at the chunks' boundaries and recomputes the states of the blocks.

Calls with a few tokens, as in decoding, are unrolled token by token, on the state in its given layout.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from seqmodels.kernels.arrays import expand_to, join_time, split_time
from seqmodels.kernels.finite import finite_or_zero, not_finite, spoil
from seqmodels.kernels.isolate import isolate
from seqmodels.kernels.segments import forget, resets
from seqmodels.kernels.tuning import UNROLLED

CHUNK = 64  # tokens between the states that are kept
BLOCK = 16  # tokens of a block if every channel has its own decay


class Options(NamedTuple):
    """Static options. dtype: of y; factors: dtype of the factors in products; chunk, block: lengths in tokens."""

    scale: float
    read: str
    dtype: DTypeLike
    factors: DTypeLike
    chunk: int
    block: int


def supports(**facts: object) -> str | None:
    """Supports every call on every platform."""
    return None


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None,
    bonus: jax.Array | None,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    initial_segment: jax.Array | None,
    mask: jax.Array | None,
    *,
    scale: float,
    read: str,
    chunk: int | None,
    dtype: DTypeLike,
) -> tuple[jax.Array, jax.Array]:
    """As `kernels.linear_attention.linear_attention`, with padding set to zero and the normaliser as a column of v.

    y is in `dtype`.
    """
    accumulator = jnp.result_type(q, k, v, jnp.float32)
    state = initial_state.astype(accumulator)
    bonus = None if bonus is None else bonus.astype(accumulator)
    reset = resets(segment_ids, initial_segment, mask)
    if v.shape[1] <= UNROLLED:
        y, state = _few_tokens(scale, read, (q, k, v, log_decay, reset), bonus, state)
        return y.astype(dtype), state

    q, (k, v), log_decay, spoilt = isolate(q, (k, v), log_decay, reset)
    # from here on heads have two axes [G, R]: key heads, and the value heads that share each of them
    (batch, length, heads, values), (groups, keys) = v.shape, k.shape[2:]
    each = heads // groups
    if log_decay is None:  # axes of size one are broadcast over rows and heads: decays are computed once
        decay = jnp.zeros((1, length, 1, 1, 1), accumulator)
    elif log_decay.ndim == 1:
        decay = jnp.broadcast_to(log_decay.reshape(1, 1, groups, each, 1), (1, length, groups, each, 1))
    else:
        decay = log_decay.reshape(batch, length, groups, each, -1)
    v = v.reshape(batch, length, groups, each, values)
    bonus = None if bonus is None else bonus.reshape(groups, each, keys)
    state = state.reshape(batch, groups, each, keys, values)
    chunk = min(chunk or CHUNK, length)
    block = min(BLOCK, chunk) if decay.shape[-1] > 1 else chunk
    options = Options(scale, read, dtype, factors_dtype(q, k, v), chunk, block)
    y, state = _attend(options, (q, k, v, decay, reset), bonus, state)
    y, state = y.reshape(batch, length, heads, values), state.reshape(batch, heads, keys, values)
    return (y, state) if spoilt is None else (spoil(y, spoilt.reads), spoil(state, spoilt.writes[:, -1]))


def _few_tokens(scale, read, tokens, bonus, state):
    """y [B, T, H, V] and the final state [B, H, K, V], token by token.

    Args:
        tokens: q, k [B, T, Hk, K], v [B, T, H, V], log decays in any of their shapes, and resets [B, T] bool or None.
        bonus: [H, K] or None.
        state: [B, H, K, V]; its layout is kept, so that a donated state is updated in place.
    """
    q, k, v, decay, reset = tokens
    q, k = (jnp.repeat(x.astype(state.dtype), v.shape[2] // x.shape[2], axis=2)[..., None] for x in (q, k))
    v = v.astype(state.dtype)
    readouts = []
    for t in range(v.shape[1]):
        old = forget(state, None if reset is None else reset[:, t])
        write = k[:, t] * v[:, t, :, None, :]
        state = write + (old if decay is None else _decay_of(decay, t) * old)
        seen = state
        if read == "exclusive":
            seen = old if bonus is None else old + bonus[..., None] * write
        readouts.append(scale * jnp.sum(q[:, t] * seen, axis=-2))
    # makes XLA compute all sums and the new state in one kernel, which reads the state once
    readouts, state = jax.lax.optimization_barrier((readouts, state))
    return jnp.stack(readouts, axis=1), state


def _decay_of(log_decay, t):
    """Factor of a state [B, H, K, V] at token t, from log decays [H], [B, T, H] or [B, T, H, K]."""
    if log_decay.ndim == 1:
        return jnp.exp(log_decay)[:, None, None]
    log_decay = log_decay[:, t]
    return jnp.exp(expand_to(log_decay, 4))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, tokens, bonus, state):
    """y [B, T, G, R, V] and the final state.

    Args:
        tokens: q, k [B, T, G, K], v [B, T, G, R, V], log decays [B or 1, T, G or 1, R or 1, K or 1], and resets
            [B, T] bool or None.
        bonus: [G, R, K] or None.
        state: [B, G, R, K, V].
    """
    y, state, _ = _forward(options, tokens, bonus, state)
    return y, state


def _attend_fwd(options, tokens, bonus, state):
    y, final, boundaries = (checkpoint_name(x, "scan") for x in _forward(options, tokens, bonus, state))
    return (y, final), (tokens, bonus, boundaries)


def _attend_bwd(options, residuals, cotangents):
    tokens, bonus, boundaries = residuals
    dy, dstate = cotangents
    reset = tokens[4]
    bad = None if reset is None else not_finite(dy)
    dy = dy if reset is None else finite_or_zero(dy)

    def chunk(tokens, dy, state, dstate):
        _, _, states = _in_pieces(_block(options, bonus), options.block, tokens, state)
        return _back_in_pieces(block, options.block, tokens, dy, states, dstate)

    def block(tokens, dy, state, dstate):
        return _block_gradients(options, tokens, bonus, state, dy, dstate)

    (dq, *gradients), dbonus, dstate = _back_in_pieces(chunk, options.chunk, tokens, dy, boundaries, dstate)
    dq = dq if bad is None else spoil(dq, bad)  # so that a gradient that is not finite does not go unnoticed
    return (dq, *gradients, None), dbonus, dstate


_attend.defvjp(_attend_fwd, _attend_bwd)


def _forward(options, tokens, bonus, state):
    """y, the final state, and the states [T / chunk, B, G, R, K, V] at the start of each chunk."""

    def chunk(tokens, state):
        return _in_pieces(_block(options, bonus), options.block, tokens, state)[:2]

    return _in_pieces(chunk, options.chunk, tokens, state)


def _in_pieces(forward, size, tokens, state):
    """Apply `forward(tokens, state) -> y, state` piece by piece: y, the last state, and the state before each piece."""

    def body(state, piece):
        y, new = forward(piece, state)
        return new, (y, state)

    state, (y, before) = jax.lax.scan(body, state, split_time(tokens, size))
    return join_time(y, tokens[0].shape[1]), state, before


def _back_in_pieces(backward, size, tokens, dy, states, dstate):
    """Apply `backward` from the last piece to the first.

    Args:
        backward: `backward(tokens, dy, state, dstate) -> gradients of tokens, bonus and state`.
        states: the state before each piece.
        dstate: gradient of the last state.
    """

    def body(dstate, piece):
        gradients, dbonus, dstate = backward(*piece, dstate)
        return dstate, (gradients, dbonus)

    pieces = (split_time(tokens, size), split_time(dy, size), states)
    dstate, (gradients, dbonus) = jax.lax.scan(body, dstate, pieces, reverse=True)
    dbonus = None if dbonus is None else jnp.sum(dbonus, axis=0)
    return tuple(join_time(g, dy.shape[1]) for g in gradients), dbonus, dstate


def factors_dtype(*arrays: jax.Array) -> jnp.dtype:
    """Dtype of factors: bfloat16 for bfloat16 arrays, else the dtype of sums (the state would overflow in float16)."""
    dtype = jnp.result_type(*arrays)
    return dtype if dtype == jnp.bfloat16 else jnp.promote_types(jnp.float32, dtype)


def product(factors: DTypeLike, spec: str, *arrays: jax.Array) -> jax.Array:
    """einsum with factors of dtype `factors`, summed at least in float32. Float32 factors are not rounded (no TF32)."""
    arrays = tuple(x.astype(factors) for x in arrays)
    if factors != jnp.bfloat16:
        return jnp.einsum(spec, *arrays, precision="highest")
    # XLA's CPU backend does not support this product of bfloat16 arrays in every layout
    exact = lambda *x: jnp.einsum(spec, *(y.astype(jnp.float32) for y in x))  # noqa: E731
    rounded = functools.partial(jnp.einsum, spec, preferred_element_type=jnp.float32)
    return jax.lax.platform_dependent(*arrays, cpu=exact, default=rounded)


def _sees(length, read):
    """[C + 1, C] bool: the tokens that each token's read sees; for the last row, the outgoing state, all tokens."""
    own = 0 if read == "inclusive" else -1
    return jnp.tril(jnp.ones((length + 1, length), bool), own).at[-1].set(True)


def _after(length):
    """[C, C + 1] bool: the tokens after the incoming state (that is, all), and the tokens after each token."""
    return jnp.tril(jnp.ones((length, length + 1), bool))


def _decays(options, decay, reset):
    """D [B, G, R, C + 1, C + 1, K] from the writes (columns) to the reads (rows) of a block; reads are scaled.

    Axes of size one stay so. The first column belongs to the incoming state, the last row to the outgoing state. Also
    returns where it is not zero, except by decay: which reads see which writes, bool, in the same shape.
    """
    length = decay.shape[1]
    sees, after = _sees(length, options.read), _after(length)
    decay = jnp.moveaxis(decay, 1, 3)[..., None, :]  # [B, G, R, C, 1, K]
    spread = jnp.where(after[..., None], decay, 0)
    sums = jnp.einsum("il,bgrljn->bgrijn", sees.astype(spread.dtype), spread, precision="highest")
    visible = jnp.concatenate([jnp.ones((length + 1, 1), bool), sees], axis=1)
    if reset is not None:
        document = jnp.cumsum(reset, axis=1)
        of_read = jnp.concatenate([document, document[:, -1:]], axis=1)
        of_write = jnp.concatenate([jnp.zeros_like(document[:, :1]), document], axis=1)
        visible = visible & (of_read[:, :, None] == of_write[:, None, :])
    visible = visible.reshape(-1, 1, 1, *visible.shape[-2:], 1)
    D = jnp.exp(jnp.where(visible, sums, -jnp.inf))
    return D * jnp.where(jnp.arange(length + 1) < length, options.scale, 1.0).astype(D.dtype)[:, None, None], visible


def _select(visible, x):
    """x where `visible`, else zero, even where x is infinite or NaN."""
    return jnp.where(visible, x, 0)


def _scores(options, q, k, D, visible):
    """(q_i . k_j) D[i, j] [B, G, R, C, C], and q_i . k_j [B, G, 1, C, C] where D is the same for all K (else None)."""
    D, seen = D[..., :-1, 1:, :], visible[..., :-1, 1:, 0]
    if D.shape[-1] == 1:
        products = product(options.factors, "bign,bjgn->bgij", q, k)[:, :, None]
        return _select(seen, products * D[..., 0]), products
    scores = jnp.einsum("bign,bjgn,bgrijn->bgrij", q.astype(D.dtype), k.astype(D.dtype), D, precision="highest")
    return _select(seen, scores), None


def _on_diagonal(x):
    """The matrices [..., C, C] with x [..., C] on the diagonal."""
    return jnp.where(jnp.eye(x.shape[-1], dtype=bool), x[..., None], 0)


def _by_head(x):
    """[B, C, G, K] to [B, G, 1, C, K]."""
    return jnp.moveaxis(x, 1, 2)[:, :, None]


def _of_tokens(visible):
    """[B, 1, 1, C, 1] to [B, C, 1, 1, 1]."""
    return jnp.moveaxis(visible, 3, 1)


def _block(options, bonus):
    """The function of a block's tokens and incoming state to y [B, C, G, R, V] and the outgoing state."""

    def forward(tokens, state):
        q, k, v, decay, reset = tokens
        D, visible = _decays(options, decay, reset)
        scores, _ = _scores(options, q, k, D, visible)
        if bonus is not None:
            own = options.scale * jnp.einsum("bign,grn,bign->bgri", q, bonus, k, precision="highest")
            scores = scores + _on_diagonal(own)
        times = functools.partial(product, options.factors)
        y = times("bgrij,bjgrp->bigrp", scores, v)
        read = times("bgrin,bgrnp->bigrp", _by_head(q) * D[..., :-1, 0, :], state)
        y = y + _select(_of_tokens(visible[..., :-1, 0, :]), read)
        written = times("bgrjn,bjgrp->bgrnp", _by_head(k) * D[..., -1, 1:, :], v)
        return y.astype(options.dtype), _select(visible[..., -1, 0, :, None], D[..., -1, 0, :, None] * state) + written

    return forward


def _block_gradients(options, tokens, bonus, state, dy, dstate):
    """Gradients of a block's q, k, v and log decays, of the bonus, and of the incoming state."""
    q, k, v, decay, reset = tokens
    times = functools.partial(product, options.factors)
    D, visible = _decays(options, decay, reset)
    scores, products = _scores(options, q, k, D, visible)
    seen, from_start, to_end = visible[..., :-1, 1:, :], visible[..., :-1, 0, :], visible[..., -1, 1:, :]
    q_, k_ = _by_head(q), _by_head(k)
    dscores = times("bigrp,bjgrp->bgrij", dy, v)

    # through the scores; `within` is the gradient of D's exponents there, [B, G, R, C, C, K or 1]
    if products is not None:
        weighted = _select(seen[..., 0], dscores * D[..., :-1, 1:, 0])
        dproducts = jnp.sum(weighted, axis=2)
        dq, dk = times("bgij,bjgn->bign", dproducts, k), times("bgij,bign->bjgn", dproducts, q)
        within = _select(seen, (weighted * products)[..., None])
    else:
        weighted = _select(seen, dscores[..., None] * D[..., :-1, 1:, :])
        dq = jnp.einsum("bgrijn,bjgn->bign", weighted, k.astype(weighted.dtype), precision="highest")
        dk = jnp.einsum("bgrijn,bign->bjgn", weighted, q.astype(weighted.dtype), precision="highest")
        within = _select(seen, weighted * (q_[..., :, None, :] * k_[..., None, :, :]))
    dbonus = None
    if bonus is not None:
        down = options.scale * jnp.diagonal(dscores, axis1=-2, axis2=-1)
        dq = dq + jnp.einsum("bgri,grn,bign->bign", down, bonus, k, precision="highest")
        dk = dk + jnp.einsum("bgri,grn,bign->bign", down, bonus, q, precision="highest")
        dbonus = jnp.einsum("bgri,bign,bign->grn", down, q, k, precision="highest")
        own = options.scale * jnp.einsum("bign,grn,bign->bgri", q, bonus, k, precision="highest")
        scores = scores + _on_diagonal(own)
    dv = times("bgrij,bigrp->bjgrp", scores, dy)

    # through the readout of the incoming state, and through the writes into the outgoing state
    read, written = _by_head(q) * D[..., :-1, 0, :], k_ * D[..., -1, 1:, :]
    dread = _select(from_start, times("bigrp,bgrnp->bgrin", dy, state) * D[..., :-1, 0, :])
    dwritten = _select(to_end, times("bjgrp,bgrnp->bgrjn", v, dstate) * D[..., -1, 1:, :])
    dq = dq + jnp.moveaxis(jnp.sum(dread, axis=2), 2, 1)
    dk = dk + jnp.moveaxis(jnp.sum(dwritten, axis=2), 2, 1)
    dv = dv + _select(_of_tokens(to_end), times("bgrjn,bgrnp->bjgrp", written, dstate))
    through, stays = D[..., -1, 0, :], visible[..., -1, 0, :]
    dthrough = _select(stays, through * jnp.sum(dstate * state, axis=-1))
    dstate = _select(stays[..., None], through[..., None] * dstate) + times("bgrin,bigrp->bgrnp", read, dy)

    exponents = (dread * q_, dwritten * k_, dthrough)
    if decay.shape[-1] == 1:
        exponents = (jnp.sum(x, axis=-1, keepdims=True) for x in exponents)
    exponents = (within, *exponents)
    if reset is not None:  # they are summed over documents, by a matrix product
        exponents = tuple(finite_or_zero(x) for x in exponents)
    ddecay = _decay_gradients(options, *exponents, decay.shape)
    gradients = (x.astype(y.dtype) for x, y in zip((dq, dk, dv, ddecay), tokens, strict=False))
    return tuple(gradients), dbonus, dstate


def _decay_gradients(options, within, read, written, through, shape):
    """Gradients of the log decays, of shape `shape`, from the gradients of the exponents of D.

    Args:
        within: [B, G, R, C, C, K], from each of the block's tokens to each read.
        read: [B, G, R, C, K], from the incoming state to each read.
        written: [B, G, R, C, K], from each token to the outgoing state.
        through: [B, G, R, K], from the incoming state to the outgoing state.
    """
    rows = jnp.concatenate([read[..., None, :], within], axis=-2)
    last = jnp.concatenate([through[..., None, :], written], axis=-2)
    exponents = jnp.concatenate([rows, last[..., None, :, :]], axis=-3)
    length = shape[1]
    sees = _sees(length, options.read).astype(exponents.dtype)
    sums = jnp.einsum("il,bgrijn->bgrljn", sees, exponents, precision="highest")
    gradients = jnp.moveaxis(jnp.sum(jnp.where(_after(length)[..., None], sums, 0), axis=-2), 3, 1)
    shared = tuple(axis for axis, size in enumerate(shape) if size == 1)
    return jnp.sum(gradients, axis=shared, keepdims=True)
