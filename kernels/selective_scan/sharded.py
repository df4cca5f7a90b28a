"""The selective scan with time split over devices, for use inside `jax.shard_map`.

A piece of time maps the state s at its start to the state exp(A tau) s + e at its end. Here tau is the sum of the
piece's steps, and e is the state at the end if the start is zero. If the piece contains a reset, the factor is zero. So
in the forward pass each device

1. scans its piece from zero, which gives e, and sums its steps;
2. gathers (tau, e) of all pieces and applies these maps in order, which gives the state at its own start and at the end
   of the whole sequence;
3. scans its piece again from the state at its start.

In the backward pass the maps are applied in reverse order. The outputs of a piece contribute to the gradient of the
state at its start

    sum_t exp(A (dt_1 + .. + dt_t)) C_t dy_t          over the tokens before its first reset,

which needs no recurrence. From these terms follows the gradient of the state at each piece's end. One backward scan of
the piece then gives all other gradients.

Cost on each of S devices, beyond its share of the work: one more forward scan (without skip and gate); in the backward
pass one more reduction over [B, T, E, N], with one exponential per element; and a gather of S states [B, E, N] in each
direction. Activations never leave their device.

The kernels for Hopper GPUs chain the states of devices themselves. They scan a long row in pieces on one device, too,
and have summaries of the pieces, e and tau, in both directions. So there the backward pass of a piece costs nothing
more than on one device, and the forward pass a summary, unless one device would take it, too.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from seqmodels.kernels import selective_scan as op
from seqmodels.kernels.arrays import zero_padding
from seqmodels.kernels.dispatch import platforms
from seqmodels.kernels.finite import finite_decay
from seqmodels.kernels.pieces import chain
from seqmodels.kernels.segments import forget, resets, segment_before
from seqmodels.kernels.tuning import UNROLLED


class Options(NamedTuple):
    """Static options: the mesh axis that time is split over, and two options of the scan."""

    axis: str | tuple[str, ...]
    dt_softplus: bool
    implementation: str | None


def selective_scan(
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    *,
    axis: str | tuple[str, ...],
    dt_softplus: bool = True,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    initial_segment: jax.Array | None = None,
    mask: jax.Array | None = None,
    implementation: str | None = None,
    **optional: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """As `kernels.selective_scan.selective_scan` of the whole time.

    Args:
        axis: mesh axis (or axes) that time is split over. Pieces follow the order of the axis and have equal lengths.
        arrays with a time axis: this device's piece.
        initial_state, initial_segment: state and segment before the first piece, the same on every device.
        implementation: implementation of the scan of each piece.
        **optional: D, z, dt_bias, weights.

    Returns:
        y of this device's piece, and the state after the last piece, the same on every device. The enclosing shard_map
        needs check_vma=False. It sums the gradients of arguments that are the same on every device.
    """
    if initial_state is None:
        initial_state = jnp.zeros((u.shape[0], *A.shape), jnp.promote_types(jnp.float32, u.dtype))
    if segment_ids is not None:
        initial_segment = segment_before(segment_ids, initial_segment, mask, axis)
    if _chains_devices(implementation, u, A):
        given: dict[str, Any] = dict(
            initial_state=initial_state, initial_segment=initial_segment, mask=mask, **optional
        )
        given |= dict(segment_ids=segment_ids, dt_softplus=dt_softplus, implementation=implementation, axis=axis)
        return op.selective_scan(u, dt, A, B, C, **given)
    arrays = dict(u=u, dt=dt, A=finite_decay(A), B=B, C=C, initial_state=initial_state, **optional)
    documents = dict(segment_ids=segment_ids, initial_segment=initial_segment, mask=mask)
    return _scan(Options(axis, dt_softplus, implementation), arrays, documents)


def _chains_devices(implementation: str | None, u: jax.Array, A: jax.Array) -> bool:
    """Whether the backend that the operation will choose takes an axis; it does not for a few tokens."""
    shape = (*u.shape[:2], 1, u.shape[-1], A.shape[-1]) if u.ndim == 3 else (*u.shape, A.shape[-1])
    chosen = {op.choose(platform, shape, dtype=u.dtype)[0] for platform in platforms()}
    return shape[1] > UNROLLED and ({implementation} if implementation else chosen) == {"mosaic_gpu"}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(options, arrays, documents):
    start, end, *_ = _chained(options, arrays, documents)
    return _piece(options, documents, arrays | dict(initial_state=start))[0], end


def _scan_fwd(options, arrays, documents):
    # a checkpoint policy that saves "scan" in the backends also saves these, so they are not recomputed
    *chained, fresh = _chained(options, arrays, documents)
    start, end, factors = (checkpoint_name(x, "scan") for x in chained)
    run = functools.partial(_piece, options, documents)
    (y, _), transpose = jax.vjp(run, arrays | dict(initial_state=start))
    return (y, end), (arrays, documents, factors, fresh, transpose)


def _scan_bwd(options, residuals, cotangents):
    arrays, documents, factors, fresh, transpose = residuals
    dy, dend = cotangents
    dend = jax.lax.psum(dend, options.axis)  # every device holds a copy of the end; their gradients add up
    dstart = jax.lax.all_gather(_start_gradient(options, arrays, documents, dy), options.axis)
    dends, _ = chain(factors, dstart, dend, fresh, reverse=True)
    index = jax.lax.axis_index(options.axis)
    (gradients,) = transpose((dy, dends[index]))
    gradients["initial_state"] = jnp.where(index == 0, gradients["initial_state"], 0)
    return gradients, None


_scan.defvjp(_scan_fwd, _scan_bwd)


def _piece(options, documents, arrays):
    """The scan of this device's piece alone."""
    return op.selective_scan(
        **arrays, **documents, dt_softplus=options.dt_softplus, implementation=options.implementation
    )


