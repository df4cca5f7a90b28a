"""Softmax attention with grouped heads, windows, packed documents and caches."""

import functools

import jax
import jax.numpy as jnp

from seqmodels.kernels import dispatch
from seqmodels.kernels.attention import cudnn, reference, xla

BACKENDS = {"reference": reference, "xla": xla, "cudnn": cudnn}
WINNERS = {"cuda": ("cudnn", "xla"), "default": ("xla",)}  # measured on an H100, jax 0.11.2
IMPLEMENTATIONS = tuple(BACKENDS)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = True,
    segment_ids: jax.Array | None = None,
    key_segment_ids: jax.Array | None = None,
    key_mask: jax.Array | None = None,
    query_index: jax.Array | None = None,
    scale: float | None = None,
    window: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """o_t = sum_s softmax_s(scale q_t . k_s) v_s over the keys s that query t sees.

    Args:
        q: [B, T, H, d].
        k, v: [B, S, Hkv, d]; H is a multiple of Hkv, and query head h reads key head h // (H / Hkv).
        causal: query t sees no key s > query_index[t].
        segment_ids: [B, T] int32, document of each query, which sees the keys of equal id only.
        key_segment_ids: [B, S] int32. None: the queries' (then S = T).
        key_mask: [B, S] bool, False on keys that no query sees.
        query_index: [B, T] int32, place of each query among the keys, for caches. None: t.
        scale: None: d**-0.5.
        window: how many keys a query sees at most, its own included (s > query_index[t] - window).
        implementation: one of `IMPLEMENTATIONS`. None: the fastest on the platform.

    Returns:
        o [B, T, H, d] in the dtype of q; zero for a query that sees no key. The softmax is float32 at least.

    Raises:
        ValueError: shapes that do not fit.
        seqmodels.kernels.dispatch.UnsupportedError: the named implementation cannot serve.
    """
    if segment_ids is not None and key_segment_ids is None:
        key_segment_ids = segment_ids
    check(q, k, v, segment_ids, key_segment_ids, key_mask, query_index, window)
    if key_mask is not None:  # whatever stands in unseen keys must not reach a gradient either
        k, v = (jnp.where(key_mask[..., None, None], x, 0) for x in (k, v))
    facts = dict(
        dtype=str(q.dtype),
        queries=q.shape[1],
        keys=k.shape[1],
        width=q.shape[3],
        causal=causal,
        masked=any(x is not None for x in (segment_ids, key_mask, query_index)),
        window=window,
    )

    def call(backend, q, k, v, segment_ids, key_segment_ids, key_mask, query_index):
        return backend.attention(
            q,
            k,
            v,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            causal=causal,
            window=window,
            segment_ids=segment_ids,
            key_segment_ids=key_segment_ids,
            key_mask=key_mask,
            query_index=query_index,
        )

    arrays = (q, k, v, segment_ids, key_segment_ids, key_mask, query_index)
    return dispatch.dispatch("attention", BACKENDS, WINNERS, implementation, facts, call, *arrays)


choose = functools.partial(dispatch.choose, "attention", BACKENDS, WINNERS)


def check(q, k, v, segment_ids, key_segment_ids, key_mask, query_index, window) -> None:
    """Raise a ValueError unless the arguments fit together."""
    fits = q.ndim == k.ndim == 4 and k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
    if not fits or q.shape[2] % k.shape[2]:
        raise ValueError(
            "attention: q must be [B, T, H, d] and k, v [B, S, Hkv, d] with H a multiple of Hkv, "
            f"got {q.shape}, {k.shape}, {v.shape}"
        )
    if key_segment_ids is not None and segment_ids is None:
        raise ValueError("attention: key_segment_ids were given without segment_ids")
    rows, slots = q.shape[:2], k.shape[:2]
    places = dict(
        segment_ids=(segment_ids, rows),
        key_segment_ids=(key_segment_ids, slots),
        key_mask=(key_mask, slots),
        query_index=(query_index, rows),
    )
    for name, (array, shape) in places.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"attention: {name} must be {shape}, got {array.shape}")
    if window is not None and window < 1:
        raise ValueError(f"attention: window must be 1 or more, got {window}")
