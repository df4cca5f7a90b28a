"""The selective scan with time split over devices, for use inside `jax.shard_map`.

A piece of time maps the state at its start to that at its end by s -> exp(A tau) s + e: tau is the sum of its steps, e
its end from a zero start, and a reset inside makes the factor zero. So each device

1. scans its piece from zero, which gives e, and sums its steps;
2. gathers (tau, e) of all pieces and chains them, which gives the state at its own start and at the very end;
3. scans its piece again from there.

Backwards the pieces are chained the other way round. The gradient that a piece's own outputs send to its start,

    sum_t exp(A (dt_1 + .. + dt_t)) C_t dy_t          over the tokens before its first reset,

needs no recurrence; chained, it gives the gradient at each piece's end, and one backward scan the rest.

Cost on each of S devices, beyond its share of the work: one more forward scan (without skip and gate); in the backward
pass one more reduction over [B, T, E, N], at one exponential an element; and gathers of S states [B, E, N] each way.
Activations never leave their device.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from seqmodels.kernels import selective_scan as op
from seqmodels.kernels.arrays import expand_to, zero_padding
from seqmodels.kernels.pieces import chain
from seqmodels.kernels.segments import resets, segment_before


class Options(NamedTuple):
    """What is static: the mesh axis that time is split over, and two options of the scan."""

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
    """As `kernels.selective_scan.selective_scan` of the whole; arrays with a time axis hold this device's piece of it.

    Args:
        axis: mesh axis (or axes) that time is split over, pieces in the order of the axis, all of one length.
        initial_state, initial_segment: what comes before the first piece, the same on every device.
        implementation: of the scan of each piece.
        **optional: D, z, dt_bias, weights.

    Returns:
        y of this device's piece, and the state after the last piece, the same on every device. The enclosing shard_map
        needs check_vma=False; it sums the gradients of what is the same on every device.
    """
    if initial_state is None:
        initial_state = jnp.zeros((u.shape[0], *A.shape), jnp.promote_types(jnp.float32, u.dtype))
    if segment_ids is not None:
        initial_segment = segment_before(segment_ids, initial_segment, mask, axis)
    arrays = dict(u=u, dt=dt, A=A, B=B, C=C, initial_state=initial_state, **optional)
    documents = dict(segment_ids=segment_ids, initial_segment=initial_segment, mask=mask)
    return _scan(Options(axis, dt_softplus, implementation), arrays, documents)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(options, arrays, documents):
    start, end, _ = _chained(options, arrays, documents)
    return _piece(options, documents, arrays | dict(initial_state=start))[0], end


def _scan_fwd(options, arrays, documents):
    # a policy that keeps the backends' "scan" spares the pass that leads to these, too
    start, end, factors = (checkpoint_name(x, "scan") for x in _chained(options, arrays, documents))
    run = functools.partial(_piece, options, documents)
    (y, _), transpose = jax.vjp(run, arrays | dict(initial_state=start))
    return (y, end), (arrays, documents, factors, transpose)


def _scan_bwd(options, residuals, cotangents):
    arrays, documents, factors, transpose = residuals
    dy, dend = cotangents
    dend = jax.lax.psum(dend, options.axis)  # the end is one value, of which every device holds a copy
    dstart = jax.lax.all_gather(_start_gradient(options, arrays, documents, dy), options.axis)
    dends, _ = chain(factors, dstart, dend, reverse=True)
    index = jax.lax.axis_index(options.axis)
    (gradients,) = transpose((dy, dends[index]))
    gradients["initial_state"] = jnp.where(index == 0, gradients["initial_state"], 0)
    return gradients, None


_scan.defvjp(_scan_fwd, _scan_bwd)


def _piece(options, documents, arrays):
    """The scan of this device's piece by itself."""
    return op.selective_scan(
        **arrays, **documents, dt_softplus=options.dt_softplus, implementation=options.implementation
    )


def _chained(options, arrays, documents):
    """The state at this piece's start, that at the very end, and every piece's factor [S, B, (G,) E, N]."""
    fresh = dict(initial_state=jnp.zeros_like(arrays["initial_state"]), D=None, z=None, weights=None)
    _, local = _piece(options, documents, arrays | fresh)
    total = jnp.sum(_steps(options, arrays, documents), axis=1)
    reset = resets(**documents)
    reset = None if reset is None else jnp.any(reset, axis=1)
    total, local, reset = jax.lax.all_gather((total, local, reset), options.axis)
    factors = jnp.exp(total[..., None] * arrays["A"].astype(total.dtype))
    if reset is not None:
        factors = jnp.where(expand_to(reset, factors.ndim), 0, factors)
    starts, end = chain(factors, local, arrays["initial_state"].astype(local.dtype))
    return starts[jax.lax.axis_index(options.axis)], end, factors


def _steps(options, arrays, documents):
    """dt [B, T, (G,) E] float32 after bias and softplus, zero on padding."""
    dt = arrays["dt"].astype(jnp.promote_types(jnp.float32, arrays["u"].dtype))
    if arrays.get("dt_bias") is not None:
        dt = dt + arrays["dt_bias"]
    dt = jax.nn.softplus(dt) if options.dt_softplus else dt
    return zero_padding(dt, documents["mask"])


def _start_gradient(options, arrays, documents, dy):
    """What the outputs' gradient dy [B, T, E] sends to the state at the piece's start: [B, (G,) E, N]."""
    elapsed = jnp.cumsum(_steps(options, arrays, documents), axis=1)
    dtype, mask = elapsed.dtype, documents["mask"]
    C = zero_padding(arrays["C"], mask).astype(dtype)
    dy = zero_padding(dy, mask).astype(dtype)
    if arrays.get("z") is not None:
        dy = dy * jax.nn.silu(zero_padding(arrays["z"], mask).astype(dtype))
    reset = resets(**documents)
    if reset is not None:
        dy = jnp.where(jnp.cumsum(reset, axis=1)[..., None] > 0, 0, dy)
    if elapsed.ndim == 4:  # the readout of each group
        dy = jnp.broadcast_to(dy[:, :, None], elapsed.shape)
        if arrays.get("weights") is not None:
            dy = jnp.concatenate([dy[:, :, :1], arrays["weights"].astype(dtype) * dy[:, :, 1:]], axis=2)
    # a reduction that XLA fuses, so that nothing of this size is ever in memory
    decay = jnp.exp(elapsed[..., None] * arrays["A"].astype(dtype))
    return jnp.sum(decay * dy[..., None] * C[..., None, :], axis=1)
