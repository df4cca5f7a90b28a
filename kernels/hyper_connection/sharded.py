"""A step of hyper-connections with time split over devices, for use inside `jax.shard_map`: each token is by itself."""

from typing import Any

import jax

from seqmodels.kernels import hyper_connection as op


def hyper_connection(*, axis: Any, **arguments: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `kernels.hyper_connection.hyper_connection`, of this device's piece of time."""
    return op.hyper_connection(**arguments)
