"""Linear attention: a matrix state with decay, updated by outer products of keys and values, read by queries.

    S_t = a_t S_{t-1} + k_t v_t^T          [K, V] for each head
    y_t = scale q_t S_t                    or, read exclusively, scale q_t (S_{t-1} + (u * k_t) v_t^T)

The decay is a_t = exp(log_decay_t). It is

- one in linear attention (Katharopoulos et al. 2020) and Performer;
- a constant for each head in RetNet (Sun et al. 2023);
- a number for each token and head in Mamba-2 (Dao & Gu 2024), and in Mamba-3 with rescaled keys;
- a vector over K in GLA (Yang et al. 2024) and in RWKV-6, which reads exclusively with the bonus u.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from seqmodels.kernels import dispatch
from seqmodels.kernels.arrays import zero_padding
from seqmodels.kernels.axes import DOCUMENTS, TOKENS, Layout
from seqmodels.kernels.finite import finite_decay
from seqmodels.kernels.linear_attention import mosaic_gpu, mosaic_tpu, reference, xla

BACKENDS = {"reference": reference, "xla": xla, "mosaic_gpu": mosaic_gpu, "mosaic_tpu": mosaic_tpu}
# By platform, fastest first as measured; the last one serves everything. No TPU has timed mosaic_tpu yet.
WINNERS = {"cuda": ("mosaic_gpu", "xla"), "default": ("xla",)}
IMPLEMENTATIONS = tuple(BACKENDS)

EPSILON = 1e-10  # a normaliser nearer to zero than this is replaced by this value with the normaliser's sign


def choose(platform: str, shape: tuple[int, ...] = (8, 2048, 1, 32, 128, 64), **facts: object) -> tuple[str, str]:
    """Name of the default implementation on a platform for a shape [B, T, Hk, H, K, V], and the reason."""
    usual = dict(dtype=jnp.dtype("bfloat16"), decay="head", read="inclusive", bonus=False, chunk=None)
    return dispatch.choose("linear_attention", BACKENDS, WINNERS, platform, shape=shape, **usual | facts)


def axes(log_decay: jax.Array | None = None, **others: object) -> Layout:
    """Logical axes of the arrays and results of `linear_attention`; the axes of log_decay depend on its rank."""
    keys, heads, state = (*TOKENS, "kv_heads", None), (*TOKENS, "heads", None), ("batch", "heads", None, None)
    decay = () if log_decay is None else ("heads",) if log_decay.ndim == 1 else heads[: log_decay.ndim]
    arrays = dict(q=keys, k=keys, v=heads, log_decay=decay, bonus=("heads", None), initial_state=state, **DOCUMENTS)
    return Layout(arrays, (heads, state), together=("heads", "kv_heads"))


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    scale: float = 1.0,
    read: str = "inclusive",
    bonus: jax.Array | None = None,
    normalise: bool = False,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    initial_segment: jax.Array | None = None,
    mask: jax.Array | None = None,
    chunk: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Linear attention over time. Both results are differentiable in q, k, v, log_decay, bonus and initial_state.

    Args:
        q, k: [B, T, Hk, K] queries and keys; float32, bfloat16, float16 or float64.
        v: [B, T, H, V] values; H is a multiple of Hk, and value head h uses query and key head h // (H / Hk).
        log_decay: logarithm of the decay, at most 0 (-inf is fine: it drops the state), float32: None (no decay), [H],
            [B, T, H], or [B, T, H, K] with one decay for each row of the state.
        scale: factor of the readout.
        read: "inclusive", y_t = scale q_t S_t, or "exclusive", y_t = scale q_t S_{t-1}. In an exclusive read, token t
            sees the state before its own decay and its own write.
        bonus: [H, K] u, weight of a token's own key in an exclusive read: adds scale (q_t . (u * k_t)) v_t.
        normalise: divide y_t by the result of the same read for values of one (scale cancels). This normaliser is one
            more column of the state. If its absolute value is below 1e-10, it is replaced by 1e-10 with its sign: a
            token that reads nothing gets zero.
        initial_state: [B, H, K, V] float32, or with `normalise` [B, H, K, V + 1], normaliser last. None: zeros.
        segment_ids: [B, T] int32; a change of id drops the state, at any position. Infinity and NaN of one document
            (or of a dropped initial_state) reach no output and no gradient of another.
        initial_segment: [B] int32, segment of initial_state. None: the segment of the first real token.
        mask: [B, T] bool. A token with False does not change the state, and its inputs (even NaN) are ignored. Its
            output is zero.
        chunk: tokens that are processed together. None: the implementation chooses. Affects only rounding.
        implementation: one of `IMPLEMENTATIONS`. None: the fastest that supports the call.

    Returns:
        y [B, T, H, V] in v's dtype, and the final state, in the shape of initial_state and in float32 (float64 if an
        argument is float64). Sums and decays are float32; products of bfloat16 arrays take bfloat16 factors.

    Raises:
        UnsupportedError: the named implementation is unknown or does not support the call.
        ValueError: shapes disagree, or an option is unknown.
    """
    documents = dict(segment_ids=segment_ids, initial_segment=initial_segment, mask=mask)
    check(q, k, v, log_decay, read, bonus, normalise, initial_state, **documents, chunk=chunk)
    options: dict[str, Any] = dict(scale=scale, read=read, chunk=chunk, implementation=implementation, **documents)
    if not normalise:
        return readouts(q, k, v, log_decay, bonus, initial_state, **options, dtype=v.dtype)
    dtype = jnp.result_type(q, k, v, jnp.float32)  # dividing rounded numbers would round twice
    y, state = readouts(q, k, append_ones(v), log_decay, bonus, initial_state, **options, dtype=dtype)
    return divide(y).astype(v.dtype), state


