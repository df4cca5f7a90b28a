"""Exchange of rows between the devices of a mesh axis, each device sending its own number of rows to each other one.

Inside a shard_map. `jax.lax.ragged_all_to_all` does it on GPUs and TPUs. XLA has no such operation for CPUs; there an
all-to-all of blocks that are padded to the same size gives the same result.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqmodels.kernels.dispatch import platforms


class Sizes(NamedTuple):
    """Static sizes of an exchange.

    Attributes:
        sent: rows of a device's array before it.
        received: rows of a device's array after it; room for all that the device can get.
        block: most rows that one device sends to another.
    """

    sent: int
    received: int
    block: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def exchange(rows: jax.Array, counts: jax.Array, sizes: Sizes, axis: str) -> jax.Array:
    """Send rows to other devices of a mesh axis. The gradient is the exchange in the other direction.

    Args:
        rows: [sizes.sent, D], sorted by the device that they go to. Rows behind these go nowhere.
        counts: [N, N] int32, the rows that each device (first axis) sends to each; the same on all of the N devices.
        axis: name of the mesh axis.

    Returns:
        [sizes.received, D]: what this device gets, sorted by the device it comes from, and zeros behind it. With
        `counts.T` and the sizes exchanged it goes back to where it was.
    """
    method = padded if "cpu" in platforms() else ragged
    return method(rows, counts, sizes, axis)


def _exchange_backward(sizes, axis, counts, gradient):
    back = Sizes(sizes.received, sizes.sent, sizes.block)
    return exchange(gradient, counts.T, back, axis), None


exchange.defvjp(lambda rows, counts, sizes, axis: (exchange(rows, counts, sizes, axis), counts), _exchange_backward)


def ragged(rows: jax.Array, counts: jax.Array, sizes: Sizes, axis: str) -> jax.Array:
    """`exchange` by `jax.lax.ragged_all_to_all`, which sends only the rows that there are."""
    me = jax.lax.axis_index(axis)
    sent, received = counts[me], counts[:, me]
    return jax.lax.ragged_all_to_all(
        rows,
        jnp.zeros((sizes.received, rows.shape[1]), rows.dtype),
        starts(sent),
        sent,
        (jnp.cumsum(counts, axis=0) - counts)[me],  # where this device's rows begin in each receiver's array
        received,
        axis_name=axis,
    )


def padded(rows: jax.Array, counts: jax.Array, sizes: Sizes, axis: str) -> jax.Array:
    """`exchange` by `jax.lax.all_to_all`, which sends `sizes.block` rows from every device to every device."""
    me = jax.lax.axis_index(axis)
    sent, received = counts[me], counts[:, me]
    place = jnp.arange(sizes.block)
    blocks = rows[jnp.minimum(starts(sent)[:, None] + place, sizes.sent - 1)]
    blocks = jnp.where((place < sent[:, None])[..., None], blocks, 0)
    blocks = jax.lax.all_to_all(blocks, axis, 0, 0)  # [N, block, D], by sender
    row = jnp.arange(sizes.received)
    sender = jnp.minimum(jnp.searchsorted(jnp.cumsum(received), row, side="right"), len(counts) - 1)
    within = jnp.minimum(row - starts(received)[sender], sizes.block - 1)
    return jnp.where((row < received.sum())[:, None], blocks[sender, within], 0)


def starts(sizes: jax.Array) -> jax.Array:
    """[N] where each of N pieces of these sizes begins, one behind the other."""
    return jnp.cumsum(sizes) - sizes
