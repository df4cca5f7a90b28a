"""One vector of many: hidden states are pooled over the real positions of a row or document, whole or piece by piece.

A pool is a state, float32, of constant size: `start`, then `extend` by each piece, then `finish`. The pool of a whole
row is one piece. So a recording that is read in pieces has the pool of the whole.

A pool never multiplies by the mask: what is not real may hold anything, NaN too, and has no gradient.
"""

import jax
import jax.numpy as jnp

from seqmodels.kernels.segments import resets

State = dict[str, jax.Array]

POOLS = ("mean", "last", "max", "attention")
LOWEST = float(jnp.finfo(jnp.float32).min)


def start(pool: str, batch: int, width: int) -> State:
    """The pool of nothing. Shapes [B, D] and [B].

    Its leaves by pool, where `count` is the number of positions: mean: sum, count; last: value, count; max: value,
    count; attention: sum (of hidden states by weight), weight, peak (of the scores).
    """
    vectors, numbers = jnp.zeros((batch, width), jnp.float32), jnp.zeros((batch,), jnp.float32)
    match pool:
        case "mean":
            return {"sum": vectors, "count": numbers}
        case "last":
            return {"value": vectors, "count": numbers}
        case "max":
            return {"value": vectors + LOWEST, "count": numbers}
    return {"sum": vectors, "weight": numbers, "peak": numbers + LOWEST}


def extend(pool: str, state: State, hidden: jax.Array, mask: jax.Array, query: jax.Array | None = None) -> State:
    """The pool with the real positions of a piece.

    Args:
        hidden: [B, T, D]. mask: [B, T] bool.
        query: [D], of attention alone.
    """
    hidden = jnp.where(mask[..., None], hidden.astype(jnp.float32), 0.0)
    count = mask.sum(axis=1, dtype=jnp.float32)
    match pool:
        case "mean":
            return {"sum": state["sum"] + hidden.sum(axis=1), "count": state["count"] + count}
        case "last":
            place = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
            last = jnp.take_along_axis(hidden, place[:, None, None], axis=1)[:, 0]
            value = jnp.where(count[:, None] > 0, last, state["value"])
            return {"value": value, "count": state["count"] + count}
        case "max":
            largest = jnp.where(mask[..., None], hidden, LOWEST).max(axis=1)
            return {"value": jnp.maximum(state["value"], largest), "count": state["count"] + count}
    assert query is not None
    scores = jnp.where(mask, hidden @ query / query.shape[0] ** 0.5, LOWEST)
    peak = jnp.maximum(state["peak"], jax.lax.stop_gradient(scores.max(axis=1)))
    weights = jnp.where(mask, jnp.exp(scores - peak[:, None]), 0.0)
    kept = jnp.exp(state["peak"] - peak)
    total = state["sum"] * kept[:, None] + jnp.einsum("bt,btd->bd", weights, hidden)
    return {"sum": total, "weight": state["weight"] * kept + weights.sum(axis=1), "peak": peak}


def finish(pool: str, state: State) -> jax.Array:
    """[B, D] float32; zeros where there was no real position.

    attention: the mean weighted by softmax(hidden query / D^1/2).
    """
    match pool:
        case "mean":
            return state["sum"] / jnp.maximum(state["count"], 1)[:, None]
        case "last" | "max":
            return jnp.where(state["count"][:, None] > 0, state["value"], 0.0)
    weight = state["weight"][:, None]
    return jnp.where(weight > 0, state["sum"] / jnp.where(weight > 0, weight, 1.0), 0.0)


def whole(pool: str, hidden: jax.Array, mask: jax.Array, query: jax.Array | None = None) -> jax.Array:
    """[B, T, D] and mask [B, T] to [B, D] float32."""
    batch, _, width = hidden.shape
    return finish(pool, extend(pool, start(pool, batch, width), hidden, mask, query))


def by_document(
    pool: str,
    hidden: jax.Array,
    mask: jax.Array,
    segment_ids: jax.Array | None,
    documents: int,
    query: jax.Array | None = None,
) -> jax.Array:
    """The pool of each of the first `documents` documents of every row.

    Args:
        hidden: [B, T, D]. mask: [B, T] bool.
        segment_ids: [B, T] int32; a document ends where they change. None: a row is one document.

    Returns: [B, documents, D] float32; zeros for documents that are not there.
    """
    number = document_numbers(segment_ids, mask)
    parts = [whole(pool, hidden, mask & (number == n), query) for n in range(documents)]
    return jnp.stack(parts, axis=1)


def document_numbers(segment_ids: jax.Array | None, mask: jax.Array, before: jax.Array | None = None) -> jax.Array:
    """[B, T] int32, how many documents ended before each position of a row or piece.

    Args:
        before: [B] int32, document of the last real position before the piece. None: nothing came before.
    """
    if segment_ids is None:
        return jnp.zeros(mask.shape, jnp.int32)
    changed = resets(segment_ids, before, mask)
    assert changed is not None  # it is None only without segment_ids
    return jnp.cumsum(changed, axis=1, dtype=jnp.int32)


def carry_on(
    pool: str,
    state: State,
    hidden: jax.Array,
    mask: jax.Array,
    segment_ids: jax.Array | None = None,
    before: jax.Array | None = None,
    query: jax.Array | None = None,
) -> State:
    """The pool of the document that is open at the end of a piece, where earlier pieces left `state`.

    Args: as of `document_numbers` and `extend`.
    """
    number = document_numbers(segment_ids, mask, before)
    newest = number[:, -1:]
    fresh = start(pool, hidden.shape[0], hidden.shape[2])
    goes_on = newest[:, 0] == 0
    kept = {name: jnp.where(goes_on.reshape(-1, *[1] * (x.ndim - 1)), x, fresh[name]) for name, x in state.items()}
    return extend(pool, kept, hidden, mask & (number == newest), query)
