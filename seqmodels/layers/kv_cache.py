"""The state of attention: a cache of keys and values, of all tokens of a row or of those in a window.

The token at `position` of the row (real tokens, counted from 0) takes the slot `position`. With a window the cache is a
ring: the slot is position % ring. With sinks there are slots before the ring, for the first tokens of the current
document, one each.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from seqmodels.kernels.segments import resets
from seqmodels.sequence import Sequence

Cache = dict[str, jax.Array]

EMPTY = -1  # document of a cache slot that holds no key
PADDING = -2  # document of a padding token, which sees no key


def empty_cache(
    batch: int, slots: int, kv_heads: int, head_dim: int, dtype: DTypeLike, positions: bool = False, gates: int = 0
) -> Cache:
    """A cache of `slots` keys and values per row.

    An empty slot holds zeros until a real token takes it. No query sees what an empty slot, or a slot of another
    document, holds: `kernels.attention` selects it away.

    Args:
        positions: whether to keep the position of each key in its document.
        gates: number of heads with forget gates.

    Returns:
        k, v: [B, S, Hkv, d], keys already rotated where positions rotate them.
        document: [B, S] int32, document of the row that each key belongs to, counted from 0; `EMPTY`: no key.
        length: [B] int32, number of real tokens of the row so far.
        position: [B, S] int32, if it is kept.
        gate: [B, S, H] float32, sums of the logarithms of forget gates, if there are any.
    """
    shape = (batch, slots, kv_heads, head_dim)
    cache = dict(
        k=jnp.zeros(shape, dtype),
        v=jnp.zeros(shape, dtype),
        document=jnp.full((batch, slots), EMPTY, jnp.int32),
        length=jnp.zeros((batch,), jnp.int32),
    )
    if positions:
        cache["position"] = jnp.zeros((batch, slots), jnp.int32)
    if gates:
        cache["gate"] = jnp.zeros((batch, slots, gates), jnp.promote_types(dtype, jnp.float32))
    return cache


def slots_of(length: int, window: int, sinks: int) -> int:
    """Slots for rows of up to `length` tokens: of the ring, or of all tokens if window is 0, and of the sinks."""
    return min(window or length, length) + min(sinks, length)


def ring_of(slots: int, sinks: int) -> int:
    """Slots that are not for sinks: undoes `slots_of`, as there are no more sinks than the window has tokens."""
    return slots - min(sinks, slots // 2)


def key_positions(cache: Cache) -> jax.Array:
    """[B, S] int32: how many real tokens of the row came before the key in each slot; meaningless for an empty slot.

    Computing this costs less than updating one more array. There must be no sinks.
    """
    last, slots = cache["length"][:, None] - 1, cache["k"].shape[1]
    return last - (last - jnp.arange(slots)) % slots


def newest(cache: Cache) -> jax.Array:
    """[B] int32: the slot of the last token, any slot of an empty cache."""
    slots = cache["k"].shape[1]
    if "position" not in cache:
        return jnp.maximum(cache["length"] - 1, 0) % max(slots, 1)
    last = jnp.max(cache["document"], axis=1, keepdims=True)  # documents are counted upwards
    return jnp.argmax(jnp.where(cache["document"] == last, cache["position"], -1), axis=1)


def at_slot(x: jax.Array, slot: jax.Array) -> jax.Array:
    """[B, ...]: what x [B, S, ...] holds in one slot of each row, slot [B]."""
    return jax.vmap(lambda row, n: row[n])(x, slot)


def document_numbers(seq: Sequence, batch: int, length: int, last: jax.Array) -> jax.Array:
    """[B, T] int32: document of each token: `last` [B], the last document in the state, plus the resets so far."""
    changed = resets(**seq.documents())
    if changed is None:
        return jnp.broadcast_to(last[:, None], (batch, length))
    return last[:, None] + jnp.cumsum(changed, axis=1, dtype=jnp.int32)


def positions_in_row(before: jax.Array, length: int, mask: jax.Array | None) -> jax.Array:
    """[B, T] int32: how many real tokens of the row come before each token, `before` [B] of them before the first."""
    if mask is None:
        return before[:, None] + jnp.arange(length, dtype=jnp.int32)
    return before[:, None] + jnp.cumsum(mask, axis=1, dtype=jnp.int32) - mask


def put_keys(cache: Cache, new: Cache, place: jax.Array, mask: jax.Array | None, window: int, sinks: int = 0) -> Cache:
    """Put the real tokens into the cache.

    With a window a token replaces the token before it that is as many tokens away as the ring has slots. Without one a
    token beyond the last slot is lost.

    Args:
        new: what the cache holds of each of the tokens, [B, T, ...].
        place: [B, T] int32, number of real tokens of the row before each token.
        mask: [B, T] bool, False on padding.
        window, sinks: 0 for none. With sinks the position is kept in the cache.
    """
    batch, length = new["document"].shape
    slots = cache["k"].shape[1]
    kept = jnp.ones((batch, length), bool) if mask is None else mask
    total = cache["length"] + jnp.sum(kept, axis=1, dtype=jnp.int32)
    slot = place
    if window:
        ring = ring_of(slots, sinks)
        late = place >= total[:, None] - ring  # of a chunk longer than the ring: so each slot has one writer
        slot = slots - ring + place % ring
        if sinks:
            first = new["position"] < sinks
            last = jnp.max(jnp.where(kept, new["document"], EMPTY), axis=1, keepdims=True)
            late = jnp.where(first, new["document"] == last, late)
            slot = jnp.where(first, new["position"], slot)
        kept &= late
    where = jnp.arange(batch)[:, None], jnp.where(kept, slot, slots)  # an index past the end is dropped
    put = {name: cache[name].at[where].set(x.astype(cache[name].dtype), mode="drop") for name, x in new.items()}
    return dict(put, length=total)


def check_slots(tokens: int, slots: int, window: int, sinks: int = 0) -> None:
    """Raise a ValueError if this number of tokens does not fit even into an empty cache.

    Only sizes are known here. The number of used slots and of padding tokens is known only when the computation runs,
    and a running computation cannot raise: `attend_from_cache` then returns NaN.
    """
    ring = ring_of(slots, sinks)
    if tokens > ring and not 0 < window <= ring:
        raise ValueError(
            f"attention: {tokens} tokens do not fit into a cache of {ring} slots; "
            f"init_state(batch, max_length) needs max_length >= {tokens}, all tokens of the row"
        )


def sums_in_document(x: jax.Array, before: jax.Array, seq: Sequence) -> jax.Array:
    """[B, T, H]: the sum of x [B, T, H] over the tokens of the document so far; `before` [B, H] is that in the state.

    A document sums nothing of the documents before it, not even NaN. x is zero on padding.
    """
    changed = resets(**seq.documents())
    if changed is None:
        return before[:, None] + jnp.cumsum(x, axis=1)

    def add(a: Any, b: Any) -> Any:
        (fresh_a, sum_a), (fresh_b, sum_b) = a, b
        return fresh_a | fresh_b, jnp.where(fresh_b, sum_b, sum_a + sum_b)

    fresh, total = jax.lax.associative_scan(add, (changed[..., None], x), axis=1)
    return jnp.where(fresh, total, before[:, None] + total)
