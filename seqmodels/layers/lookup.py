"""Rows of a table of the vocabulary, on a mesh that splits the table: tokens and rows travel, the table stays."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from seqmodels.parallel import manual, mesh_axes

Axes = tuple[str, ...]


class Split(NamedTuple):
    """Axes of the mesh that rows and time of a batch, and the table's two axes, are split over."""

    batch: Axes
    length: Axes
    vocab: Axes
    embed: Axes

    @property
    def used(self) -> set[str]:
        return {*self.batch, *self.length, *self.vocab, *self.embed}


def lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
    """table [V, D] at ids [B, T] int32: [B, T, D]. An id outside of the table gives NaN; negative ones count from
    the end, as in NumPy.

    Where the mesh splits the table, the devices that share its columns exchange their tokens' ids, look up all of them
    in their own columns, and send each device its tokens' columns. Devices that share its rows add what they found. So
    a device receives B T D numbers, and never the table. The gradient takes the same way back.
    """
    split = mesh_axes(batch=ids.shape[0], length=ids.shape[1], vocab=table.shape[0], embed=table.shape[1])
    if not split or not set(split.get("embed", ())) <= set(split.get("batch", ())):
        return jnp.take(table, ids, axis=0)
    axes = Split(*(split.get(name, ()) for name in Split._fields))
    return _lookup(axes, table, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(axes: Split, table: jax.Array, ids: jax.Array) -> jax.Array:
    rows, _, tokens, whole = _specs(axes)

    def find(table, ids):
        place, known, own = _places(axes, table, ids)
        found = jnp.where(own[..., None], table[place], jnp.where(known[..., None], 0, jnp.nan).astype(table.dtype))
        if axes.vocab:
            found = jax.lax.psum(found, axes.vocab)
        return jax.lax.all_to_all(found, axes.embed, 0, 2, tiled=True) if axes.embed else found

    return jax.shard_map(find, in_specs=(rows, tokens), out_specs=whole, axis_names=manual(axes.used), check_vma=False)(
        table, ids
    )


def _forward(axes, table, ids):
    return _lookup(axes, table, ids), (jnp.zeros((0,), table.dtype), table.shape, ids)


def _backward(axes, residuals, gradient):
    empty, shape, ids = residuals
    rows, _, tokens, whole = _specs(axes)
    mesh = jax.sharding.get_abstract_mesh()
    devices = (math.prod(mesh.shape[axis] for axis in split) for split in (axes.vocab, axes.embed))
    local = [size // count for size, count in zip(shape, devices, strict=True)]

    def add(gradient, ids):
        table = jnp.zeros(local, empty.dtype)
        if axes.embed:
            gradient = jax.lax.all_to_all(gradient, axes.embed, 2, 0, tiled=True)
        place, _, own = _places(axes, table, ids)
        table = table.at[place].add(jnp.where(own[..., None], gradient, 0).astype(table.dtype))
        others = tuple(axis for axis in (*axes.batch, *axes.length) if axis not in axes.embed)
        return jax.lax.psum(table, others) if others else table

    return jax.shard_map(add, in_specs=(whole, tokens), out_specs=rows, axis_names=manual(axes.used), check_vma=False)(
        gradient, ids
    ), None


_lookup.defvjp(_forward, _backward)


def _specs(axes: Split) -> tuple[PartitionSpec, ...]:
    """Of the table, of nothing split, of tokens [B, T], and of rows [B, T, D]."""
    batch, length, vocab, embed = (split or None for split in axes)
    return (
        PartitionSpec(vocab, embed),
        PartitionSpec(),
        PartitionSpec(batch, length),
        PartitionSpec(batch, length, None),
    )


def _places(axes, table, ids):
    """For the ids of all devices that share the table's columns: the row here, whether there is such a row in the
    whole table, and whether it is here."""
    if axes.embed:
        ids = jax.lax.all_gather(ids, axes.embed, tiled=True)
    rows = table.shape[0]
    size, first = rows, 0
    if axes.vocab:
        size, first = rows * jax.lax.axis_size(axes.vocab), rows * jax.lax.axis_index(axes.vocab)
    ids = jnp.where(ids < 0, ids + size, ids)
    known, place = (ids >= 0) & (ids < size), ids - first
    own = known & (place >= 0) & (place < rows)
    return jnp.clip(place, 0, rows - 1), known, own
