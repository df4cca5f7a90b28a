"""Linear attention with time split over devices, for use inside `jax.shard_map`.

A piece of time maps the state at its start to that at its end by S -> a S + E: a is the product of its decays, zero if
a reset is inside, and E its end from a zero start, which needs no recurrence,

    E = sum_t exp(log_decay_(t+1) + .. + log_decay_T) k_t v_t^T          over the tokens after its last reset.

So each device makes (a, E) of its piece, gathers those of all pieces, chains them, which gives the state at its own
start and at the very end, and attends over its piece from there. Backwards the pieces are chained the other way round:
what a piece's own outputs send to its start,

    scale sum_t exp(log_decay_1 + .. + log_decay_t) q_t dy_t^T           over the tokens before its first reset,

gives, chained, the gradient at each piece's end, and the backward pass over the piece the rest. (An exclusive read is
not decayed by its own token.)

Cost on each of S devices, beyond its share of the work: two such products, and gathers of S states [B, H, K, V] each
way. Activations never leave their device.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from seqmodels.kernels import linear_attention as op
from seqmodels.kernels.arrays import zero_padding
from seqmodels.kernels.linear_attention import xla
from seqmodels.kernels.pieces import chain
from seqmodels.kernels.segments import resets, segment_before


class Options(NamedTuple):
    """What is static: the mesh axis that time is split over, and options of the operation."""

    axis: str | tuple[str, ...]
    scale: float
    read: str
    chunk: int | None
    implementation: str | None
    dtype: jnp.dtype


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    axis: str | tuple[str, ...],
    scale: float = 1.0,
    read: str = "inclusive",
    bonus: jax.Array | None = None,
    normalise: bool = False,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    initial_segment: jax.Array | None = None,
    mask: jax.Array | None = None,
    chunk: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As `kernels.linear_attention.linear_attention` of the whole; arrays with a time axis hold this device's piece.

    Args:
        axis: mesh axis (or axes) that time is split over, pieces in the order of the axis, all of one length.
        initial_state, initial_segment: what comes before the first piece, the same on every device.
        implementation: of what is done with each piece.

    Returns:
        y of this device's piece, and the state after the last piece, the same on every device. The enclosing shard_map
        needs check_vma=False; it sums the gradients of what is the same on every device.
    """
    documents = dict(segment_ids=segment_ids, initial_segment=initial_segment, mask=mask)
    op.check(q, k, v, log_decay, read, bonus, normalise, initial_state, **documents, chunk=chunk)
    if segment_ids is not None:
        documents["initial_segment"] = segment_before(segment_ids, initial_segment, mask, axis)
    accumulator = jnp.result_type(q, k, v, jnp.float32)
    values = op.append_ones(v) if normalise else v
    if initial_state is None:
        initial_state = jnp.zeros((v.shape[0], v.shape[2], k.shape[3], values.shape[3]), accumulator)
    options = Options(axis, scale, read, chunk, implementation, accumulator if normalise else v.dtype)
    arrays = dict(q=q, k=k, v=values, log_decay=log_decay, bonus=bonus, initial_state=initial_state)
    y, state = _attend(options, arrays, documents)
    return (op.divide(y).astype(v.dtype) if normalise else y), state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, arrays, documents):
    start, end, _ = _chained(options, arrays, documents)
    return _piece(options, documents, arrays | dict(initial_state=start))[0], end


def _attend_fwd(options, arrays, documents):
    # a policy that keeps the backends' "scan" spares the pass that leads to these, too
    start, end, factors = (checkpoint_name(x, "scan") for x in _chained(options, arrays, documents))
    run = functools.partial(_piece, options, documents)
    (y, _), transpose = jax.vjp(run, arrays | dict(initial_state=start))
    return (y, end), (arrays, documents, factors, transpose)


