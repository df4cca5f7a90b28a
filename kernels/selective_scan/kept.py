"""The selective scan on a CPU with the states of all tokens kept, so that the backward pass and other layers read them.

    s_t = exp(dt_t A) s_{t-1} + (dt_t u_t) B_t          scanned once
    y^k_t = s_t C^k_t                                   read by each of K queries, now or in a layer above

The gradient of the states is a sum of outer products, sum_k dy^k_t C^k_t. It reaches the scan's backward pass as these
factors and never as an array [B, T, N, E]: `Kept.factors` holds zeros, whose gradients they are. So a further query
costs one pass over the states in each direction, and one multiply-add per number in the backward scan.

Other platforms, and calls whose states are too large, scan again in place of this (`xla.py`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from seqmodels.kernels.arrays import computed_once, zero_padding
from seqmodels.kernels.dispatch import platforms
from seqmodels.kernels.finite import finite_decay
from seqmodels.kernels.segments import forget, resets
from seqmodels.kernels.tuning import UNROLLED

MOST = 2**26  # bytes of the states of one call that are kept: 33 MB for 8 x 256 tokens at 256 channels with 16 states


@struct.dataclass
class Kept:
    """The states of a scan.

    Attributes:
        states: [B, T, N, E], after each token.
        last: [B, E, N], after the last token.
        factors: for each query zeros [B, T, E] and [B, T, N], whose gradients are dy and C.
        mask: [B, T] bool, or None.
    """

    states: jax.Array
    last: jax.Array
    factors: tuple[tuple[jax.Array, jax.Array], ...]
    mask: jax.Array | None


def worth(u: jax.Array, A: jax.Array) -> bool:
    """Whether the states of this call are kept: on one CPU, more than a few tokens, and at most `MOST` bytes of states.

    u is [B, T, E] and A [E, N]. Without a mesh an accelerator may run it too, if there is one, so none are kept.
    """
    size = u.size * A.shape[-1] * jnp.promote_types(jnp.float32, u.dtype).itemsize
    alone = platforms() == ("cpu",) and jax.sharding.get_abstract_mesh().size <= 1
    return alone and u.shape[1] > UNROLLED and size <= MOST


def keep(
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    *,
    queries: int,
    initial_state: jax.Array,
    dt_bias: jax.Array | None = None,
    dt_softplus: bool = True,
    segment_ids: jax.Array | None = None,
    initial_segment: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> Kept:
    """Scan one group, and keep its states for so many queries. The arguments are those of `selective_scan`."""
    wide = jnp.promote_types(jnp.float32, u.dtype)
    dt = dt.astype(wide) + (0 if dt_bias is None else dt_bias.astype(wide))
    dt = jax.nn.softplus(dt) if dt_softplus else dt
    u, dt, B = (zero_padding(x, mask) for x in (u, dt, B))
    reset = resets(segment_ids, initial_segment, mask)
    A, state = finite_decay(A).astype(wide).T, jnp.swapaxes(initial_state.astype(wide), 1, 2)
    states, last, factors = _scan(queries, u, dt, B, reset, A, state)
    return Kept(states, jnp.swapaxes(last, 1, 2), factors, mask)


def read(kept: Kept, query: int, C: jax.Array) -> jax.Array:
    """y_t = s_t C_t [B, T, E] for the query with this number, C [B, T, N]. Each number is for one call."""
    C = zero_padding(C, kept.mask).astype(kept.last.dtype)
    return zero_padding(computed_once(_read(kept.states, kept.factors[query], C)), kept.mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(queries, u, dt, B, reset, A, state):
    """States [B, T, N, E], the last one, and zeros for the factors; u, dt [B, T, E], A [N, E], B [B, T, N]."""
    B = B.astype(dt.dtype)

    def step(t, carry):
        state, states = carry
        u_t, dt_t, B_t, reset_t = token((u, dt, B, reset), t)
        state = _decay(dt_t, A) * forget(state, reset_t) + (dt_t * u_t)[:, None] * B_t[..., None]
        return state, put(states, state, t, axis=1)

    states = jnp.zeros((*u.shape[:2], *A.shape), dt.dtype)
    last, states = jax.lax.fori_loop(0, u.shape[1], step, (state, states))
    return states, last, ((jnp.zeros_like(dt), jnp.zeros_like(B)),) * queries


def _scan_fwd(queries, *inputs):
    arrays = tuple(None if x is None else x.value for x in inputs)
    states, last, factors = _scan(queries, *arrays)
    states = checkpoint_name(states, "scan")
    return (states, last, factors), (arrays, states)


def _scan_bwd(queries, residuals, cotangents):
    arrays, states = residuals
    u, dt, B, reset, A, state = arrays
    _, dlast, factors = cotangents  # nothing reaches the states themselves: `_read` sends its factors
    absent = jax.custom_derivatives.SymbolicZero
    factors = tuple(pair for pair in factors if not isinstance(pair[0], absent))
    dlast = jnp.zeros_like(state) if isinstance(dlast, absent) else dlast
    gradients = _adjoint(u, dt, A, B.astype(dt.dtype), reset, state, states, factors, dlast)
    du, ddt, dA, dB, dstate = (g.astype(x.dtype) for g, x in zip(gradients, (u, dt, A, B, state), strict=True))
    return du, ddt, dB, None, dA, dstate


_scan.defvjp(_scan_fwd, _scan_bwd, symbolic_zeros=True)


def _adjoint(u, dt, A, B, reset, state, states, factors, dlast):
    """Gradients of u, dt, A, B and the first state: the recurrence ds_{t-1} = a_t ds_t, with sum_k dy^k_t C^k_t added.

    With a_t = exp(dt_t A) and k_t = a_t s_{t-1}: d(dt u)_t = sum_n ds_t B_t, dB_t = sum_e ds_t (dt u)_t,
    and the gradient of dt_t A is ds_t k_t.
    """

    length = u.shape[1]

    def step(i, carry):
        dstate, dA, gradients = carry
        t = length - 1 - i
        u_t, dt_t, B_t, reset_t, factors_t = token((u, dt, B, reset, factors), t)
        before = at(states, jnp.maximum(t - 1, 0), axis=1)
        decay = computed_once(_decay(dt_t, A), in_loop=True)
        kept = computed_once(decay * forget(jnp.where(t > 0, before, state), reset_t), in_loop=True)
        for dy, C in factors_t:
            dstate = dstate + dy[:, None] * C[..., None]
        dstate = computed_once(dstate, in_loop=True)
        dB = jnp.einsum("bne,be->bn", dstate, dt_t * u_t, precision="highest")
        dwrite = add_states(dstate * B_t[..., None])
        dexponent = computed_once(dstate * kept, in_loop=True)
        ddt = add_states(dexponent * A) + dwrite * u_t
        new = (dwrite * dt_t, ddt, dB)
        gradients = jax.tree.map(lambda all, one: put(all, one, t, axis=1), gradients, new)
        return forget(decay * dstate, reset_t), dA + dexponent * dt_t[:, None], gradients

    gradients = jax.tree.map(jnp.zeros_like, (dt, dt, B))
    dstate, dA, (du, ddt, dB) = jax.lax.fori_loop(0, length, step, (dlast, jnp.zeros_like(state), gradients))
    return du, ddt, jnp.sum(dA, axis=0), dB, dstate


@jax.custom_vjp
def _read(states, factors, C):
    """[B, T, E] of states [B, T, N, E] and C [B, T, N]."""
    products = (states[:, :, n] * C[:, :, n, None] for n in range(states.shape[2]))  # of all, XLA would make an array
    return functools.reduce(jnp.add, products)


def _read_fwd(states, factors, C):
    return _read(states, factors, C), (states, C)


def _read_bwd(residuals, dy):
    states, C = residuals
    return None, (dy, C), jnp.einsum("btne,bte->btn", states, dy, precision="highest")


_read.defvjp(_read_fwd, _read_bwd)


def _decay(dt, A):
    """exp(dt A) [B, N, E]."""
    return jnp.exp(dt[:, None] * A)


def add_states(x: jax.Array) -> jax.Array:
    """Sum over N of [..., N, E], term by term: on the CPU a reduction is a call for each token, 4 times slower."""
    return functools.reduce(jnp.add, (x[..., n, :] for n in range(x.shape[-2])))


def token(arrays: Any, t: jax.Array) -> Any:
    """Token t of each array [B, T, ..]."""
    return jax.tree.map(lambda x: at(x, t, axis=1), arrays)


def at(x: jax.Array, i: jax.Array, axis: int = 0) -> jax.Array:
    """Place i of the axis, which is not negative."""
    return jax.lax.dynamic_index_in_dim(x, i, axis, keepdims=False, allow_negative_indices=False)


def put(x: jax.Array, value: jax.Array, i: jax.Array, axis: int = 0) -> jax.Array:
    """x with `value` at place i of the axis, which is not negative. A loop that carries x writes it in place."""
    return jax.lax.dynamic_update_index_in_dim(x, value, i, axis, allow_negative_indices=False)
