"""Shapes of arrays on their way into kernels and out of them."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


def pad(x: jax.Array | None, sizes: Mapping[int, int], fill: float = 0) -> jax.Array | None:
    """`x` with `fill` at the end of axes.

    Args:
        x: None is returned as it is.
        sizes: for each axis to be padded its new size, at least the old one; -1 is the last axis, and so on.
    """
    if x is None:
        return None
    widths = [(0, 0)] * x.ndim
    for axis, size in sizes.items():
        widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths, constant_values=fill) if any(more for _, more in widths) else x


def round_up(x: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not less than `x`."""
    return -(-x // multiple) * multiple


def expand_to(x: jax.Array, ndim: int) -> jax.Array:
    """`x` with axes of size one at its end, `ndim` in all: a mask [B, T] as it is broadcast over [B, T, ...]."""
    return x.reshape(*x.shape, *[1] * (ndim - x.ndim))


def zero_padding(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """`x` [B, T, ...] with zeros where `mask` [B, T] is False, whatever is there, NaN even."""
    return x if mask is None else jnp.where(expand_to(mask, x.ndim), x, 0)


def split_time(tree: Any, size: int, *, time_first: bool = False) -> Any:
    """Arrays [B, T, ...] in pieces of time for `lax.scan`, the last of which ends in zeros.

    Returns:
        [T / size, B, size, ...] each, or, with `time_first`, [T / size, size, B, ...].
    """

    def split(x):
        whole = round_up(x.shape[1], size)
        if time_first:
            return pad(jnp.moveaxis(x, 1, 0), {0: whole}).reshape(-1, size, x.shape[0], *x.shape[2:])
        return jnp.moveaxis(pad(x, {1: whole}).reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    return jax.tree.map(split, tree)


def join_time(x: jax.Array, length: int, *, time_first: bool = False) -> jax.Array:
    """[B, T, ...] with T = `length`, of what `split_time` gives."""
    if time_first:
        return jnp.moveaxis(x.reshape(-1, *x.shape[2:])[:length], 0, 1)
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def mapped(kernel: Callable[..., Any], **static: Any) -> Callable[[Mapping[str, Any]], Any]:
    """`kernel` as a function of one dict of arrays, by the names of its arguments.

    `jax.vmap` runs it once for each row, since Pallas's own rule for vmap does not serve these kernels.
    """
    return jax.custom_batching.sequential_vmap(lambda arrays: kernel(**arrays, **static))
