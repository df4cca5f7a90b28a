"""Linear attention with time split over devices, for use inside `jax.shard_map`.

A piece of time maps the state S at its start to the state a S + E at its end. Here a is the product of the piece's
decays, or zero if the piece contains a reset. E is the state at the end if the start is zero. It needs no recurrence:

    E = sum_t exp(log_decay_(t+1) + .. + log_decay_T) k_t v_t^T          over the tokens after its last reset.

In the forward pass each device

1. computes (a, E) of its piece;
2. gathers (a, E) of all pieces and applies these maps in order, which gives the state at its own start and at the end
   of the whole sequence;
3. runs linear attention over its piece from the state at its start.

In the backward pass the maps are applied in reverse order. The outputs of a piece contribute to the gradient of the
state at its start

    scale sum_t exp(log_decay_1 + .. + log_decay_t) q_t dy_t^T           over the tokens before its first reset.

(In an exclusive read, token t's own decay is left out.) From these terms follows the gradient of the state at each
piece's end. The ordinary backward pass over the piece then gives all other gradients.

Cost on each of S devices, beyond its share of the work: two such sums of products, and a gather of S states
[B, H, K, V] in each direction. Activations never leave their device.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from seqmodels.kernels import linear_attention as op
from seqmodels.kernels.arrays import zero_padding
from seqmodels.kernels.finite import finite_decay
from seqmodels.kernels.linear_attention import xla
from seqmodels.kernels.pieces import chain
from seqmodels.kernels.segments import forget, resets, segment_before


class Options(NamedTuple):
    """Static options: the mesh axis that time is split over, and the options of the operation."""

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
    """As `kernels.linear_attention.linear_attention` of the whole time.

    Args:
        axis: mesh axis (or axes) that time is split over. Pieces follow the order of the axis and have equal lengths.
        arrays with a time axis: this device's piece.
        initial_state, initial_segment: state and segment before the first piece, the same on every device.
        implementation: implementation of the operation on each piece.

    Returns:
        y of this device's piece, and the state after the last piece, the same on every device. The enclosing shard_map
        needs check_vma=False. It sums the gradients of arguments that are the same on every device.
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
    start, end, *_ = _chained(options, arrays, documents)
    return _piece(options, documents, arrays | dict(initial_state=start))[0], end


def _attend_fwd(options, arrays, documents):
    # a checkpoint policy that saves "scan" in the backends also saves these, so they are not recomputed
    *chained, fresh = _chained(options, arrays, documents)
    start, end, factors = (checkpoint_name(x, "scan") for x in chained)
    run = functools.partial(_piece, options, documents)
    (y, _), transpose = jax.vjp(run, arrays | dict(initial_state=start))
    return (y, end), (arrays, documents, factors, fresh, transpose)


def _attend_bwd(options, residuals, cotangents):
    arrays, documents, factors, fresh, transpose = residuals
    dy, dend = cotangents
    dend = jax.lax.psum(dend, options.axis)  # every device holds a copy of the end; their gradients add up
    dstart = jax.lax.all_gather(_start_gradient(options, arrays, documents, dy), options.axis)
    dends, _ = chain(factors, dstart, dend, fresh, reverse=True)
    index = jax.lax.axis_index(options.axis)
    (gradients,) = transpose((dy, dends[index]))
    gradients["initial_state"] = jnp.where(index == 0, gradients["initial_state"], 0)
    return gradients, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _piece(options, documents, arrays):
    """The operation on this device's piece alone."""
    static = dict(scale=options.scale, read=options.read, chunk=options.chunk, dtype=options.dtype)
    return op.readouts(**arrays, **documents, **static, implementation=options.implementation)


def _chained(options, arrays, documents):
    """The state at this piece's start, the state after the last piece, and for all pieces factors and resets.

    Factors are [S, B, H, K or 1, 1]; resets [S, B], or None if there are no segments.
    """
    logs, reset = _log_decays(arrays, documents["mask"]), resets(**documents)
    total, added = jnp.sum(logs, axis=1), _end(arrays, documents["mask"], logs, reset)
    reset = None if reset is None else jnp.any(reset, axis=1)
    total, added, reset = jax.lax.all_gather((total, added, reset), options.axis)
    factors = forget(jnp.exp(total)[..., None], reset)
    starts, end = chain(factors, added, arrays["initial_state"].astype(added.dtype), reset)
    return starts[jax.lax.axis_index(options.axis)], end, factors, reset


def _end(arrays, mask, logs, reset):
    """The state [B, H, K, V] at the piece's end if it is zero at the piece's start."""
    later = jax.lax.cumsum(logs, axis=1, reverse=True)
    later = jnp.concatenate([later[:, 1:], jnp.zeros_like(later[:, :1])], axis=1)
    document = None if reset is None else jnp.cumsum(reset, axis=1)
    dropped = None if document is None else document != document[:, -1:]
    return _sum_of_outer_products(zero_padding(arrays["k"], mask), later, zero_padding(arrays["v"], mask), dropped)


def _start_gradient(options, arrays, documents, dy):
    """Gradient of the state at the piece's start through the piece's outputs: [B, H, K, V], from dy [B, T, H, V]."""
    mask, reset = documents["mask"], resets(**documents)
    elapsed = jnp.cumsum(_log_decays(arrays, mask), axis=1)
    if options.read == "exclusive":
        elapsed = jnp.concatenate([jnp.zeros_like(elapsed[:, :1]), elapsed[:, :-1]], axis=1)
    dropped = None if reset is None else jnp.cumsum(reset, axis=1) > 0
    return options.scale * _sum_of_outer_products(
        zero_padding(arrays["q"], mask), elapsed, zero_padding(dy, mask), dropped
    )


def _sum_of_outer_products(keys, logs, values, dropped):
    """sum_t exp(logs_t) keys_t values_t^T [B, H, K, V] from keys [B, T, Hk, K], logs [B, T, H, K or 1] and values.

    Tokens where `dropped` [B, T] is True are left out, whatever they hold.
    """
    factors = xla.factors_dtype(keys, values)
    keys = jnp.repeat(keys, values.shape[2] // keys.shape[2], axis=2) * jnp.exp(logs)
    return xla.product(factors, "bthk,bthv->bhkv", forget(keys, dropped), forget(values, dropped))


def _log_decays(arrays, mask):
    """[B, T, H, K or 1] in the accumulators' dtype, zero on padding."""
    q, k, v, logs = (arrays[name] for name in ("q", "k", "v", "log_decay"))
    accumulator = jnp.result_type(q, k, v, jnp.float32)
    logs = jnp.zeros(v.shape[2], accumulator) if logs is None else finite_decay(logs.astype(accumulator))
    logs = logs if logs.ndim == 4 else jnp.broadcast_to(logs, v.shape[:3])[..., None]
    return zero_padding(logs, mask)
