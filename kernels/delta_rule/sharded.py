"""The delta rule with time split over devices, for use inside `jax.shard_map`.

A piece of time maps the state S at its start to the state M S + E at its end. Here M [K, K] is the product of the
piece's matrices diag(w_t) - a_t b_t^T, or zero if the piece contains a reset. E is the state at the end if the start is
zero. One call of the operation gives both: with the initial state [0, 1] and with zeros appended to the values, the
final state is [E, M].

In the forward pass each device

1. computes (M, E) of its piece;
2. gathers (M, E) of all pieces and applies these maps in order, which gives the state at its own start and at the end
   of the whole sequence;
3. runs the operation over its piece from the state at its start.

In the backward pass the transposed maps are applied in reverse order. What the outputs of a piece contribute to the
gradient of the state at its start comes from one backward pass over the piece. From these terms follows the gradient of
the state at each piece's end. A second backward pass then gives all gradients.

Cost on each of S devices, beyond its share of the work: the forward pass once more, with K more channels of values; the
backward pass once more; and a gather of S states [B, H, K, V] in each direction, of S matrices [B, H, K, K] in the
forward pass. Activations never leave their device.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from seqmodels.kernels import delta_rule as op
from seqmodels.kernels.segments import forget, resets, segment_before


class Options(NamedTuple):
    """Static options: the mesh axis that time is split over, and the options of the operation."""

    axis: str | tuple[str, ...]
    scale: float
    read: str
    chunk: int | None
    implementation: str | None


def delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    a: jax.Array | None,
    b: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    axis: str | tuple[str, ...],
    scale: float = 1.0,
    read: str = "inclusive",
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    initial_segment: jax.Array | None = None,
    mask: jax.Array | None = None,
    chunk: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As `kernels.delta_rule.delta_rule` of the whole time.

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
    op.check(q, k, v, a, b, log_decay, read, initial_state, **documents, chunk=chunk)
    if segment_ids is not None:
        documents["initial_segment"] = segment_before(segment_ids, initial_segment, mask, axis)
    if initial_state is None:
        accumulator = jnp.result_type(*(x for x in (q, k, v, a, b) if x is not None), jnp.float32)
        initial_state = jnp.zeros((*v.shape[:1], v.shape[2], q.shape[3], v.shape[3]), accumulator)
    options = Options(axis, scale, read, chunk, implementation)
    arrays = dict(q=q, k=k, v=v, a=a, b=b, log_decay=log_decay, initial_state=initial_state)
    return _correct(options, arrays, documents)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _correct(options: Options, arrays: dict[str, Any], documents: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    start, end, *_ = _chained(options, arrays, documents)
    return _piece(options, documents, arrays | dict(initial_state=start))[0], end


def _correct_fwd(options, arrays, documents):
    # a checkpoint policy that saves "scan" in the backends also saves these, so they are not recomputed
    *chained, fresh = _chained(options, arrays, documents)
    start, end, products = (checkpoint_name(x, "scan") for x in chained)
    (y, _), transpose = jax.vjp(functools.partial(_piece, options, documents), arrays | dict(initial_state=start))
    return (y, end), (products, fresh, transpose)


def _correct_bwd(options, residuals, cotangents):
    products, fresh, transpose = residuals
    dy, dend = cotangents
    dend = jax.lax.psum(dend, options.axis)  # every device holds a copy of the end; their gradients add up
    (own,) = transpose((dy, jnp.zeros_like(dend)))
    dstart = jax.lax.all_gather(own["initial_state"], options.axis)
    dends, _ = _chain(jnp.swapaxes(products, -1, -2), dstart, dend, fresh, reverse=True)
    index = jax.lax.axis_index(options.axis)
    (gradients,) = transpose((dy, dends[index]))
    gradients["initial_state"] = jnp.where(index == 0, gradients["initial_state"], 0)
    return gradients, None


_correct.defvjp(_correct_fwd, _correct_bwd)


def _piece(options: Options, documents: dict[str, Any], arrays: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """The operation on this device's piece alone."""
    static: dict[str, Any] = dict(scale=options.scale, read=options.read, chunk=options.chunk)
    return op.delta_rule(**arrays, **documents, **static, implementation=options.implementation)


def _chained(options, arrays, documents):
    """The state at this piece's start, the state after the last piece, and of all pieces the products and resets.

    Products are [S, B, H, K, K]; resets [S, B], or None if there are no segments.
    """
    v, state, reset = arrays["v"], arrays["initial_state"], resets(**documents)
    identity = jnp.broadcast_to(jnp.eye(state.shape[2], dtype=state.dtype), (*state.shape[:3], state.shape[2]))
    wide = dict(
        v=jnp.concatenate([v, jnp.zeros((*v.shape[:3], state.shape[2]), v.dtype)], axis=-1),
        initial_state=jnp.concatenate([jnp.zeros_like(state), identity], axis=-1),
    )
    _, last = _piece(options, documents, arrays | wide)
    added, product = last[..., : v.shape[3]], last[..., v.shape[3] :]
    reset = None if reset is None else jnp.any(reset, axis=1)
    # a piece with a reset drops the state, whatever numbers of the documents before are in its product
    product, added, reset = jax.lax.all_gather((forget(product, reset), added, reset), options.axis)
    starts, end = _chain(product, added, state.astype(added.dtype), reset)
    return starts[jax.lax.axis_index(options.axis)], end, product, reset


def _chain(
    products: jax.Array, added: jax.Array, state: jax.Array, fresh: jax.Array | None, reverse: bool = False
) -> tuple[jax.Array, jax.Array]:
    """As `kernels.pieces.chain`, with matrices [S, B, H, K, K] in place of factors."""

    def step(state, piece):
        product, added, fresh = piece
        moved = jnp.einsum("bhij,bhjv->bhiv", product, forget(state, fresh), precision="highest")
        return moved + added, state

    last, before = jax.lax.scan(step, state, (products, added, fresh), reverse=reverse)
    return before, last
