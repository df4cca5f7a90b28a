"""Softmax attention of grouped heads, by default causal with rotary positions (Llama 2: Touvron et al. 2023, 2.2)."""

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.branch import NO_LINKS, Branch, Links, State, real
from seqmodels.fields.attention import ATTENTION
from seqmodels.kernels.attention.masks import BigBird, Fixed, Mask, Pattern, Strided
from seqmodels.kernels.finite import spoil
from seqmodels.layers.kv_cache import (
    EMPTY,
    PADDING,
    Cache,
    at_slot,
    check_slots,
    document_numbers,
    empty_cache,
    key_positions,
    newest,
    positions_in_row,
    put_keys,
    slots_of,
    sums_in_document,
)
from seqmodels.layers.matmul import matmul
from seqmodels.layers.norm import RMSNorm
from seqmodels.layers.parameter import normal, parameter, residual_std, zeros
from seqmodels.layers.positions import BIASES, xpos
from seqmodels.layers.rerope import rerope
from seqmodels.layers.rope import rope
from seqmodels.layers.rope_scaling import frequencies, frequencies_of, scale_of
from seqmodels.parallel import attention
from seqmodels.sequence import Sequence

Kernel = Callable[..., jax.Array]


class Rules(NamedTuple):
    """Which tokens of its document a token sees, and how: static options of `kernels.attention`; 0 for none.

    `kernel` is `kernels.attention`, or a function with its arguments in which scores depend on distances too.
    """

    window: int = 0
    sinks: int = 0
    pattern: Pattern | None = None
    softcap: float = 0.0
    implementation: str | None = None
    kernel: Kernel = attention

    @property
    def absolute(self) -> bool:
        """Whether a token's position in its document matters, beyond its distance to others."""
        return self.sinks > 0 or self.pattern is not None

    def options(self) -> dict[str, Any]:
        """Arguments of `kernels.attention.attention`."""
        given = self._asdict()
        del given["kernel"]
        return given | dict(window=self.window or None, softcap=self.softcap or None)


def attend_within(q: jax.Array, new: Cache, seq: Sequence, rules: Rules) -> tuple[jax.Array, Cache]:
    """Attention of whole rows to themselves, and their cache. As `attend_from_cache` with an empty cache."""
    batch, length, kv_heads, head_dim = new["k"].shape
    options, gates = rules.options(), new.get("gate")
    document = document_numbers(seq, batch, length, jnp.zeros((batch,), jnp.int32))
    place = positions_in_row(jnp.zeros((batch,), jnp.int32), length, seq.mask)
    if rules.absolute and (seq.mask is not None or seq.segment_ids is not None):
        options["positions"] = seq.positions
    elif seq.mask is not None and (rules.window or rules.kernel is not attention):
        options["positions"] = place
    if seq.mask is not None:
        documents = jnp.where(seq.mask, document, PADDING), jnp.where(seq.mask, document, EMPTY)
        options |= dict(segment_ids=documents[0], key_segment_ids=documents[1])
    elif seq.segment_ids is not None:
        options["segment_ids"] = document
    o = rules.kernel(q, new["k"], new["v"], gates=gates, **options)
    new = dict(new, document=document)
    if rules.absolute:
        new["position"] = seq.positions
    slots = slots_of(length, rules.window, rules.sinks)
    if seq.mask is None and slots == length:  # every token is in its slot already
        return o, dict(new, length=jnp.full((batch,), length, jnp.int32))
    cache = empty_cache(
        batch, slots, kv_heads, head_dim, q.dtype, rules.absolute, 0 if gates is None else gates.shape[2]
    )
    return o, put_keys(cache, new, place, seq.mask, rules.window, rules.sinks)


