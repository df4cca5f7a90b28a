"""The linear scan with time split over devices, for use inside `jax.shard_map`.

A piece of time maps the state at its start to factor * state + added. Here factor is exp of the sum of the piece's log
decays, or zero if the piece contains a reset, and added is the state at the end if the start is zero. So in the forward
pass each device

1. scans its piece from zero, which gives `added`, and sums its log decays;
2. gathers both of all pieces and applies these maps in order, which gives the state at its own start and at the end of
   the whole sequence;
3. scans its piece again from the state at its start.

In the backward pass the maps are applied in reverse order. The outputs of a piece contribute to the gradient of the
state at its start

    sum_t exp(log_decay_1 + .. + log_decay_t) dh_t          over the tokens before its first reset,

which needs no recurrence. From these terms follows the gradient of the state at each piece's end. One backward scan of
the piece then gives all other gradients.

Cost on each of S devices, beyond its share of the work: one more forward scan; in the backward pass one more sum over
time; and a gather of S states [B, D] in each direction. Activations never leave their device. With `reverse` the start
of a piece is its last token, and pieces follow one another from the last device to the first.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from seqmodels.kernels import linear_scan as op
from seqmodels.kernels.arrays import zero_padding
from seqmodels.kernels.pieces import chain
from seqmodels.kernels.segments import forget, resets, resets_in_reverse, segment_before


class Options(NamedTuple):
    """Static options: the mesh axis that time is split over, and the options of the operation."""

    axis: str | tuple[str, ...]
    reverse: bool
    implementation: str | None


def linear_scan(
    log_decay: jax.Array,
    x: jax.Array,
    *,
    axis: str | tuple[str, ...],
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    initial_segment: jax.Array | None = None,
    mask: jax.Array | None = None,
    reverse: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As `kernels.linear_scan.linear_scan` of the whole time.

    Args:
        axis: mesh axis (or axes) that time is split over. Pieces follow the order of the axis and have equal lengths.
        arrays with a time axis: this device's piece.
        initial_state, initial_segment: state and segment before the first piece (in reverse, after the last one), the
            same on every device.
        implementation: implementation of the scan of each piece.

    Returns:
        h of this device's piece, and the state after the last piece, the same on every device. The enclosing shard_map
        needs check_vma=False. It sums the gradients of arguments that are the same on every device.
    """
    documents = dict(segment_ids=segment_ids, initial_segment=initial_segment, mask=mask)
    op.check(log_decay, x, initial_state, **documents)
    if segment_ids is not None:
        documents["initial_segment"] = segment_before(segment_ids, initial_segment, mask, axis, reverse)
    accumulator = jnp.result_type(log_decay, x, jnp.float32)
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], *x.shape[2:]), accumulator)
    arrays = dict(log_decay=log_decay, x=x, initial_state=initial_state.astype(accumulator))
    return _scan(Options(axis, reverse, implementation), arrays, documents)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(options: Options, arrays: dict[str, Any], documents: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    start, end, *_ = _chained(options, arrays, documents)
    return _piece(options, documents, arrays | dict(initial_state=start))[0], end


def _scan_fwd(options, arrays, documents):
    # a checkpoint policy that saves "scan" in the backends also saves these, so they are not recomputed
    *chained, fresh = _chained(options, arrays, documents)
    start, end, factors = (checkpoint_name(x, "scan") for x in chained)
    run = functools.partial(_piece, options, documents)
    (h, _), transpose = jax.vjp(run, arrays | dict(initial_state=start))
    return (h, end), (arrays, documents, factors, fresh, transpose)


def _scan_bwd(options, residuals, cotangents):
    arrays, documents, factors, fresh, transpose = residuals
    dh, dend = cotangents
    dend = _total(dend, options.axis)  # every device holds a copy of the end; their gradients add up
    dstart = jax.lax.all_gather(_start_gradient(options, arrays, documents, dh), options.axis)
    dends, _ = chain(factors, dstart, dend, fresh, reverse=not options.reverse)
    index = jax.lax.axis_index(options.axis)
    (gradients,) = transpose((dh, dends[index]))
    first = len(factors) - 1 if options.reverse else 0
    gradients["initial_state"] = jnp.where(index == first, gradients["initial_state"], 0)
    return gradients, None


_scan.defvjp(_scan_fwd, _scan_bwd)


def _total(x: jax.Array, axis: str | tuple[str, ...]) -> jax.Array:
    """The sum over devices. Of complex constants, such as zeros, XLA's (jax 0.10, 0.11) ends the process on a CPU."""
    if not jnp.iscomplexobj(x):
        return jax.lax.psum(x, axis)
    return jax.lax.complex(*jax.lax.psum((x.real, x.imag), axis))


def _piece(options: Options, documents: dict[str, Any], arrays: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """The scan of this device's piece alone."""
    return op.linear_scan(**arrays, **documents, reverse=options.reverse, implementation=options.implementation)


def _chained(options, arrays, documents):
    """The state at this piece's start, the state after the last piece, and for all pieces factors and resets.

    Factors are [S, B, .., D]; resets [S, B], or None if there are no segments.
    """
    state = arrays["initial_state"]
    _, added = _piece(options, documents, arrays | dict(initial_state=jnp.zeros_like(state)))
    total = jnp.sum(_log_decays(arrays, documents), axis=1)
    reset = _resets(options, documents)
    reset = None if reset is None else jnp.any(reset, axis=1)
    total, added, reset = jax.lax.all_gather((total, added, reset), options.axis)
    factors = forget(jnp.exp(total), reset)
    starts, end = chain(factors, added, state, reset, options.reverse)
    return starts[jax.lax.axis_index(options.axis)], end, factors, reset


def _resets(options: Options, documents: dict[str, Any]) -> jax.Array | None:
    """[B, T] bool, where documents begin in the direction of time."""
    return (resets_in_reverse if options.reverse else resets)(**documents)


def _log_decays(arrays, documents):
    """[B, T, .., D] in the accumulators' dtype, zero on padding."""
    return zero_padding(arrays["log_decay"], documents["mask"]).astype(arrays["initial_state"].dtype)


def _start_gradient(options, arrays, documents, dh):
    """Gradient of the state at the piece's start through the piece's outputs: [B, .., D], from dh [B, T, .., D]."""
    logs, reset = _log_decays(arrays, documents), _resets(options, documents)
    later = None if reset is None else jax.lax.cumsum(reset.astype(int), axis=1, reverse=options.reverse) > 0
    elapsed = jax.lax.cumsum(forget(logs, later), axis=1, reverse=options.reverse)
    dh = forget(zero_padding(dh, documents["mask"]).astype(logs.dtype), later)
    return jnp.sum(jnp.exp(elapsed) * dh, axis=1)
