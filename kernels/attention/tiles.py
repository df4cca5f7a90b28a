"""Attention's arrays in tiles of consecutive tokens, and which tiles of keys the queries of a tile may see."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqmodels.kernels.arrays import round_up
from seqmodels.kernels.attention.arguments import Side
from seqmodels.kernels.attention.masks import Mask


class Plan(NamedTuple):
    """The tiles of keys that each tile of queries visits.

    Attributes:
        order: [N, M] int32: first the tiles of keys that a tile of queries visits, in order, then the others.
        visits: [N] int32: how many it visits.
    """

    order: jax.Array | np.ndarray
    visits: jax.Array | np.ndarray


def plan(mask: Mask, queries: Side, keys: Side) -> Plan:
    """Which tiles of keys [M, B, C] the tiles of queries [N, B, R] visit.

    It is known before compilation, as arrays of numpy, if positions are and there are no documents and no empty slots.
    Otherwise it follows from the ranges of positions and documents in each tile. A tile that some row of the batch
    needs is visited.
    """
    (i, segment), (j, key_segment) = [(_range(x.position), _range(x.segment)) for x in (queries, keys)]
    most = queries.position.shape[-1]
    needed = mask.touches(tuple(x[:, None] for x in i), tuple(x[None] for x in j), most)
    if segment is not None and key_segment is not None:
        needed = needed & (segment[0][:, None] <= key_segment[1]) & (segment[1][:, None] >= key_segment[0])
    if keys.real is not None:
        needed = needed & keys.real.any(-1)
    needed = needed.any(-1)  # over the batch
    if isinstance(needed, np.ndarray):
        return Plan(np.argsort(~needed, axis=1, kind="stable").astype(np.int32), needed.sum(1).astype(np.int32))
    return Plan(jnp.argsort(~needed, axis=1, stable=True).astype(jnp.int32), needed.sum(1, dtype=jnp.int32))


def _range(x: Any) -> Any:
    """The first and the last number in each tile, [N, B]."""
    return None if x is None else (x.min(-1), x.max(-1))


def side(tokens: Side, size: int) -> Side:
    """Tokens in tiles, [N, B or 1, size]. Those that fill the last tile are not real, and repeat the last token's
    position and document, so that they widen no range."""
    length = tokens.position.shape[1]
    real = np.ones((1, length), bool) if tokens.real is None and length % size else tokens.real
    position, segment = (cut(x, size, 1, "edge") for x in (tokens.position, tokens.segment))
    return Side(position, segment, cut(real, size, 1))


def grouped(x: jax.Array | None, kv_heads: int, size: int) -> Any:
    """Numbers of query heads [B, T, H, ...] in tiles, [N, B, Hkv, H / Hkv, size, ...]. None stays None."""
    if x is None:
        return None
    batch, length, heads = x.shape[:3]
    x = x.reshape(batch, length, kv_heads, heads // kv_heads, *x.shape[3:])
    return cut(jnp.moveaxis(x, 1, 3), size, 3)


def ungrouped(x: jax.Array | None, length: int) -> Any:
    """Undo `grouped`: [N, B, Hkv, H / Hkv, size, ...] to [B, T, H, ...], T = length."""
    if x is None:
        return None
    x = jnp.moveaxis(joined(x, length, 3), 3, 1)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def cut(x: Any, size: int, axis: int, mode: str = "constant") -> Any:
    """Split an axis of x into tiles, which a new first axis counts; the last one is padded. None stays None."""
    if x is None:
        return None
    numbers: Any = np if isinstance(x, np.ndarray) else jnp
    more = round_up(x.shape[axis], size) - x.shape[axis]
    if more:
        x = numbers.pad(x, [(0, more if n == axis else 0) for n in range(x.ndim)], mode)
    return numbers.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)


def joined(x: jax.Array, length: int, axis: int) -> jax.Array:
    """Undo `cut`: tiles [N, ...] to an array whose `axis` has `length` tokens."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)
