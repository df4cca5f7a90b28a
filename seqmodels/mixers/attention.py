"""Causal softmax attention with rotary positions and grouped heads (Llama 2: Touvron et al. 2023, section 2.2)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.branch import Branch, real
from seqmodels.fields.attention import ATTENTION
from seqmodels.kernels.attention import attention
from seqmodels.kernels.segments import resets
from seqmodels.layers.parameter import normal, parameter, residual_std, zeros
from seqmodels.layers.rope import rope
from seqmodels.sequence import Sequence

EMPTY = -1  # document of a cache slot that holds no key
PADDING = -2  # document of a padding token, which sees nothing


def empty_cache(batch: int, slots: int, kv_heads: int, head_dim: int, dtype) -> dict[str, jax.Array]:
    """A cache of `slots` keys and values a row.

    Returns:
        k, v: [B, S, Hkv, d], keys already rotated.
        document: [B, S] int32, which document of the row each slot belongs to, counted from 0; `EMPTY`: none.
        length: [B] int32, slots in use.
    """
    shape = (batch, slots, kv_heads, head_dim)
    return dict(
        k=jnp.zeros(shape, dtype),
        v=jnp.zeros(shape, dtype),
        document=jnp.full((batch, slots), EMPTY, jnp.int32),
        length=jnp.zeros((batch,), jnp.int32),
    )


def document_numbers(seq: Sequence, batch: int, length: int, last: jax.Array) -> jax.Array:
    """[B, T] int32: `last` [B], the number of the document that the state ends in, plus the resets so far."""
    changed = resets(**seq.documents())
    if changed is None:
        return jnp.broadcast_to(last[:, None], (batch, length))
    return last[:, None] + jnp.cumsum(changed, axis=1, dtype=jnp.int32)


def write(cache: dict[str, jax.Array], k, v, document, mask) -> tuple[dict[str, jax.Array], jax.Array]:
    """Put the real tokens behind those in the cache; what does not fit is lost.

    Returns:
        The cache, and the slot [B, T] of each token (of padding: that of the next real token).
    """
    batch, length = document.shape
    if mask is None:
        mask = jnp.ones((batch, length), bool)
    slot = cache["length"][:, None] + jnp.cumsum(mask, axis=1, dtype=jnp.int32) - mask
    slots = cache["k"].shape[1]
    place = jnp.arange(batch)[:, None], jnp.where(mask, slot, slots)
    new = dict(
        k=cache["k"].at[place].set(k.astype(cache["k"].dtype), mode="drop"),
        v=cache["v"].at[place].set(v.astype(cache["v"].dtype), mode="drop"),
        document=cache["document"].at[place].set(document, mode="drop"),
        length=cache["length"] + jnp.sum(mask, axis=1, dtype=jnp.int32),
    )
    return new, slot


class Attention(Branch):
    """Attention mixer. Its options are declared in seqmodels/fields/attention.py.

    Its state is a cache of `max_length` tokens a row; the caller sees to it that they suffice.
    """

    heads: int = ATTENTION["heads"]
    kv_heads: int = ATTENTION["kv_heads"]
    head_dim: int = ATTENTION["head_dim"]
    rope_theta: float = ATTENTION["rope_theta"]
    window: int = ATTENTION["window"]

    options = ATTENTION
    operations = ("attention",)
    biased = True

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Heads, key heads, channels of a head."""
        return self.heads, self.kv_heads or self.heads, self.head_dim or self.width // self.heads

    @nn.nowrap
    def init_state(self, batch: int, max_length: int) -> dict[str, jax.Array]:
        """An empty cache: see `empty_cache`."""
        _, kv_heads, head_dim = self.sizes
        return empty_cache(batch, max_length, kv_heads, head_dim, self.dtype)

    @nn.nowrap
    def flops(self, length: int) -> float:
        """Scores and sums over `length` keys, in full, as they are computed, though half of them are masked."""
        heads, _, head_dim = self.sizes
        return 4 * length * heads * head_dim

    @nn.compact
    def __call__(self, x, seq: Sequence, state=None):
        """x [B, T, D] to y [B, T, D] and the cache with these tokens. Without a state the cache holds just them."""
        batch, length, _ = x.shape
        heads, kv_heads, head_dim = self.sizes
        x = real(x, seq, self.dtype)

        def project(name, heads, axis):
            weight = self.matrix(name, (self.width, heads, head_dim), ("embed", axis, "head_dim"), normal(0.02))
            y = jnp.einsum("btd,dhk->bthk", x, weight)
            if not self.bias:
                return y
            bias = parameter(self, f"{name}_bias", (heads * head_dim,), (axis,), zeros, dtype=self.dtype)
            return y + bias.reshape(heads, head_dim)

        q = rope(project("query", heads, "heads"), seq.positions, self.rope_theta)
        k = rope(project("key", kv_heads, "kv_heads"), seq.positions, self.rope_theta)
        v = project("value", kv_heads, "kv_heads")
        options = dict(window=self.window or None, implementation=self.implementation.get("attention"))

        if state is None and seq.mask is None:
            document = document_numbers(seq, batch, length, jnp.zeros((batch,), jnp.int32))
            o = attention(q, k, v, segment_ids=None if seq.segment_ids is None else document, **options)
            state = dict(k=k, v=v, document=document, length=jnp.full((batch,), length, jnp.int32))
        else:
            state = empty_cache(batch, length, kv_heads, head_dim, self.dtype) if state is None else state
            last = jnp.take_along_axis(state["document"], jnp.maximum(state["length"] - 1, 0)[:, None], axis=1)[:, 0]
            document = document_numbers(seq, batch, length, jnp.maximum(last, 0))
            state, slot = write(state, k, v, document, seq.mask)
            o = attention(
                q,
                state["k"],
                state["v"],
                segment_ids=document if seq.mask is None else jnp.where(seq.mask, document, PADDING),
                key_segment_ids=state["document"],
                query_index=slot,
                **options,
            )

        out_axes = ("heads", "head_dim", "embed")
        out = self.matrix("out", (heads, head_dim, self.width), out_axes, normal(residual_std(self.layers)))
        y = jnp.einsum("bthk,hkd->btd", o, out)
        if self.bias:
            y = y + parameter(self, "out_bias", (self.width,), ("embed",), zeros, dtype=self.dtype)
        return y, state
