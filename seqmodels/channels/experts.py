"""The MLPs of a mixture of experts, on rows sorted by expert."""

import jax
import jax.numpy as jnp

from seqmodels.layers.routing import Route, combine, dispatch, sort_by_expert


def grouped_matmul(x, w, sizes, *, implementation=None):
    """Stand-in."""
    held = jnp.arange(x.shape[0])[:, None] < sizes.sum()
    x = jnp.where(held, x, 0)
    y = jax.lax.ragged_dot(x, w, sizes, preferred_element_type=jnp.float32).astype(x.dtype)
    return jnp.where(held, y, 0)


def run_experts(
    x: jax.Array, route: Route, gate_up: jax.Array, down: jax.Array, implementation: str | None = None
) -> jax.Array:
    """x [B, T, D] to the weighted sum of each token's experts [B, T, D], in x's dtype.

    Args:
        route: experts and weights [B, T, K].
        gate_up: [X, D, 2, F].
        down: [X, F, D].
    """
    flat, experts, weights = (v.reshape(-1, v.shape[-1]) for v in (x, *route))
    order = sort_by_expert(experts, gate_up.shape[0])
    rows = mlps(dispatch(flat, order), order.sizes, gate_up, down, implementation)
    return combine(rows, weights, order).astype(x.dtype).reshape(x.shape)


def mlps(
    rows: jax.Array, sizes: jax.Array, gate_up: jax.Array, down: jax.Array, implementation: str | None
) -> jax.Array:
    """Each expert's SwiGLU on its rows: rows [R, D], sorted by expert, of which `sizes` [X] belong to each."""
    experts, width, _, inner = gate_up.shape
    product = grouped_matmul(rows, gate_up.reshape(experts, width, 2 * inner), sizes, implementation=implementation)
    return grouped_matmul(
        jax.nn.silu(product[:, :inner]) * product[:, inner:], down, sizes, implementation=implementation
    )