def readouts(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None,
    bonus: jax.Array | None,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    initial_segment: jax.Array | None,
    mask: jax.Array | None,
    *,
    scale: float,
    read: str,
    chunk: int | None,
    implementation: str | None,
    dtype: DTypeLike,
) -> tuple[jax.Array, jax.Array]:
    """`linear_attention` without its checks and its division: y [B, T, H, V] in `dtype`, and the final state."""
    factors = jnp.result_type(q, k, v)
    accumulator = jnp.promote_types(jnp.float32, factors)
    log_decay = None if log_decay is None else finite_decay(log_decay.astype(accumulator))
    if mask is not None:  # where, not a product: padding may hold anything
        q, k, v = (jnp.where(mask[:, :, None, None], x, 0) for x in (q, k, v))
        if log_decay is not None:
            log_decay = jnp.broadcast_to(log_decay, (*v.shape[:3], *log_decay.shape[3:]))
            log_decay = jnp.where(mask.reshape(*mask.shape, *[1] * (log_decay.ndim - 2)), log_decay, 0)
    (batch, length, heads, values), (groups, keys) = v.shape, k.shape[2:]
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, keys, values), accumulator)

    def call(backend, arrays):
        return backend.linear_attention(**arrays, scale=scale, read=read, chunk=chunk, dtype=dtype)

    arrays = dict(q=q, k=k, v=v, log_decay=log_decay, bonus=bonus, initial_state=initial_state)
    arrays |= dict(segment_ids=segment_ids, initial_segment=initial_segment, mask=mask)
    facts = dict(shape=(batch, length, groups, heads, keys, values), dtype=factors, read=read, chunk=chunk)
    facts |= dict(bonus=bonus is not None, decay=_kind(log_decay))
    y, state = dispatch.dispatch("linear_attention", BACKENDS, WINNERS, implementation, facts, call, arrays)
    return zero_padding(y, mask), state


def append_ones(v: jax.Array) -> jax.Array:
    """v [..., V] with a column of ones appended, [..., V + 1]. The readout of this column is the normaliser."""
    return jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)


def divide(y: jax.Array) -> jax.Array:
    """Divide readouts [..., V + 1] by their last column: [..., V]."""
    total = y[..., -1:]
    return y[..., :-1] / jnp.where(jnp.abs(total) > EPSILON, total, jnp.where(total < 0, -EPSILON, EPSILON))


def _kind(log_decay: jax.Array | None) -> str:
    """Kind of the decay, as an argument of `supports`: none, constant [H], head [B, T, H] or channel [B, T, H, K]."""
    return "none" if log_decay is None else {1: "constant", 3: "head", 4: "channel"}[log_decay.ndim]


def check(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None,
    read: str,
    bonus: jax.Array | None,
    normalise: bool,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    initial_segment: jax.Array | None,
    mask: jax.Array | None,
    chunk: int | None,
) -> None:
    """Raise a ValueError unless the arguments fit together and the options are known."""
    if q.ndim != 4 or q.shape != k.shape or v.ndim != 4 or v.shape[:2] != k.shape[:2] or v.shape[2] % k.shape[2]:
        raise ValueError(
            f"linear_attention: q has shape {q.shape}, k {k.shape} and v {v.shape}; "
            "allowed: q, k [B, T, Hk, K] and v [B, T, H, V] with H a multiple of Hk"
        )
    if not v.shape[1]:
        raise ValueError("linear_attention: T is 0; allowed: 1 or more")
    if read not in ("inclusive", "exclusive"):
        raise ValueError(f"linear_attention: read is {read!r}; allowed: 'inclusive', 'exclusive'")
    if bonus is not None and read == "inclusive":
        raise ValueError("linear_attention: bonus was given with read='inclusive'; allowed: with read='exclusive'")
    if chunk is not None and chunk < 1:
        raise ValueError(f"linear_attention: chunk is {chunk}; allowed: None, or 1 or more")
    (batch, length, heads, values), keys = v.shape, k.shape[3]
    want: dict[str, tuple[jax.Array | None, list[tuple[int, ...]]]] = dict(
        log_decay=(log_decay, [(heads,), (batch, length, heads), (batch, length, heads, keys)]),
        bonus=(bonus, [(heads, keys)]),
        initial_state=(initial_state, [(batch, heads, keys, values + normalise)]),
        segment_ids=(segment_ids, [(batch, length)]),
        initial_segment=(initial_segment, [(batch,)]),
        mask=(mask, [(batch, length)]),
    )
    for name, (array, shapes) in want.items():
        if array is not None and array.shape not in shapes:
            raise ValueError(f"linear_attention: {name} has shape {array.shape}; allowed with v {v.shape}: {shapes}")
