"""Selective scan: Mamba's diagonal recurrence (Gu & Dao 2023, algorithm 2), with groups of states that share an output.

    s_t = exp(dt_t A) s_{t-1} + (dt_t u_t) B_t          [E, N] for each group
    y_t = (sum_g w_{t,g} * (s_{t,g} C_{t,g}) + D u_{t,0}) * silu(z_t)

Mamba has one group. DenseMamba's READ (arXiv 2403.00818) has m + 1 groups: a layer's own state and the states of the m
layers below. The states of the layers below are recomputed here from their inputs, so no state per token is stored.
"""

import jax
import jax.numpy as jnp

from seqmodels.kernels import dispatch
from seqmodels.kernels.arrays import zero_padding
from seqmodels.kernels.axes import DOCUMENTS, TOKENS, Layout
from seqmodels.kernels.finite import finite_decay
from seqmodels.kernels.selective_scan import mosaic_gpu, mosaic_tpu, reference, xla

BACKENDS = {"reference": reference, "xla": xla, "mosaic_gpu": mosaic_gpu, "mosaic_tpu": mosaic_tpu}
# By platform, fastest first as measured; the last one serves everything. No TPU has timed mosaic_tpu yet.
WINNERS = {"cuda": ("mosaic_gpu", "xla"), "default": ("xla",)}
IMPLEMENTATIONS = tuple(BACKENDS)


def choose(platform: str, shape: tuple[int, ...] = (8, 2048, 1, 1536, 16), **facts: object) -> tuple[str, str]:
    """Name of the default implementation on a platform for a shape [B, T, G, E, N], and the reason."""
    return dispatch.choose("selective_scan", BACKENDS, WINNERS, platform, shape=shape, **facts)


def axes(u: jax.Array, **others: object) -> Layout:
    """Logical axes of the arrays and results of `selective_scan`. They have a group axis if u has one."""
    group = (None,) * (u.ndim - 3)
    wide, narrow, state = (*TOKENS, *group, "inner"), (*TOKENS, *group, None), ("batch", *group, "inner", None)
    arrays = dict(
        u=wide,
        dt=wide,
        A=(*group, "inner", None),
        B=narrow,
        C=narrow,
        D=("inner",),
        z=(*TOKENS, "inner"),
        dt_bias=(*group, "inner"),
        weights=(*TOKENS, None, "inner"),
        initial_state=state,
        **DOCUMENTS,
    )
    return Layout(arrays, ((*TOKENS, "inner"), state))


def selective_scan(
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    *,
    D: jax.Array | None = None,
    z: jax.Array | None = None,
    dt_bias: jax.Array | None = None,
    dt_softplus: bool = True,
    weights: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    initial_segment: jax.Array | None = None,
    mask: jax.Array | None = None,
    implementation: str | None = None,
    axis: str | tuple[str, ...] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Selective scan over time, differentiable in every array, including the states.

    If there is one group, the group axis G may be left out, but only from all arrays together.

    Args:
        u: [B, T, (G,) E] input; float32, bfloat16, float16 or float64.
        dt: [B, T, (G,) E] step before bias and softplus.
        A: [(G,) E, N] float32, negative; -inf drops the state in every step above zero.
        B: [B, T, (G,) N] input matrix (key).
        C: [B, T, (G,) N] output matrix (query).
        D: [E] skip connection from the first group's input.
        z: [B, T, E] output gate.
        dt_bias: [(G,) E] float32.
        dt_softplus: False if dt is already the step itself.
        weights: [B, T, G - 1, E], weights of the readouts of groups 1..G-1, or [B, T, 1, E], one weight shared by all
            of them. The first group's weight is 1. None: all weights are 1.
        initial_state: [B, (G,) E, N] float32. None: zeros.
        segment_ids: [B, T] int32; a change of id drops the state, at any position. Infinity and NaN of one document
            (or of a dropped initial_state) reach no output and no gradient of another.
        initial_segment: [B] int32, segment of initial_state. None: the segment of the first real token.
        mask: [B, T] bool. A token with False does not change the state, and its inputs (even NaN) are ignored. Its
            output is zero.
        implementation: "reference", "xla", "mosaic_gpu", "mosaic_tpu". None: the fastest that supports the call.
        axis: only for `sharded.py`, and for backends that split time over devices themselves.

    Returns:
        y [B, T, E] in u's dtype, and the final state [B, (G,) E, N] in float32 (float64 for float64 input).

    Raises:
        UnsupportedError: the named implementation is unknown or does not support the call.
        ValueError: shapes disagree.
    """
    grouped = u.ndim == 4
    if not grouped:
        u, dt, A, B, C = u[:, :, None], dt[:, :, None], A[None], B[:, :, None], C[:, :, None]
        dt_bias = None if dt_bias is None else dt_bias[None]
        initial_state = None if initial_state is None else initial_state[:, None]
    _check(u, dt, A, B, C, weights, initial_state)
    accumulator = jnp.promote_types(jnp.float32, u.dtype)
    A = finite_decay(A)
    if mask is not None:  # where, not a product: padding may hold anything
        u, dt, B, C = (jnp.where(mask[:, :, None, None], x, 0) for x in (u, dt, B, C))
        z = None if z is None else jnp.where(mask[:, :, None], z, 0)
        weights = None if weights is None else jnp.where(mask[:, :, None, None], weights, 0)
    if initial_state is None:
        initial_state = jnp.zeros((u.shape[0], *A.shape), accumulator)
    optional = dict(D=D, z=z, dt_bias=dt_bias, weights=weights)
    documents = dict(segment_ids=segment_ids, initial_segment=initial_segment, mask=mask)

    def call(backend, arrays):
        return backend.selective_scan(**arrays, dt_softplus=dt_softplus, **({} if axis is None else {"axis": axis}))

    arrays = dict(u=u, dt=dt, A=A, B=B, C=C, initial_state=initial_state, **optional, **documents)
    facts = dict(shape=(*u.shape, A.shape[-1]), dtype=u.dtype)
    y, state = dispatch.dispatch("selective_scan", BACKENDS, WINNERS, implementation, facts, call, arrays)
    return zero_padding(y, mask), state if grouped else state[:, 0]


def _check(u, dt, A, B, C, weights, initial_state):
    """Raise a ValueError for shapes that do not fit, before anything is compiled."""
    if u.ndim != 4 or A.ndim != 3:
        raise ValueError(
            f"selective_scan: u has shape {u.shape} and A {A.shape}; allowed: [B, T, (G,) E] and [(G,) E, N]"
        )
    batch, length, groups, width = u.shape
    if not length:
        raise ValueError("selective_scan: T is 0; allowed: 1 or more")
    state = A.shape[-1]
    want = dict(
        dt=(dt, [u.shape]),
        A=(A, [(groups, width, state)]),
        B=(B, [(batch, length, groups, state)]),
        C=(C, [(batch, length, groups, state)]),
        weights=(weights, [(batch, length, groups - 1, width), (batch, length, 1, width)]),
        initial_state=(initial_state, [(batch, groups, width, state)]),
    )
    for name, (array, shapes) in want.items():
        if array is not None and array.shape not in shapes:
            raise ValueError(f"selective_scan: {name} has shape {array.shape}; allowed with u {u.shape}: {shapes}")