def _attend_bwd(options, residuals, cotangents):
    arrays, documents, factors, transpose = residuals
    dy, dend = cotangents
    dend = jax.lax.psum(dend, options.axis)  # the end is one value, of which every device holds a copy
    dstart = jax.lax.all_gather(_start_gradient(options, arrays, documents, dy), options.axis)
    dends, _ = chain(factors, dstart, dend, reverse=True)
    index = jax.lax.axis_index(options.axis)
    (gradients,) = transpose((dy, dends[index]))
    gradients["initial_state"] = jnp.where(index == 0, gradients["initial_state"], 0)
    return gradients, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _piece(options, documents, arrays):
    """The operation on this device's piece by itself."""
    static = dict(scale=options.scale, read=options.read, chunk=options.chunk, dtype=options.dtype)
    return op.readouts(**arrays, **documents, **static, implementation=options.implementation)


def _chained(options, arrays, documents):
    """The state at this piece's start, that at the very end, and every piece's factor [S, B, H, K or 1, 1]."""
    logs, reset = _log_decays(arrays, documents["mask"]), resets(**documents)
    total, added = jnp.sum(logs, axis=1), _end(arrays, documents["mask"], logs, reset)
    reset = None if reset is None else jnp.any(reset, axis=1)
    total, added, reset = jax.lax.all_gather((total, added, reset), options.axis)
    factors = jnp.exp(total)[..., None]
    if reset is not None:
        factors = jnp.where(reset[..., None, None, None], 0, factors)
    starts, end = chain(factors, added, arrays["initial_state"].astype(added.dtype))
    return starts[jax.lax.axis_index(options.axis)], end, factors


def _end(arrays, mask, logs, reset):
    """The state [B, H, K, V] at the piece's end from zero at its start."""
    later = jax.lax.cumsum(logs, axis=1, reverse=True)
    later = jnp.concatenate([later[:, 1:], jnp.zeros_like(later[:, :1])], axis=1)
    v = zero_padding(arrays["v"], mask)
    if reset is not None:
        document = jnp.cumsum(reset, axis=1)
        v = jnp.where((document == document[:, -1:])[..., None, None], v, 0)
    return _sum_of_outer_products(zero_padding(arrays["k"], mask), later, v)


def _start_gradient(options, arrays, documents, dy):
    """What the outputs' gradient dy [B, T, H, V] sends to the state at the piece's start: [B, H, K, V]."""
    mask, reset = documents["mask"], resets(**documents)
    elapsed = jnp.cumsum(_log_decays(arrays, mask), axis=1)
    if options.read == "exclusive":
        elapsed = jnp.concatenate([jnp.zeros_like(elapsed[:, :1]), elapsed[:, :-1]], axis=1)
    dy = zero_padding(dy, mask)
    if reset is not None:
        dy = jnp.where(jnp.cumsum(reset, axis=1)[..., None, None] > 0, 0, dy)
    return options.scale * _sum_of_outer_products(zero_padding(arrays["q"], mask), elapsed, dy)


def _sum_of_outer_products(keys, logs, values):
    """sum_t exp(logs_t) keys_t values_t^T [B, H, K, V] of keys [B, T, Hk, K], logs [B, T, H, K or 1], values."""
    factors = xla.factors_dtype(keys, values)
    keys = jnp.repeat(keys, values.shape[2] // keys.shape[2], axis=2) * jnp.exp(logs)
    return xla.product(factors, "bthk,bthv->bhkv", keys, values)


def _log_decays(arrays, mask):
    """[B, T, H, K or 1] in the accumulators' dtype, zero on padding."""
    q, k, v, logs = (arrays[name] for name in ("q", "k", "v", "log_decay"))
    accumulator = jnp.result_type(q, k, v, jnp.float32)
    logs = jnp.zeros(v.shape[2], accumulator) if logs is None else logs.astype(accumulator)
    logs = logs if logs.ndim == 4 else jnp.broadcast_to(logs, v.shape[:3])[..., None]
    return zero_padding(logs, mask)
