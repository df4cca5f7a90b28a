"""Causal softmax attention with grouped heads and, by default, rotary positions (Llama 2: Touvron et al. 2023, 2.2)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from seqmodels.branch import Branch, State, real
from seqmodels.fields.attention import ATTENTION
from seqmodels.kernels.attention import attention
from seqmodels.kernels.finite import spoil
from seqmodels.kernels.segments import resets
from seqmodels.layers.parameter import normal, parameter, residual_std, zeros
from seqmodels.layers.rope import rope
from seqmodels.sequence import Sequence

EMPTY = -1  # document of a cache slot that holds no key
PADDING = -2  # document of a padding token, which sees no key


def empty_cache(batch: int, slots: int, kv_heads: int, head_dim: int, dtype: DTypeLike) -> dict[str, jax.Array]:
    """A cache of `slots` keys and values per row.

    An empty slot holds zeros until a real token takes it. No query sees what an empty slot, or a slot of another
    document, holds: `kernels.attention` selects it away.

    Returns:
        k, v: [B, S, Hkv, d], keys already rotated where positions rotate them.
        document: [B, S] int32, document of the row that each key belongs to, counted from 0; `EMPTY`: no key.
        length: [B] int32, number of real tokens of the row so far.
    """
    shape = (batch, slots, kv_heads, head_dim)
    return dict(
        k=jnp.zeros(shape, dtype),
        v=jnp.zeros(shape, dtype),
        document=jnp.full((batch, slots), EMPTY, jnp.int32),
        length=jnp.zeros((batch,), jnp.int32),
    )


def key_positions(cache: dict[str, jax.Array]) -> jax.Array:
    """[B, S] int32: how many real tokens of the row came before the key in each slot; meaningless for an empty slot.

    The token at `position` took the slot position % S. Computing this costs less than updating one more array.
    """
    last, slots = cache["length"][:, None] - 1, cache["k"].shape[1]
    return last - (last - jnp.arange(slots)) % slots


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


def put_keys(
    cache: dict[str, jax.Array], new: dict[str, jax.Array], position: jax.Array, mask: jax.Array | None, window: int
) -> dict[str, jax.Array]:
    """Put the real tokens into the cache.

    With a window the cache is a ring buffer: the token at `position` replaces the token S before it, in the slot
    position % S. Without a window it takes the slot `position`, and a token beyond the last slot is lost.

    Args:
        new: k and v [B, T, Hkv, d] and document [B, T] of the tokens.
        position: [B, T] int32, number of real tokens of the row before each token.
        mask: [B, T] bool, False on padding.
        window: 0 for none.
    """
    batch, length = new["document"].shape
    slots = cache["k"].shape[1]
    kept = jnp.ones((batch, length), bool) if mask is None else mask
    total = cache["length"] + jnp.sum(kept, axis=1, dtype=jnp.int32)
    slot = position
    if window:
        kept &= (
            position >= total[:, None] - slots
        )  # keep only the end of a chunk longer than the ring, so that each slot has one writer
        slot = position % slots
    place = jnp.arange(batch)[:, None], jnp.where(kept, slot, slots)  # an index past the end is dropped
    put = {name: cache[name].at[place].set(x.astype(cache[name].dtype), mode="drop") for name, x in new.items()}
    return dict(put, length=total)


def check_slots(tokens: int, slots: int, window: int) -> None:
    """Raise a ValueError if this number of tokens does not fit even into an empty cache.

    Only sizes are known here. The number of used slots and of padding tokens is known only when the computation runs,
    and a running computation cannot raise: `attend_from_cache` then returns NaN.
    """
    if tokens > slots and not 0 < window <= slots:
        raise ValueError(
            f"attention: {tokens} tokens do not fit into a cache of {slots} slots; "
            f"init_state(batch, max_length) needs max_length >= {tokens}, all tokens of the row"
        )


def attend_within(
    q: jax.Array, k: jax.Array, v: jax.Array, seq: Sequence, *, window: int, implementation: str | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Attention of whole rows to themselves, and their cache. As `attend_from_cache` with an empty cache."""
    batch, length, kv_heads, head_dim = k.shape
    options: dict[str, Any] = dict(window=window or None, implementation=implementation)
    document = document_numbers(seq, batch, length, jnp.zeros((batch,), jnp.int32))
    position = positions_in_row(jnp.zeros((batch,), jnp.int32), length, seq.mask)
    if seq.mask is None:
        o = attention(q, k, v, segment_ids=None if seq.segment_ids is None else document, **options)
    else:
        o = attention(
            q,
            k,
            v,
            segment_ids=jnp.where(seq.mask, document, PADDING),
            key_segment_ids=jnp.where(seq.mask, document, EMPTY),
            positions=position if window else None,
            **options,
        )
    new = dict(k=k, v=v, document=document)
    slots = min(window or length, length)
    if seq.mask is None and slots == length:  # every token is in its slot already
        return o, dict(new, length=jnp.full((batch,), length, jnp.int32))
    return o, put_keys(empty_cache(batch, slots, kv_heads, head_dim, k.dtype), new, position, seq.mask, window)


