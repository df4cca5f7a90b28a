"""Softmax attention with grouped heads, windows, packed documents and caches."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seqmodels.kernels import dispatch
from seqmodels.kernels.attention import cudnn, reference, xla
from seqmodels.kernels.attention.visible import visible
from seqmodels.kernels.axes import Layout
from seqmodels.kernels.finite import finite_or_zero, not_finite, spoil

BACKENDS = {"reference": reference, "xla": xla, "cudnn": cudnn}
WINNERS = {"cuda": ("cudnn", "xla"), "default": ("xla",)}  # measured on an H100, jax 0.11.2
IMPLEMENTATIONS = tuple(BACKENDS)

LARGEST = 1e18  # queries and keys of packed rows from here on count as infinite: their products overflow


QUERY_ROWS, KEY_ROWS = ("batch", None, "heads", None), ("batch", None, "kv_heads", None)
LAYOUT = Layout(
    dict(
        q=QUERY_ROWS,
        k=KEY_ROWS,
        v=KEY_ROWS,
        segment_ids=("batch", None),
        key_segment_ids=("batch", None),
        key_mask=("batch", None),
        positions=("batch", None),
        key_positions=("batch", None),
    ),
    (QUERY_ROWS,),
    together=("heads", "kv_heads"),
)


def axes(**arrays: object) -> Layout:
    """Logical axes of the arrays and of the result of `attention`. Time stays whole: each query sees all keys."""
    return LAYOUT


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = True,
    segment_ids: jax.Array | None = None,
    key_segment_ids: jax.Array | None = None,
    key_mask: jax.Array | None = None,
    positions: jax.Array | None = None,
    key_positions: jax.Array | None = None,
    scale: float | None = None,
    window: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """o_t = sum_s softmax_s(scale q_t . k_s) v_s over the keys s that query t sees.

    Query t sees a key if the key is in the same document, not later than the query, within the window, and not masked.
    The keys may come in any order, as in a ring-buffer cache: only the positions decide which token is later.

    Args:
        q: [B, T, H, d].
        k, v: [B, S, Hkv, d]; H is a multiple of Hkv, and query head h reads key head h // (H / Hkv).
        causal: query t sees no key s with key_positions[s] > positions[t].
        segment_ids: [B, T] int32, document of each query, which sees the keys of equal id only. Infinity and NaN in
            one document reach no output and no gradient of another, with every implementation.
        key_segment_ids: [B, S] int32. None: the queries' (then S = T).
        key_mask: [B, S] bool, False on keys that no query sees, such as empty slots. Values there, even NaN, affect
            no output and no gradient.
        positions: [B, T] int32, position of each query in its document, or in its row (only the differences between
            tokens of one document count). None: query t is at t, and key s at s.
        key_positions: [B, S] int32, position of each key, counted as for queries. None: the queries' (then S = T).
        scale: None: d**-0.5.
        window: how many positions a query sees, counted back from and including its own (key_positions[s] >
            positions[t] - window).
        implementation: one of `IMPLEMENTATIONS`. None: the fastest on the platform.

    Returns:
        o [B, T, H, d] in the dtype of q; zero for a query that sees no key. The softmax has at least float32 precision.

    Raises:
        ValueError: shapes that do not fit.
        seqmodels.kernels.dispatch.UnsupportedError: the named implementation cannot serve.
    """
    if segment_ids is not None and key_segment_ids is None:
        key_segment_ids = segment_ids
    if positions is not None and key_positions is None:
        key_positions = positions
    check(q, k, v, segment_ids, key_segment_ids, key_mask, positions, key_positions, window)
    if key_mask is not None:  # the values of unseen keys must not reach a gradient either
        k, v = (jnp.where(key_mask[..., None, None], x, 0) for x in (k, v))
    options = Options(q.shape[-1] ** -0.5 if scale is None else scale, causal, window, implementation)
    rules = dict(segment_ids=segment_ids, key_segment_ids=key_segment_ids, key_mask=key_mask)
    rules |= dict(positions=positions, key_positions=key_positions)
    if segment_ids is None:
        return _attend(options, q, k, v, rules)
    if q.shape[1] > 1:
        return _attend_apart(options, (q, k, v), rules)
    # A single query, as in decoding: what it does not see is selected away, in the products that read the cache anyway.
    seen = visible((1, k.shape[1]), causal=causal, window=window, **rules)
    assert seen is not None  # it is None only without segment_ids
    k, v = (jnp.where(seen[:, 0, :, None, None], x, 0) for x in (k, v))
    return _attend(options, q, k, v, rules)


class Options(NamedTuple):
    """Static options, see `attention`."""

    scale: float
    causal: bool
    window: int | None
    implementation: str | None


def _attend(options: Options, q: jax.Array, k: jax.Array, v: jax.Array, rules: dict[str, Any]) -> jax.Array:
    """`attention` by one of its implementations. rules: the arrays that say which keys a query sees."""
    facts = dict(
        dtype=str(q.dtype),
        queries=q.shape[1],
        keys=k.shape[1],
        width=q.shape[3],
        causal=options.causal,
        masked=any(rules[name] is not None for name in ("segment_ids", "key_mask", "positions")),
        window=options.window,
    )

    def call(backend, q, k, v, rules):
        return backend.attention(q, k, v, scale=options.scale, causal=options.causal, window=options.window, **rules)

    return dispatch.dispatch("attention", BACKENDS, WINNERS, options.implementation, facts, call, q, k, v, rules)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_apart(options: Options, qkv: tuple[jax.Array, jax.Array, jax.Array], rules: dict[str, Any]) -> jax.Array:
    """As `_attend`, and what is not finite in one document does not reach the others.

    Weights of unseen keys are zero, but the products multiply by them. So queries, keys, values and the gradient of the
    output become finite before, whoever multiplies them. What sees a key that was not finite is NaN.
    """
    q, k, v = qkv
    bad = not_finite(k, LARGEST) | not_finite(v)
    seen = visible((q.shape[1], k.shape[1]), causal=options.causal, window=options.window, **rules)
    assert seen is not None  # it is None only without segment_ids
    spoilt = not_finite(q, LARGEST) | jnp.any(seen & bad[:, None], axis=-1)
    o = _attend(options, finite_or_zero(q, LARGEST), finite_or_zero(k, LARGEST), finite_or_zero(v), rules)
    return spoil(o, spoilt)


def _attend_apart_fwd(options, qkv, rules):
    return jax.vjp(lambda qkv: _attend_apart.fun(options, qkv, rules), qkv)


def _attend_apart_bwd(options, pull, do):
    ((dq, dk, dv),) = pull(finite_or_zero(do))
    return (spoil(dq, not_finite(do)), dk, dv), None


_attend_apart.defvjp(_attend_apart_fwd, _attend_apart_bwd)

choose = functools.partial(dispatch.choose, "attention", BACKENDS, WINNERS)


def check(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    key_segment_ids: jax.Array | None,
    key_mask: jax.Array | None,
    positions: jax.Array | None,
    key_positions: jax.Array | None,
    window: int | None,
) -> None:
    """Raise a ValueError unless the arguments fit together."""
    fits = q.ndim == k.ndim == 4 and k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
    if not fits or q.shape[2] % k.shape[2]:
        raise ValueError(
            "attention: q must be [B, T, H, d] and k, v [B, S, Hkv, d] with H a multiple of Hkv, "
            f"got {q.shape}, {k.shape}, {v.shape}"
        )
    if key_segment_ids is not None and segment_ids is None:
        raise ValueError("attention: key_segment_ids were given without segment_ids")
    if key_positions is not None and positions is None:
        raise ValueError("attention: key_positions were given without positions")
    rows, slots = q.shape[:2], k.shape[:2]
    tokens = dict(
        segment_ids=(segment_ids, rows),
        key_segment_ids=(key_segment_ids, slots),
        key_mask=(key_mask, slots),
        positions=(positions, rows),
        key_positions=(key_positions, slots),
    )
    for name, (array, shape) in tokens.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"attention: {name} must be {shape}, got {array.shape}")
    if window is not None and window < 1:
        raise ValueError(f"attention: window must be 1 or more, got {window}")
