"""Keeps what is not finite in one document from the others, whoever computes attention."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from seqmodels.kernels.attention.arguments import Inputs, Tokens
from seqmodels.kernels.finite import finite_or_zero, not_finite, spoil

LARGEST = 1e18  # queries, keys and gates of packed rows from here on count as infinite: their products overflow

Attend = Callable[[Inputs, Tokens], jax.Array]
Reach = Callable[[jax.Array, int, Tokens], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def apart(attend: Attend, reach: Reach, inputs: Inputs, tokens: Tokens) -> jax.Array:
    """As `attend`, and what is not finite in one document does not reach the others.

    Weights of unseen keys are zero, but the products multiply by them. So queries, keys, values, gates and the gradient
    of the output become finite before, whoever multiplies them. What sees a key that was not finite is NaN.

    Args:
        attend: computes o [B, T, H, d].
        reach: `reach(bad, T, tokens)` is [B, T] bool, whether a query sees a key that is `bad` [B, S].
    """
    q, k, v, _, gates, key_gates = inputs
    bad, spoilt = not_finite(k, LARGEST) | not_finite(v), not_finite(q, LARGEST)
    if gates is not None and key_gates is not None:
        bad, spoilt = bad | not_finite(key_gates, LARGEST), spoilt | not_finite(gates, LARGEST)
        gates, key_gates = finite_or_zero(gates, LARGEST), finite_or_zero(key_gates, LARGEST)
    spoilt |= reach(bad, q.shape[1], tokens)
    q, k, v = finite_or_zero(q, LARGEST), finite_or_zero(k, LARGEST), finite_or_zero(v)
    return spoil(attend(inputs._replace(q=q, k=k, v=v, gates=gates, key_gates=key_gates), tokens), spoilt)


def _apart_fwd(attend, reach, inputs, tokens):
    return jax.vjp(lambda inputs: apart.fun(attend, reach, inputs, tokens), inputs)


def _apart_bwd(attend, reach, pull, do):
    (gradients,) = pull(finite_or_zero(do))
    return gradients._replace(q=spoil(gradients.q, not_finite(do))), None


apart.defvjp(_apart_fwd, _apart_bwd)


def hide(inputs: Inputs, seen: jax.Array | None) -> Inputs:
    """Zeros in place of the keys that no query sees, where `seen` [B, S] is False: they must not reach a gradient."""
    if seen is None:
        return inputs
    k, v = (jnp.where(seen[..., None, None], x, 0) for x in (inputs.k, inputs.v))
    key_gates = None if inputs.key_gates is None else jnp.where(seen[..., None], inputs.key_gates, 0)
    return inputs._replace(k=k, v=v, key_gates=key_gates)
