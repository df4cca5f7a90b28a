"""A source of Attention Residuals with time split over devices, inside `jax.shard_map`: each token is by itself."""

from typing import Any

import jax

from seqmodels.kernels import attn_residual as op


def attn_residual(*, axis: Any, **arguments: Any) -> tuple[jax.Array, ...]:
    """As `kernels.attn_residual.attn_residual`, of this device's piece of time."""
    return op.attn_residual(**arguments)
