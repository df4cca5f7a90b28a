"""The kernels of recurrent mixers on the devices of the current mesh: rows and channels apart, time in pieces.

The mesh is that of `jax.set_mesh`, and Flax's logical axis rules say which of its axes the rows ("batch"), the tokens
("length") and the channels ("inner") of a kernel's arrays are split over. Each device then runs the kernel on its part,
inside one shard_map: the compiler cannot split a Pallas kernel by itself. Without a mesh of several devices, or without
rules, the kernel is called as it is.
"""

import math

import jax
from flax import linen as nn
from jax.sharding import AxisType, PartitionSpec

from seqmodels.kernels.linear_attention import linear_attention as attend
from seqmodels.kernels.linear_attention import sharded as attend_in_pieces
from seqmodels.kernels.selective_scan import selective_scan as scan
from seqmodels.kernels.selective_scan import sharded as scan_in_pieces
from seqmodels.kernels.short_conv import sharded as conv_in_pieces
from seqmodels.kernels.short_conv import short_conv as conv

TOKENS = ("batch", "length")
CHANNELS = (*TOKENS, "inner")
HEADS = (*TOKENS, "heads", None)


def selective_scan(u, dt, A, B, C, *, dt_softplus=True, implementation=None, **optional):
    """`kernels.selective_scan.selective_scan` on the current mesh."""
    group = (None,) * (u.ndim - 3)
    wide, narrow = (*TOKENS, *group, "inner"), (*TOKENS, *group, None)
    state = ("batch", *group, "inner", None)
    names = dict(u=wide, dt=wide, A=(*group, "inner", None), B=narrow, C=narrow)
    names |= dict(D=("inner",), z=CHANNELS, dt_bias=(*group, "inner"), weights=(*TOKENS, None, "inner"))
    options = dict(dt_softplus=dt_softplus, implementation=implementation)
    arrays = dict(u=u, dt=dt, A=A, B=B, C=C, **optional)
    axes = mesh_axes(batch=u.shape[0], length=u.shape[1], inner=u.shape[-1])
    return _run(scan, scan_in_pieces.selective_scan, arrays, names, (CHANNELS, state), axes, options)


def short_conv(x, weight, bias=None, *, activation=None, implementation=None, **optional):
    """`kernels.short_conv.short_conv` on the current mesh."""
    state = ("batch", None, "inner")
    names = dict(x=CHANNELS, weight=(None, "inner"), bias=("inner",))
    options = dict(activation=activation, implementation=implementation)
    arrays = dict(x=x, weight=weight, bias=bias, **optional)
    axes = mesh_axes(**dict(zip(CHANNELS, x.shape, strict=True)))
    return _run(conv, conv_in_pieces.short_conv, arrays, names, (CHANNELS, state), axes, options)


def linear_attention(
    q,
    k,
    v,
    log_decay=None,
    *,
    scale=1.0,
    read="inclusive",
    normalise=False,
    chunk=None,
    implementation=None,
    **optional,
):
    """`kernels.linear_attention.linear_attention` on the current mesh; `optional` are its other arrays."""
    heads, groups = v.shape[2], k.shape[2]
    axes = mesh_axes(batch=v.shape[0], length=v.shape[1], heads=heads, kv_heads=groups)
    if axes is not None and groups > 1 and axes.get("heads") != axes.get("kv_heads"):
        axes = {name: axis for name, axis in axes.items() if "heads" not in name}  # heads stay with their keys
    keys = (*TOKENS, "kv_heads", None)
    decay = {None: (), 1: ("heads",), 3: HEADS[:3], 4: HEADS}[None if log_decay is None else log_decay.ndim]
    names = dict(q=keys, k=keys, v=HEADS, log_decay=decay, bonus=("heads", None))
    options = dict(scale=scale, read=read, normalise=normalise, chunk=chunk, implementation=implementation)
    arrays = dict(q=q, k=k, v=v, log_decay=log_decay, **optional)
    state = ("batch", "heads", None, None)
    return _run(attend, attend_in_pieces.linear_attention, arrays, names, (HEADS, state), axes, options)


def mesh_axes(**sizes: int) -> dict[str, tuple[str, ...]] | None:
    """Mesh axes that each logical axis is split over; one that its size does not divide into is left out, and whole.

    Args:
        **sizes: size of each logical axis.

    Returns:
        None where there is nothing to split: no mesh of several devices, no rules, or already inside a shard_map.
    """
    mesh, rules = jax.sharding.get_abstract_mesh(), dict(nn.get_logical_axis_rules())
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    shards = {name: count for name, count, kind in axes if kind is AxisType.Auto and count > 1}
    if not shards or not rules:
        return None
    split = {}
    for name, size in sizes.items():
        rule = rules.get(name) or ()
        rule = tuple(axis for axis in ((rule,) if isinstance(rule, str) else rule) if axis in shards)
        if rule and size % math.prod(shards[axis] for axis in rule) == 0:
            split[name] = rule
    return split


def _run(whole, in_pieces, arrays, names, outputs, axes, options):
    """The kernel on each device's part of the arrays. `names`: logical axes of each; `outputs`: of y and the state."""
    if axes is None:
        return whole(**arrays, **options)
    names |= dict(initial_state=outputs[1], segment_ids=TOKENS, mask=TOKENS, initial_segment=("batch",))
    arrays = {name: x for name, x in arrays.items() if x is not None}

    def spec(names):
        return PartitionSpec(*(axes.get(name) for name in names))

    def part(arrays):
        if "length" in axes:
            return in_pieces(**arrays, axis=axes["length"], **options)
        return whole(**arrays, **options)

    specs = {name: spec(names[name]) for name in arrays}
    outputs = tuple(spec(names) for names in outputs)
    return jax.shard_map(part, in_specs=(specs,), out_specs=outputs, check_vma=False)(arrays)