def attend_from_cache(q: jax.Array, new: Cache, cache: Cache, seq: Sequence, rules: Rules) -> tuple[jax.Array, Cache]:
    """Attention of new tokens to those in the cache and to each other, and the cache with the new ones.

    Args:
        q: [B, T, H, d].
        new: what the cache holds of each new token: k and v [B, T, Hkv, d], and gate [B, T, H] if there are gates.
        cache: see `empty_cache`.

    Returns:
        o [B, T, H, d], zero on padding, and the new cache. Without a window, o is NaN for tokens that found no free
        slot: their keys are lost, so this and all later outputs would be wrong.

    Raises:
        ValueError: T tokens without padding do not fit into the cache, or it has no slots at all.
    """
    batch, length = q.shape[:2]
    slots, (window, sinks, *_) = cache["k"].shape[1], rules
    check_slots(length if seq.mask is None else 1, slots, window, sinks)
    document = document_numbers(seq, batch, length, jnp.maximum(at_slot(cache["document"], newest(cache)), 0))
    place = positions_in_row(cache["length"], length, seq.mask)
    new = dict(new, document=document)
    if rules.absolute:
        new["position"] = seq.positions
    keys = after = put_keys(cache, new, place, seq.mask, window, sinks)
    replaced = window and length > 1 and (sinks or slots < window + length - 1)
    if replaced:  # a late token may take the slot that an early one needs
        if seq.mask is not None:
            new["document"] = jnp.where(seq.mask, document, EMPTY)
        keys = {name: jnp.concatenate([cache[name], x.astype(cache[name].dtype)], axis=1) for name, x in new.items()}
    if rules.absolute:
        places = keys["position"]
    elif replaced:
        places = jnp.concatenate([key_positions(cache), place], axis=1)
    else:
        places = key_positions(after) if window else jnp.broadcast_to(jnp.arange(slots), (batch, slots))
    o = rules.kernel(
        q,
        keys["k"],
        keys["v"],
        segment_ids=document if seq.mask is None else jnp.where(seq.mask, document, PADDING),
        key_segment_ids=keys["document"],
        positions=seq.positions if rules.absolute else place,
        key_positions=places,
        gates=new.get("gate"),
        key_gates=keys.get("gate"),
        **rules.options(),
    )
    if window:
        return o, after
    lost = place >= slots
    return spoil(o, lost if seq.mask is None else lost & seq.mask), after