def attend_from_cache(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: dict[str, jax.Array],
    seq: Sequence,
    *,
    window: int,
    implementation: str | None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Attention of new tokens to those in the cache and to each other, and the cache with the new ones.

    Args:
        q: [B, T, H, d]. k, v: [B, T, Hkv, d]. cache: see `empty_cache`. window: 0 for none.

    Returns:
        o [B, T, H, d], zero on padding, and the new cache. Without a window, o is NaN for tokens that found no free
        slot: their keys are lost, so this and all later outputs would be wrong.

    Raises:
        ValueError: T tokens without padding do not fit into the cache, or it has no slots at all.
    """
    batch, length = q.shape[:2]
    slots = cache["k"].shape[1]
    check_slots(length if seq.mask is None else 1, slots, window)
    newest = jnp.maximum(cache["length"] - 1, 0) % max(slots, 1)
    last = jnp.take_along_axis(cache["document"], newest[:, None], axis=1)[:, 0]
    document = document_numbers(seq, batch, length, jnp.maximum(last, 0))
    position = positions_in_row(cache["length"], length, seq.mask)
    new = dict(k=k, v=v, document=document)
    after = put_keys(cache, new, position, seq.mask, window)
    keys, places = after, key_positions(after) if window else jnp.broadcast_to(jnp.arange(slots), (batch, slots))
    if window and length > 1 and slots < window + length - 1:  # a late token may take the slot that an early one needs
        if seq.mask is not None:
            new["document"] = jnp.where(seq.mask, document, EMPTY)
        keys = {name: jnp.concatenate([cache[name], x.astype(cache[name].dtype)], axis=1) for name, x in new.items()}
        places = jnp.concatenate([key_positions(cache), position], axis=1)
    o = attention(
        q,
        keys["k"],
        keys["v"],
        segment_ids=document if seq.mask is None else jnp.where(seq.mask, document, PADDING),
        key_segment_ids=keys["document"],
        positions=position,
        key_positions=places,
        window=window or None,
        implementation=implementation,
    )
    if window:
        return o, after
    lost = position >= slots
    return spoil(o, lost if seq.mask is None else lost & seq.mask), after


class Attention(Branch):
    """Attention mixer. Its options are declared in seqmodels/fields/attention.py.

    Its state is a cache of `max_length` tokens per row, which must be all that the row will ever have: the output of a
    token that finds no free slot is NaN. With a window the cache is a ring buffer with at most as many slots as the
    window, and a row may have any number of tokens.
    """

    heads: int = ATTENTION["heads"]
    kv_heads: int = ATTENTION["kv_heads"]
    head_dim: int = ATTENTION["head_dim"]
    positions: str = ATTENTION["positions"]
    rope_theta: float = ATTENTION["rope_theta"]
    rotary: float = ATTENTION["rotary"]
    llama3: float = ATTENTION["llama3"]
    window: int = ATTENTION["window"]

    options = ATTENTION
    operations = ("attention",)
    biased = True

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Number of heads, number of key heads, channels per head."""
        return self.heads, self.kv_heads or self.heads, self.head_dim or self.width // self.heads

    @nn.nowrap
    def init_state(self, batch: int, max_length: int | None = None) -> dict[str, jax.Array]:
        """An empty cache of `max_length` slots, or of the window's size if that is smaller: see `empty_cache`.

        Raises ValueError without `max_length`: there would be room for no key at all.
        """
        if max_length is None or max_length < 1:
            raise ValueError(
                f"attention: init_state(batch, max_length={max_length}); max_length must be at least 1, the number of "
                "tokens that a row will have, because the state is a cache of their keys"
            )
        _, kv_heads, head_dim = self.sizes
        return empty_cache(batch, min(self.window or max_length, max_length), kv_heads, head_dim, self.dtype)

    @nn.nowrap
    def flops(self, length: int) -> float:
        """Scores and sums over all `length` keys. Half of them are masked, but all are computed."""
        heads, _, head_dim = self.sizes
        return 4 * length * heads * head_dim

    @nn.compact
    def __call__(self, x: jax.Array, seq: Sequence, state: State = None) -> tuple[jax.Array, State]:
        """x [B, T, D] to y [B, T, D] and the cache with these tokens. Without a state it holds only these tokens."""
        heads, kv_heads, head_dim = self.sizes
        x = real(x, seq, self.dtype)

        def project(name, heads, axis):
            weight = self.matrix(name, (self.width, heads, head_dim), ("embed", axis, "head_dim"), normal(0.02))
            y = jnp.einsum("btd,dhk->bthk", x, weight)
            if not self.bias:
                return y
            bias = parameter(self, f"{name}_bias", (heads * head_dim,), (axis,), zeros, dtype=self.dtype)
            return y + bias.reshape(heads, head_dim)

        q, k = project("query", heads, "heads"), project("key", kv_heads, "kv_heads")
        if self.positions == "rope":
            turned = int(head_dim * self.rotary)
            q, k = (rope(x, seq.positions, self.rope_theta, turned, self.llama3) for x in (q, k))
        v = project("value", kv_heads, "kv_heads")
        window, implementation = self.window, self.implementation.get("attention")
        if state is None:
            o, state = attend_within(q, k, v, seq, window=window, implementation=implementation)
        else:
            o, state = attend_from_cache(q, k, v, state, seq, window=window, implementation=implementation)

        out_axes = ("heads", "head_dim", "embed")
        out = self.matrix("out", (heads, head_dim, self.width), out_axes, normal(residual_std(self.layers)))
        y = jnp.einsum("bthk,hkd->btd", o, out)
        if self.bias:
            y = y + parameter(self, "out_bias", (self.width,), ("embed",), zeros, dtype=self.dtype)
        return y, state
