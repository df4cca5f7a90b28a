"""ReRoPE (Su 2023, kexue.fm/archives/9708): rotary distances that stop growing, or grow slower, beyond a window."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqmodels.kernels.attention.arguments import Tokens
from seqmodels.kernels.attention.masks import Mask, Pattern
from seqmodels.kernels.attention.visible import visible
from seqmodels.layers.rope import rope
from seqmodels.layers.rope_scaling import leak


def rerope(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    trained: int,
    factor: float | None,
    frequency: np.ndarray,
    rotary: int | None = None,
    interleaved: bool = False,
    window: int | None = None,
    sinks: int = 0,
    pattern: Pattern | None = None,
    positions: jax.Array | None = None,
    key_positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    key_segment_ids: jax.Array | None = None,
    **others: Any,
) -> jax.Array:
    """Attention of queries to keys, neither of which is rotated yet, with the rotary distance

        t - s                 for t - s < w, where w = L / 2,
        w                     beyond (ReRoPE), or
        w + (t - s - w) / k   beyond (Leaky ReRoPE), with k such that rows of `factor` L tokens have distances up to L.

    The first and the others are two products of all queries and keys, so it costs twice as much memory and time as
    attention by XLA. It is for measuring trained models: the scores [B, H, T, S] are stored, and documents are kept
    apart by weights of zero, which does not hold back NaN and infinity.

    Args:
        q: [B, T, H, d]. k, v: [B, S, Hkv, d].
        trained: L. factor: None for ReRoPE.
        frequency: [d/2] radians a token. rotary, interleaved: as for `rope`.
        window, sinks, pattern, positions, key_positions, segment_ids, key_segment_ids: as for
            `kernels.attention.attention`; of its other arguments there must be none, and `implementation` is not read.

    Returns:
        [B, T, H, d] in the dtype of q.
    """
    if positions is None:
        positions = jnp.arange(q.shape[1], dtype=jnp.int32)[None].repeat(len(q), 0)
    key_positions = positions if key_positions is None else key_positions
    if any(value is not None for name, value in others.items() if name != "implementation"):
        raise ValueError(f"rerope: takes no {', '.join(others)}")
    if key_segment_ids is None:
        key_segment_ids = segment_ids
    w = trained / 2
    slower = 0.0 if factor is None else 1 / max(leak(factor, trained, w), 1.0)
    start = positions[:, :1]  # of the call: angles of small numbers are more exact

    def scores(scale: float, shift: float) -> jax.Array:
        queries, keys = ((x - start).astype(jnp.float32) * scale for x in (positions, key_positions))
        turn: dict[str, Any] = dict(rotary=rotary, frequency=frequency, interleaved=interleaved)
        turned, key = rope(q, queries + shift, **turn), rope(k, keys, **turn)
        groups = turned.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
        products = jnp.einsum("bthgd,bshd->bhgts", groups, key, preferred_element_type=jnp.float32)
        return products * q.shape[-1] ** -0.5

    near = (positions[:, :, None] - key_positions[:, None, :])[:, None, None] < w
    tokens = Tokens(segment_ids, key_segment_ids, None, positions, key_positions)
    seen = visible((q.shape[1], k.shape[1]), Mask(True, window, sinks, pattern), tokens)
    assert seen is not None
    logits = jnp.where(
        seen[:, None, None], jnp.where(near, scores(1.0, 0.0), scores(slower, w * (1 - slower))), -jnp.inf
    )
    weights = jnp.exp(logits - jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), -1e30))
    total = jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30)
    o = jnp.einsum("bhgts,bshd->bthgd", weights / total, v.astype(jnp.float32))
    return o.reshape(q.shape).astype(q.dtype)