class Attention(Branch):
    """Attention mixer. Its options are declared in seqmodels/fields/attention.py.

    Its state is a cache of `max_length` tokens per row, which must be all that the row will ever have: the output of a
    token that finds no free slot is NaN. With a window the cache is a ring buffer with at most as many slots as the
    window, and a row may have any number of tokens. The first `sinks` tokens of the document have slots of their own.
    """

    heads: int = ATTENTION["heads"]
    kv_heads: int = ATTENTION["kv_heads"]
    head_dim: int = ATTENTION["head_dim"]
    positions: str = ATTENTION["positions"]
    rope_theta: float = ATTENTION["rope_theta"]
    rotary: float = ATTENTION["rotary"]
    rope_style: str = ATTENTION["rope_style"]
    scaling: str = ATTENTION["scaling"]
    scaling_factor: float = ATTENTION["scaling_factor"]
    trained_length: int = ATTENTION["trained_length"]
    biases: str = ATTENTION["biases"]
    init_std: float = ATTENTION["init_std"]
    window: int = ATTENTION["window"]
    sinks: int = ATTENTION["sinks"]
    mask: str = ATTENTION["mask"]
    block: int = ATTENTION["block"]
    stride: int = ATTENTION["stride"]
    summary: int = ATTENTION["summary"]
    near: int = ATTENTION["near"]
    first: int = ATTENTION["first"]
    random: int = ATTENTION["random"]
    softcap: float = ATTENTION["softcap"]
    qk_norm: str = ATTENTION["qk_norm"]
    qk_norm_eps: float = ATTENTION["qk_norm_eps"]
    output_gate: bool = ATTENTION["output_gate"]
    log_n: int = ATTENTION["log_n"]
    forget: bool = ATTENTION["forget"]

    options = ATTENTION
    operations = ("attention",)
    ways: ClassVar[tuple[str, ...]] = ("q", "k")
    valued = True
    biased = True

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Number of heads, number of key heads, channels per head."""
        return self.heads, self.kv_heads or self.heads, self.head_dim or self.width // self.heads

    @property
    def rules(self) -> Rules:
        """Which tokens a token sees, and how."""
        patterns = dict(
            causal=None,
            strided=Strided(self.stride, self.block),
            fixed=Fixed(self.stride, min(self.summary, self.stride), self.block),
            bigbird=BigBird(self.near, self.first, self.random, self.block),
        )
        implementation = self.implementation.get("attention")
        return Rules(self.window, self.sinks, patterns[self.mask], self.softcap, implementation)

    @nn.nowrap
    def init_state(self, batch: int, max_length: int | None = None) -> dict[str, jax.Array]:
        """An empty cache of `max_length` slots, or of the window's and the sinks': see `empty_cache`.

        Raises ValueError without `max_length`: there would be room for no key at all.
        """
        if max_length is None or max_length < 1:
            raise ValueError(
                f"attention: init_state(batch, max_length={max_length}); max_length must be at least 1, the number of "
                "tokens that a row will have, because the state is a cache of their keys"
            )
        heads, kv_heads, head_dim = self.sizes
        slots = slots_of(max_length, self.window, self.sinks)
        gates = heads if self.forget else 0
        return empty_cache(batch, slots, kv_heads, head_dim, self.dtype, self.rules.absolute, gates)

    @nn.nowrap
    def flops(self, length: int) -> float:
        """Scores and sums over as many keys as the query sees that sees most: all, as is usual, if it is the last."""
        heads, _, head_dim = self.sizes
        mask = Mask(True, self.rules.window or None, self.rules.sinks, self.rules.pattern)
        return 4 * mask.most_keys(length) * heads * head_dim

    @property
    def turned(self) -> int:
        """Channels of a head that rotary positions turn."""
        return int(self.sizes[2] * self.rotary)

    @nn.nowrap
    def kernel(self) -> Kernel:
        """`attention` with those positions that are not in queries and keys already."""
        interleaved = self.rope_style == "interleaved"
        if self.positions in BIASES:
            bias = BIASES[self.positions]
            return functools.partial(attention, bias=bias.function, bias_weights=bias.weights(self, self.heads))
        if self.positions == "xpos":
            return functools.partial(xpos, attention, interleaved=interleaved)
        if "rerope" in self.scaling:
            factor = self.scaling_factor if self.scaling == "leaky_rerope" else None
            turn: dict[str, Any] = dict(rotary=self.turned, interleaved=interleaved)
            turn["frequency"] = frequencies(self.turned // 2, self.rope_theta)
            return functools.partial(rerope, trained=self.trained_length, factor=factor, **turn)
        return attention

    @nn.nowrap
    def rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Queries or keys [B, T, H, d] at positions [B, T], rotated. ReRoPE rotates later, in its kernel."""
        if self.positions not in ("rope", "xpos") or "rerope" in self.scaling:
            return x
        options: dict[str, Any] = dict(rotary=self.turned, interleaved=self.rope_style == "interleaved")
        if self.scaling != "none":
            sizes = self.turned // 2, self.rope_theta, self.scaling_factor, self.trained_length
            options |= dict(frequency=frequencies_of(self.scaling, *sizes))
            options |= dict(scale=scale_of(self.scaling, self.scaling_factor))
        return rope(x, positions, self.rope_theta, **options)

    @nn.compact
    def __call__(
        self, x: jax.Array, seq: Sequence, state: State = None, links: Links = NO_LINKS
    ) -> tuple[jax.Array, State]:
        """x [B, T, D] to y [B, T, D] and the cache with these tokens. Without a state it holds only these tokens."""
        heads, kv_heads, head_dim = self.sizes
        std = self.init_std or self.width**-0.5
        x = real(x, seq, self.dtype)

        def project(name, x, heads, axis):
            weight = self.matrix(name, (self.width, heads, head_dim), ("embed", axis, "head_dim"), normal(std))
            y = matmul(x, weight.reshape(self.width, -1)).reshape(*x.shape[:2], heads, head_dim)
            if not self.bias or self.biases == "out":
                return y
            bias = parameter(self, f"{name}_bias", (heads * head_dim,), (axis,), zeros, dtype=self.dtype)
            return y + bias.reshape(heads, head_dim)

        asked, keyed = (links.of(way, x, seq, self.dtype) for way in self.ways)
        q, k = project("query", asked, heads, "heads"), project("key", keyed, kv_heads, "kv_heads")
        if self.qk_norm != "none":
            q, k = self._normed("query_norm", q, "heads"), self._normed("key_norm", k, "kv_heads")
        q, k = (self.rotate(x, seq.positions) for x in (q, k))
        if self.log_n:
            q = log_n(q, seq.positions, self.log_n)
        new = dict(k=k, v=links.value(project("value", x, kv_heads, "kv_heads")))
        if self.forget:
            new["gate"] = self._gates(x, seq, state)
        rules = self.rules._replace(kernel=self.kernel())
        if state is None:
            o, state = attend_within(q, new, seq, rules)
        else:
            o, state = attend_from_cache(q, new, state, seq, rules)
        if self.output_gate:
            o = o * jax.nn.sigmoid(project("gate", x, heads, "heads"))

        out_axes = ("heads", "head_dim", "embed")
        out = self.matrix("out", (heads, head_dim, self.width), out_axes, normal(residual_std(self.layers, std)))
        y = matmul(o.reshape(*o.shape[:2], -1), out.reshape(-1, self.width))
        if self.bias:
            y = y + parameter(self, "out_bias", (self.width,), ("embed",), zeros, dtype=self.dtype)
        return y, state

    def _normed(self, name: str, x: jax.Array, axis: str) -> jax.Array:
        """Queries or keys [B, T, H, d] under `qk_norm`, the norm `name`. `axis`: logical name of their heads."""
        if self.qk_norm == "all":
            return RMSNorm(self.qk_norm_eps, axis, name=name)(x.reshape(*x.shape[:2], -1)).reshape(x.shape)
        return RMSNorm(self.qk_norm_eps, "head_dim", self.qk_norm == "centred", name=name)(x)

    def _gates(self, x: jax.Array, seq: Sequence, state: State) -> jax.Array:
        """[B, T, H] float32: sums of the logarithms of forget gates sigmoid(w x + b), over the document so far."""
        heads, wide = self.sizes[0], jnp.promote_types(self.dtype, jnp.float32)
        weight = self.matrix("forget", (self.width, heads), ("embed", "heads"), normal(0.02))
        bias = parameter(self, "forget_bias", (heads,), ("heads",), zeros)
        logs = jax.nn.log_sigmoid(jnp.einsum("btd,dh->bth", x, weight).astype(wide) + bias)
        logs = logs if seq.mask is None else jnp.where(seq.mask[..., None], logs, 0)
        before = jnp.zeros((len(x), heads), wide) if state is None else at_slot(state["gate"], newest(state))
        return sums_in_document(logs, before, seq)


def log_n(q: jax.Array, positions: jax.Array, trained: int) -> jax.Array:
    """q [B, T, H, d] times max(1, ln(n) / ln(trained)), n = positions + 1: how many tokens of its document it sees.

    So the entropy of the softmax stays that of rows of `trained` tokens (Chiang and Cholak 2022, arXiv 2202.12172,
    section 5.3; Su 2021, kexue.fm/archives/8823).
    """
    tokens = (positions + 1).astype(jnp.promote_types(q.dtype, jnp.float32))
    scale = jnp.maximum(jnp.log(tokens) / math.log(trained), 1)
    return (q * scale[:, :, None, None]).astype(q.dtype)
