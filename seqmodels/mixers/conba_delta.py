"""Interim: the delta rule token by token, until kernels/delta_rule is there."""

import jax
import jax.numpy as jnp

from seqmodels.kernels.segments import forget, resets


def delta_rule(
    q,
    k,
    v,
    a,
    b,
    log_decay=None,
    *,
    read,
    initial_state,
    segment_ids=None,
    initial_segment=None,
    mask=None,
    implementation=None,
):
    def step(S, token):
        q, k, v, a, b, g, reset, real = token
        old = forget(S, reset)
        y = jnp.einsum("bhk,bhkv->bhv", q, old)
        decay = 1 if g is None else jnp.exp(g)[..., None, None]
        new = (
            decay * old
            - a[..., None] * jnp.einsum("bhk,bhkv->bhv", b, old)[..., None, :]
            + k[..., None] * v[..., None, :]
        )
        new = new.astype(S.dtype)
        return (new if real is None else jnp.where(real[:, None, None, None], new, S)), y.astype(v.dtype)

    tokens = jax.tree.map(
        lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, a, b, log_decay, resets(segment_ids, initial_segment, mask), mask)
    )
    S, y = jax.lax.scan(step, initial_state, tokens)
    return jnp.moveaxis(y, 0, 1), S
