"""The linear scan in plain XLA: chunks of time advance side by side, token by token.

A chunk maps the state before it to factor * state + added. So a first walk, from zero, finds what each chunk adds; then
states go from chunk to chunk (`kernels.pieces`); and a second walk starts each chunk from its state. A step of a walk
is one token of all chunks, [B, chunks, D]: with about sqrt(T) tokens in a chunk, there are few steps, and each has
enough to do for a GPU. On a CPU one chunk, the whole sequence, is faster, since it is walked only once. An associative
scan would read and write the arrays more often, and takes much longer to compile.

The backward pass is such a scan, too, against time. With g_t the gradient of h_t by all that comes after it,

    g_t = dh_t + c_{t+1},   c_t = exp(log_decay_t) g_t,   dx_t = g_t,   dlog_decay_t = c_t h_{t-1}.

Arrays are indexed where they are, and never transposed.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from seqmodels.kernels.arrays import pad
from seqmodels.kernels.dispatch import platforms
from seqmodels.kernels.pieces import chain
from seqmodels.kernels.segments import forget, resets, resets_in_reverse
from seqmodels.kernels.tuning import UNROLLED

Step = Callable[..., tuple[jax.Array, jax.Array]]  # (state, log decay, x, reset) of a token to (state, result)


def supports(**facts: object) -> str | None:
    """Supports every call on every platform."""
    return None


def linear_scan(
    log_decay: jax.Array,
    x: jax.Array,
    initial_state: jax.Array,
    segment_ids: jax.Array | None,
    initial_segment: jax.Array | None,
    mask: jax.Array | None,
    *,
    reverse: bool,
) -> tuple[jax.Array, jax.Array]:
    """As `kernels.linear_scan.linear_scan`, with one axis of channels and padding set to zero."""
    reset = (resets_in_reverse if reverse else resets)(segment_ids, initial_segment, mask)
    if x.shape[1] <= UNROLLED:
        h, state = _few_tokens(log_decay, x, initial_state, reset, reverse)
        return h.astype(x.dtype), state
    return _scan(reverse, log_decay, x, initial_state, reset)


def _few_tokens(log_decay, x, state, reset, reverse):
    """h and the final state, token by token, as in decoding: a donated state is updated in place."""
    states: dict[int, jax.Array] = {}
    times = range(x.shape[1])
    for t in reversed(times) if reverse else times:
        state, states[t] = _advance(state, log_decay[:, t], x[:, t], None if reset is None else reset[:, t])
    return jnp.stack([states[t] for t in times], axis=1), state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(
    reverse: bool, log_decay: jax.Array, x: jax.Array, state: jax.Array, reset: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """h [B, T, D] in x's dtype, and the final state [B, D]; reset is [B, T] bool or None."""
    h, state = _by_chunks(_advance, log_decay, x, state, reset, reverse, x.dtype)
    return h, state


def _scan_fwd(reverse, log_decay, x, state, reset):
    h, final = (checkpoint_name(y, "scan") for y in _scan(reverse, log_decay, x, state, reset))
    return (h, final), (log_decay, h, state, reset)


def _scan_bwd(reverse, residuals, cotangents):
    log_decay, h, state, reset = residuals
    dh, dfinal = cotangents
    g, dstate = _by_chunks(_retreat, log_decay, dh, dfinal, reset, not reverse, state.dtype)
    rest, edge = (h[:, 1:] if reverse else h[:, :-1]).astype(state.dtype), state[:, None]
    before = jnp.concatenate([rest, edge] if reverse else [edge, rest], axis=1)
    dlog_decay = forget(jnp.exp(log_decay.astype(g.dtype)) * g * before, reset)
    return dlog_decay.astype(log_decay.dtype), g.astype(h.dtype), dstate, None


_scan.defvjp(_scan_fwd, _scan_bwd)


def _advance(state, log_decay, x, reset):
    """The state after a token, twice."""
    state = jnp.exp(log_decay.astype(state.dtype)) * forget(state, reset) + x
    return state, state


def _retreat(carried, log_decay, dh, reset):
    """What the gradient of a token's state passes on to the token before it, and the gradient itself."""
    g = dh + carried
    return forget(jnp.exp(log_decay.astype(g.dtype)) * g, reset), g


def _by_chunks(
    step: Step,
    log_decay: jax.Array,
    x: jax.Array,
    state: jax.Array,
    reset: jax.Array | None,
    reverse: bool,
    dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array]:
    """The results of `step` [B, T, D] in `dtype`, and the final state: on a CPU by one chunk, elsewhere by several."""

    def run(size, log_decay, x, state, reset):
        return _walk_chunks(step, log_decay, x, state, reset, reverse, dtype, size)

    whole, several = functools.partial(run, x.shape[1]), functools.partial(run, chunk_size(x.shape[1]))
    return _by_platform(whole, several, log_decay, x, state, reset)


def _by_platform(whole, several, *arrays):
    """`whole` on a CPU, `several` elsewhere; chosen at lowering."""
    if platforms() == ("cpu",):  # spares the time to trace the other
        return whole(*arrays)
    return jax.lax.platform_dependent(*arrays, cpu=whole, default=several)


def chunk_size(length: int) -> int:
    """Tokens of a chunk: the power of two next below sqrt(T / 2), for two walks of a chunk and one over the chunks."""
    return 1 << (math.isqrt(max(length // 2, 1)).bit_length() - 1)


def _walk_chunks(step, log_decay, x, state, reset, reverse, dtype, size):
    """As `_by_chunks`, by chunks of `size` tokens; the last one is padded with tokens that change nothing."""
    length = x.shape[1]
    count = -(-length // size)

    def split(array):
        return array.reshape(array.shape[0], count, size, *array.shape[2:])

    arrays = jax.tree.map(lambda a: split(pad(a, {1: count * size})), (log_decay, x, reset))
    if count == 1:
        state, out = _walk(step, state[:, None], arrays, reverse, dtype)
        return out[:, 0], state[:, 0]
    added, _ = _walk(step, jnp.zeros((x.shape[0], count, x.shape[2]), state.dtype), arrays, reverse, None)
    fresh = None if reset is None else jnp.any(arrays[2], axis=2)
    factors = forget(jnp.exp(jnp.sum(arrays[0].astype(state.dtype), axis=2)), fresh)
    first = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (factors, added, fresh))
    before, final = chain(first[0], first[1], state, first[2], reverse)
    _, out = _walk(step, jnp.moveaxis(before, 0, 1), arrays, reverse, dtype)
    return out.reshape(x.shape[0], -1, x.shape[2])[:, :length], final


def _walk(
    step: Step, state: jax.Array, arrays: Any, reverse: bool, dtype: jnp.dtype | None
) -> tuple[jax.Array, jax.Array | None]:
    """Go through the chunks from `state` [B, n, D] on, token by token.

    Args:
        arrays: log decays and x [B, n, C, D]; resets [B, n, C] or None.
        dtype: of the results of the steps, which are returned as [B, n, C, D]. None: they are not kept.
    """
    _, _, size, _ = arrays[1].shape

    def body(i, carry):
        state, out = carry
        t = size - 1 - i if reverse else i
        token = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, t, 2, keepdims=False), arrays)
        state, result = step(state, *token)
        if out is not None:
            out = jax.lax.dynamic_update_index_in_dim(out, result.astype(dtype), t, 2)
        return state, out

    out = None if dtype is None else jnp.zeros(arrays[1].shape, dtype)
    return jax.lax.fori_loop(0, size, body, (state, out))