def _chained(options, arrays, documents):
    """The state at this piece's start, the state after the last piece, and for all pieces factors and resets.

    Factors are [S, B, (G,) E, N]; resets [S, B], or None if there are no segments.
    """
    fresh = dict(initial_state=jnp.zeros_like(arrays["initial_state"]), D=None, z=None, weights=None)
    _, local = _piece(options, documents, arrays | fresh)
    total = jnp.sum(_steps(options, arrays, documents), axis=1)
    reset = resets(**documents)
    reset = None if reset is None else jnp.any(reset, axis=1)
    total, local, reset = jax.lax.all_gather((total, local, reset), options.axis)
    factors = jnp.exp(total[..., None] * arrays["A"].astype(total.dtype))
    factors = forget(factors, reset)
    starts, end = chain(factors, local, arrays["initial_state"].astype(local.dtype), reset)
    return starts[jax.lax.axis_index(options.axis)], end, factors, reset


def _steps(options, arrays, documents):
    """dt [B, T, (G,) E] float32 after bias and softplus, zero on padding."""
    dt = arrays["dt"].astype(jnp.promote_types(jnp.float32, arrays["u"].dtype))
    if arrays.get("dt_bias") is not None:
        dt = dt + arrays["dt_bias"]
    dt = jax.nn.softplus(dt) if options.dt_softplus else dt
    return zero_padding(dt, documents["mask"])


def _start_gradient(options, arrays, documents, dy):
    """Gradient of the state at the piece's start through the piece's outputs: [B, (G,) E, N], from dy [B, T, E]."""
    steps, mask, reset = _steps(options, arrays, documents), documents["mask"], resets(**documents)
    C, dtype = zero_padding(arrays["C"], mask).astype(steps.dtype), steps.dtype
    later = None if reset is None else jnp.cumsum(reset, axis=1) > 0  # tokens of the documents that begin here
    elapsed, C = jnp.cumsum(forget(steps, later), axis=1), forget(C, later)
    dy = zero_padding(dy, mask).astype(dtype)
    if arrays.get("z") is not None:
        dy = dy * jax.nn.silu(zero_padding(arrays["z"], mask).astype(dtype))
    if elapsed.ndim == 4:  # the readout of each group
        dy = jnp.broadcast_to(dy[:, :, None], elapsed.shape)
        if arrays.get("weights") is not None:
            weights = zero_padding(arrays["weights"], mask).astype(dtype)
            dy = jnp.concatenate([dy[:, :, :1], weights * dy[:, :, 1:]], axis=2)
    dy = forget(dy, later)
    # XLA fuses this reduction, so no array of this size is stored in memory
    decay = jnp.exp(elapsed[..., None] * arrays["A"].astype(dtype))
    return jnp.sum(decay * dy[..., None] * C[..., None, :], axis=1)
