"""The MLPs of a mixture of experts, on one device or on the devices of a mesh.

Each device sorts the picks of its tokens by expert and multiplies the sorted rows group by group. Over the mesh axis
`expert`, which splits rows too, each device holds some of the experts: rows go to the device that holds their expert,
and the results go back.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from seqmodels.kernels.grouped_matmul import grouped_matmul
from seqmodels.layers.exchange import Sizes, exchange
from seqmodels.layers.routing import Route, combine, dispatch, permute, send_nowhere, sort_by_expert
from seqmodels.parallel import manual, mesh_axes


def run_experts(
    x: jax.Array, route: Route, gate_up: jax.Array, down: jax.Array, implementation: str | None = None, limit: int = 0
) -> jax.Array:
    """The weighted sum of each token's experts, on the current mesh.

    Args:
        x: [B, T, D].
        route: experts and weights [B, T, K].
        gate_up: [X, D, 2, F].
        down: [X, F, D].
        implementation: of `grouped_matmul`.
        limit: most tokens of a row that an expert takes; 0: no limit.

    Returns:
        [B, T, D] in x's dtype.
    """
    batch, length, width = x.shape
    count, _, _, inner = gate_up.shape
    part = functools.partial(_part, implementation=implementation, limit=limit)
    split = mesh_axes(batch=batch, length=length, expert=count, mlp=inner, embed=width)
    if split is None:
        return part(x, route, gate_up, down)
    axis = {name: split.get(name, ()) for name in ("batch", "length", "expert", "mlp", "embed")}
    tokens = P(axis["batch"], axis["length"], None)
    weights = P(axis["expert"], axis["embed"], None, axis["mlp"]), P(axis["expert"], axis["mlp"], axis["embed"])
    (expert_axis,) = axis["expert"] or (None,)
    together = expert_axis not in axis["batch"]
    return jax.shard_map(
        functools.partial(part, axis=expert_axis, together=together, partial=axis["mlp"], parts=axis["embed"]),
        in_specs=(tokens, tokens, *weights),
        out_specs=tokens,
        axis_names=manual(jax.sharding.get_abstract_mesh().axis_names),
        check_vma=False,
    )(x, route, gate_up, down)


def _part(
    x: jax.Array,
    route: Route,
    gate_up: jax.Array,
    down: jax.Array,
    *,
    implementation: str | None,
    limit: int,
    axis: str | None = None,
    together: bool = False,
    partial: tuple[str, ...] = (),
    parts: tuple[str, ...] = (),
) -> jax.Array:
    """`run_experts` for one device's tokens and experts.

    Args:
        axis: mesh axis that the experts are split over; None: the device holds all.
        together: all devices of that axis have the same tokens.
        partial: mesh axes that the inner channels of the experts are split over.
        parts: mesh axes that the width of the weights is split over. They are gathered here, so that their gradients
            are added up part by part: of whole weights XLA would add up all on every device.
    """
    if parts:
        gate_up = jax.lax.all_gather(gate_up, parts, axis=1, tiled=True)
        down = jax.lax.all_gather(down, parts, axis=2, tiled=True)
    flat, experts, weights = (v.reshape(-1, v.shape[-1]) for v in (x, *route))
    mlps = functools.partial(_mlps, gate_up=gate_up, down=down, implementation=implementation)
    if axis is None:
        y = _own(flat, Route(experts, weights), len(gate_up), mlps)
    elif together:
        first = jax.lax.axis_index(axis) * len(gate_up)
        here = (experts >= first) & (experts < first + len(gate_up))
        y = _own(flat, send_nowhere(Route(experts - first, weights), here, len(gate_up)), len(gate_up), mlps)
        partial = (*partial, axis)
    else:
        block = len(flat) * min(experts.shape[1], len(gate_up))
        if limit:
            block = min(block, x.shape[0] * len(gate_up) * limit)
        y = _exchanged(flat, Route(experts, weights), len(gate_up), mlps, axis, block)
    y = y.astype(x.dtype)
    return (jax.lax.psum(y, partial) if partial else y).reshape(x.shape)


def _own(x: jax.Array, route: Route, count: int, mlps: Any) -> jax.Array:
    """x [M, D] to the sum over the picks [M, K] of `count` experts, which this device holds: [M, D] float32."""
    order = sort_by_expert(route.experts, count)
    return combine(mlps(dispatch(x, order), order.sizes), route.weights, order)


def _exchanged(x: jax.Array, route: Route, count: int, mlps: Any, axis: str, block: int) -> jax.Array:
    """As `_own`, with `count` experts on each device of a mesh axis.

    Nothing is dropped: there is room for the rows of all devices going to one, which is min(N, X / K) times a device's
    own M K rows. Only rows that exist are sent (by `ragged_all_to_all`) and multiplied.

    Args:
        block: most rows that go from one device to another.
    """
    devices = jax.lax.axis_size(axis)
    order = sort_by_expert(route.experts, devices * count)
    sizes = jax.lax.all_gather(order.sizes, axis).reshape(devices, devices, count)  # by sender, receiver, expert
    counts = sizes.sum(2)
    there = Sizes(order.order.size, devices * block, block)
    rows = exchange(dispatch(x, order), counts, there, axis)

    # what came is sorted by sender, and by expert within
    mine = jax.lax.dynamic_index_in_dim(sizes, jax.lax.axis_index(axis), axis=1, keepdims=False)
    piece = jnp.searchsorted(jnp.cumsum(mine), jnp.arange(there.received), side="right")
    here = sort_by_expert(jnp.where(piece < mine.size, piece % count, count), count)
    rows = permute(rows, here.order, here.inverse)
    rows = permute(mlps(rows, here.sizes), here.inverse, here.order)

    back = Sizes(there.received, there.sent, block)
    return combine(exchange(rows, counts.T, back, axis), route.weights, order)


def _mlps(
    rows: jax.Array, sizes: jax.Array, gate_up: jax.Array, down: jax.Array, implementation: str | None
) -> jax.Array:
    """Each expert's SwiGLU on its rows: rows [R, D] sorted by expert, of which `sizes` [X] belong to each."""
    experts, width, _, inner = gate_up.shape
    product = grouped_matmul(rows, gate_up.reshape(experts, width, 2 * inner), sizes, implementation=implementation)
    hidden = jax.nn.silu(product[:, :inner]) * product[:, inner:]
    return grouped_matmul(hidden, down, sizes, implementation=implementation)
