"""Changes of shape for arrays that go into kernels and come out of them."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from seqmodels.kernels import dispatch


def pad(x: jax.Array | None, sizes: Mapping[int, int], fill: float = 0) -> Any:
    """Pad axes of `x` at their end with the value `fill`.

    Args:
        x: None is returned unchanged.
        sizes: maps each axis to its new size, which is at least the old one. Negative axes count from the end.
    """
    if x is None:
        return None
    widths = [(0, 0)] * x.ndim
    for axis, size in sizes.items():
        widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths, constant_values=fill) if any(more for _, more in widths) else x


def computed_once(arrays: Any, in_loop: bool = False) -> Any:
    """On a CPU, keep XLA from computing `arrays` anew in each operation that needs them; elsewhere it decides better.

    XLA keeps to this in training steps, where `seqmodels.training.xla` asks for it.

    Args:
        in_loop: whether this is in the body of a loop over tokens. XLA of jax 0.12 takes such barriers into its
            kernels, and then refuses them ("unhandled opcode"): there it decides.
    """
    wanted = dispatch.platforms() == ("cpu",) and not (in_loop and jax.__version_info__ >= (0, 12))
    return jax.lax.optimization_barrier(arrays) if wanted else arrays


def round_up(x: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `x`."""
    return -(-x // multiple) * multiple


def expand_to(x: jax.Array, ndim: int) -> jax.Array:
    """Append axes of size one until `x` has `ndim` axes, so that a mask [B, T] broadcasts over [B, T, ...]."""
    return x.reshape(*x.shape, *[1] * (ndim - x.ndim))


def zero_padding(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Replace `x` [B, T, ...] by zeros where `mask` [B, T] is False, even where `x` is NaN."""
    return x if mask is None else jnp.where(expand_to(mask, x.ndim), x, 0)


def shifted(first: jax.Array, x: jax.Array) -> jax.Array:
    """x [B, T, ...] of S tokens earlier, in the dtype of `first` [B, S, ...], which are the tokens before x.

    It is not a slice of both together: with rows and time on several devices, XLA (jax 0.10, 0.11) computes wrong
    gradients of that.
    """
    kept = x[:, : max(x.shape[1] - first.shape[1], 0)]
    return jnp.concatenate([first, kept.astype(first.dtype)], axis=1)[:, : x.shape[1]]


def split_time(tree: Any, size: int, *, time_first: bool = False) -> Any:
    """Split arrays [B, T, ...] into pieces of time for `lax.scan`. The last piece is padded with zeros at its end.

    Returns:
        Arrays [T / size, B, size, ...], or [T / size, size, B, ...] with `time_first`; T / size is rounded up.
    """

    def split(x):
        whole = round_up(x.shape[1], size)
        if time_first:
            return pad(jnp.moveaxis(x, 1, 0), {0: whole}).reshape(-1, size, x.shape[0], *x.shape[2:])
        return jnp.moveaxis(pad(x, {1: whole}).reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    return jax.tree.map(split, tree)


def join_time(x: jax.Array, length: int, *, time_first: bool = False) -> jax.Array:
    """Join the pieces that `split_time` returns to an array [B, T, ...] with T = `length`."""
    if time_first:
        return jnp.moveaxis(x.reshape(-1, *x.shape[2:])[:length], 0, 1)
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def mapped(kernel: Callable[..., Any], **static: Any) -> Callable[[Mapping[str, Any]], Any]:
    """Wrap `kernel` as a function of one dict, which maps the names of its arguments to arrays.

    Under `jax.vmap` the kernel runs once for each row, because Pallas's own rule for vmap does not support these
    kernels.
    """
    return jax.custom_batching.sequential_vmap(lambda arrays: kernel(**arrays, **static))
