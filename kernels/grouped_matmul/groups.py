"""Where the rows of each group are."""

import jax
import jax.numpy as jnp


def bounds(sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first row of each group, and the row after its last, [X] int32 each."""
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    return ends - sizes, ends


def real_rows(x: jax.Array, sizes: jax.Array) -> jax.Array:
    """x [M, ...] with zeros in the rows that belong to no group, those beyond the sum of the sizes."""
    return jnp.where(jnp.arange(x.shape[0])[:, None] < jnp.sum(sizes, dtype=jnp.int32), x, 0)
