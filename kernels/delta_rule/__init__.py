"""The delta rule: a matrix state that is decayed, corrected along one direction, and written by keys and values.

    S_t = (diag(w_t) - a_t b_t^T) S_{t-1} + k_t v_t^T          [K, V] for each head,  w_t = exp(log_decay_t)
    y_t = scale q_t S_t                                        or, read exclusively, scale q_t S_{t-1}

b_t reads the state as it is before the token's decay, and a_t says where what was read is taken away. With the unit key
k_t and the step beta_t the cases are

- DeltaNet (Yang et al. 2024): w = 1, a = beta k, b = k, written key beta k;
- Gated DeltaNet (Yang et al. 2025): w = e^g, a = beta k, b = e^g k, written key beta k, with a number g;
- KDA (Kimi Linear, 2025): the same with a vector g over K;
- RWKV-7 (Peng et al. 2025): a and b are independent, and w is a vector;
- the gain of Conba: w = lambda, a = beta k, b = k, written key beta k, read exclusively.

In all but RWKV-7 a is the written key. Then leave it out (None): the chunked implementation computes less.

The state is bounded if each matrix diag(w_t) - a_t b_t^T is a contraction. The operation does not check this.
"""

from typing import Any

import jax
import jax.numpy as jnp

from seqmodels.kernels import dispatch
from seqmodels.kernels.arrays import zero_padding
from seqmodels.kernels.axes import DOCUMENTS, TOKENS, Layout
from seqmodels.kernels.delta_rule import reference, xla
from seqmodels.kernels.finite import finite_decay

BACKENDS = {"reference": reference, "xla": xla}
# By platform, fastest first; the last one serves everything.
WINNERS = {"default": ("xla",)}
IMPLEMENTATIONS = tuple(BACKENDS)


def choose(platform: str, shape: tuple[int, ...] = (8, 2048, 16, 16, 128, 128), **facts: object) -> tuple[str, str]:
    """Name of the default implementation on a platform for a shape [B, T, Hk, H, K, V], and the reason."""
    usual = dict(dtype=jnp.dtype("bfloat16"), decay="head", read="inclusive", chunk=None)
    return dispatch.choose("delta_rule", BACKENDS, WINNERS, platform, shape=shape, **usual | facts)


def axes(
    v: jax.Array | None = None,
    k: jax.Array | None = None,
    a: jax.Array | None = None,
    b: jax.Array | None = None,
    log_decay: jax.Array | None = None,
    **others: object,
) -> Layout:
    """Logical axes of the arrays and results of `delta_rule`. Those of k, a and b depend on their number of heads."""
    keys, heads, state = (*TOKENS, "kv_heads", None), (*TOKENS, "heads", None), ("batch", "heads", None, None)

    def of(x: jax.Array | None) -> tuple[str | None, ...]:
        return heads if x is not None and v is not None and x.shape[2] == v.shape[2] else keys

    decay = heads if log_decay is None else heads[: log_decay.ndim]
    arrays = dict(q=keys, k=of(k), v=heads, a=of(a), b=of(b), log_decay=decay, initial_state=state, **DOCUMENTS)
    return Layout(arrays, (heads, state), together=("heads", "kv_heads"))


def delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    a: jax.Array | None,
    b: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    scale: float = 1.0,
    read: str = "inclusive",
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    initial_segment: jax.Array | None = None,
    mask: jax.Array | None = None,
    chunk: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The delta rule over time. Both results are differentiable in q, k, v, a, b, log_decay and initial_state.

    Args:
        q: [B, T, Hk, K] queries; float32, bfloat16, float16 or float64.
        k, a, b: [B, T, Hk, K] or [B, T, H, K], each by itself: keys that are written, directions in which the state is
            corrected, and directions in which it is read for that. With Hk heads, value head h uses head
            h // (H / Hk), as it does of q; with H heads, its own. (So a step beta for each value head goes into a.)
            a None: it is k.
        v: [B, T, H, V] values; H is a multiple of Hk.
        log_decay: logarithm of the decay, at most 0 (-inf is fine: it drops the state, except what a and b make of
            it), float32: None (no decay), [B, T, H], or [B, T, H, K] with one decay for each row of the state.
        scale: factor of the readout.
        read: "inclusive", y_t = scale q_t S_t, or "exclusive", y_t = scale q_t S_{t-1}. In an exclusive read, token t
            sees the state before its own decay, correction and write.
        initial_state: [B, H, K, V] float32. None: zeros.
        segment_ids: [B, T] int32; a change of id drops the state, at any position. Infinity and NaN of one document
            (or of a dropped initial_state) reach no output and no gradient of another.
        initial_segment: [B] int32, segment of initial_state. None: the segment of the first real token.
        mask: [B, T] bool. A token with False does not change the state, and its inputs (even NaN) are ignored. Its
            output is zero.
        chunk: tokens that are processed together. None: the implementation chooses. Affects only rounding.
        implementation: one of `IMPLEMENTATIONS`. None: the fastest that supports the call.

    Returns:
        y [B, T, H, V] in v's dtype, and the final state [B, H, K, V] in float32 (float64 if an argument is float64).
        Sums, decays and what is read for the corrections are float32; products of bfloat16 arrays take bfloat16
        factors.

    Raises:
        UnsupportedError: the named implementation is unknown or does not support the call.
        ValueError: shapes disagree, or an option is unknown.
    """
    documents = dict(segment_ids=segment_ids, initial_segment=initial_segment, mask=mask)
    check(q, k, v, a, b, log_decay, read, initial_state, **documents, chunk=chunk)
    factors = jnp.result_type(*(x for x in (q, k, v, a, b) if x is not None))
    accumulator = jnp.promote_types(jnp.float32, factors)
    log_decay = None if log_decay is None else finite_decay(log_decay.astype(accumulator))
    if mask is not None:  # where, not a product: padding may hold anything
        q, k, v, b = (zero_padding(x, mask) for x in (q, k, v, b))
        a = None if a is None else zero_padding(a, mask)
        log_decay = None if log_decay is None else zero_padding(log_decay, mask)
    (batch, length, heads, values), (groups, keys) = v.shape, q.shape[2:]
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, keys, values), accumulator)

    def call(backend: Any, arrays: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        return backend.delta_rule(**arrays, scale=scale, read=read, chunk=chunk)

    arrays = dict(q=q, k=k, v=v, a=a, b=b, log_decay=log_decay, initial_state=initial_state, **documents)
    facts = dict(shape=(batch, length, groups, heads, keys, values), dtype=factors, read=read, chunk=chunk)
    facts |= dict(decay="none" if log_decay is None else {3: "head", 4: "channel"}[log_decay.ndim])
    y, state = dispatch.dispatch("delta_rule", BACKENDS, WINNERS, implementation, facts, call, arrays)
    return zero_padding(y, mask), state


def check(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    a: jax.Array | None,
    b: jax.Array,
    log_decay: jax.Array | None,
    read: str,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    initial_segment: jax.Array | None,
    mask: jax.Array | None,
    chunk: int | None,
) -> None:
    """Raise a ValueError unless the arguments fit together and the options are known."""
    if q.ndim != 4 or v.ndim != 4 or v.shape[:2] != q.shape[:2] or not q.shape[2] or v.shape[2] % q.shape[2]:
        raise ValueError(
            f"delta_rule: q has shape {q.shape} and v {v.shape}; "
            "allowed: q [B, T, Hk, K] and v [B, T, H, V] with H a multiple of Hk"
        )
    if not v.shape[1]:
        raise ValueError("delta_rule: T is 0; allowed: 1 or more")
    if read not in ("inclusive", "exclusive"):
        raise ValueError(f"delta_rule: read is {read!r}; allowed: 'inclusive', 'exclusive'")
    if chunk is not None and chunk < 1:
        raise ValueError(f"delta_rule: chunk is {chunk}; allowed: None, or 1 or more")
    (batch, length, heads, values), keys = v.shape, q.shape[3]
    either = list(dict.fromkeys([q.shape, (batch, length, heads, keys)]))
    want: dict[str, tuple[jax.Array | None, list[tuple[int, ...]]]] = dict(
        k=(k, either),
        a=(a, either),
        b=(b, either),
        log_decay=(log_decay, [(batch, length, heads), (batch, length, heads, keys)]),
        initial_state=(initial_state, [(batch, heads, keys, values)]),
        segment_ids=(segment_ids, [(batch, length)]),
        initial_segment=(initial_segment, [(batch,)]),
        mask=(mask, [(batch, length)]),
    )
    for name, (array, shapes) in want.items():
        if array is not None and array.shape not in shapes:
            raise ValueError(f"delta_rule: {name} has shape {array.shape}; allowed with v {v.shape}: {shapes}")
