"""The kernels on the devices of the current mesh: each device runs them on its rows, channels and piece of time.

`jax.set_mesh` sets the mesh. `axes` in the kernel's module names the logical axes of the kernel's arrays. Flax's
logical axis rules map them to the mesh axes that they are split over. Each device then runs the kernel on its part,
inside one shard_map, because the compiler cannot split a Pallas kernel itself. Without a mesh of several devices, or
without rules, the kernel is called directly.

Every operation of `seqmodels.kernels.OPERATIONS` is a function of this module, with the arguments of the kernel:

    from seqmodels.parallel import selective_scan
"""

import functools
import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
from flax import linen as nn
from jax.sharding import AxisType, PartitionSpec

from seqmodels.kernels import OPERATIONS
from seqmodels.kernels.axes import Axes, Layout

# The mesh axis whose devices add up gradients only after their last micro-batch (seqmodels/training/micro_batches.py).
APART = "data"

if TYPE_CHECKING:  # the functions that `__getattr__` returns have the signatures of the kernels
    from seqmodels.kernels.attention import attention as attention
    from seqmodels.kernels.attn_residual import attn_residual as attn_residual
    from seqmodels.kernels.delta_rule import delta_rule as delta_rule
    from seqmodels.kernels.grouped_matmul import grouped_matmul as grouped_matmul
    from seqmodels.kernels.hyper_connection import hyper_connection as hyper_connection
    from seqmodels.kernels.linear_attention import linear_attention as linear_attention
    from seqmodels.kernels.linear_scan import linear_scan as linear_scan
    from seqmodels.kernels.long_conv import long_conv as long_conv
    from seqmodels.kernels.selective_scan import selective_scan as selective_scan
    from seqmodels.kernels.short_conv import short_conv as short_conv


def __getattr__(name: str) -> Callable[..., Any]:
    """The operation of that name on the current mesh."""
    if name not in OPERATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return on_mesh(name)


@functools.cache
def on_mesh(operation: str) -> Callable[..., Any]:
    """The function of the operation's kernel, which runs it on the current mesh."""
    kernel = getattr(OPERATIONS[operation], operation)
    signature = inspect.signature(kernel)

    @functools.wraps(kernel)
    def call(*args, **kwargs):
        return run(operation, **signature.bind(*args, **kwargs).arguments)

    return call


def run(operation: str, **arguments: Any) -> Any:
    """Run a kernel on the current mesh.

    Args:
        operation: a name of `seqmodels.kernels.OPERATIONS`.
        **arguments: of the kernel, by name: arrays, and options, which are static.
    """
    module = OPERATIONS[operation]
    layout = module.axes(**arguments)
    given = {name: x for name, x in arguments.items() if name in layout.arrays and x is not None}
    split = mesh_axes(layout.together, **axis_sizes(layout, given))
    if split is None:
        return getattr(module, operation)(**arguments)
    options = {name: x for name, x in arguments.items() if name not in given}
    if "length" in split:
        module, options = importlib.import_module(f"{module.__name__}.sharded"), dict(options, axis=split["length"])
    kernel = getattr(module, operation)

    def spec(axes: Axes) -> PartitionSpec:
        return PartitionSpec(*(split.get(name) for name in axes))

    def part(arrays):
        return kernel(**arrays, **options)

    inputs = {name: spec(layout.arrays[name]) for name in given}
    outputs = tuple(spec(axes) for axes in layout.results)
    out_specs = outputs if len(outputs) > 1 else outputs[0]  # a kernel returns a single result without a tuple
    split_over = manual(jax.sharding.get_abstract_mesh().axis_names)
    return jax.shard_map(part, in_specs=(inputs,), out_specs=out_specs, axis_names=split_over, check_vma=False)(given)


def axis_sizes(layout: Layout, arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """Size of each logical axis of the arrays."""
    sizes: dict[str, int] = {}
    for name, x in arrays.items():
        # not strict: the kernel reports shapes that do not fit
        sizes |= {axis: size for axis, size in zip(layout.arrays[name], x.shape, strict=False) if axis is not None}
    return sizes


def mesh_axes(together: tuple[str, ...] = (), **sizes: int) -> dict[str | None, tuple[str, ...]] | None:
    """Mesh axes that each logical axis is split over.

    A logical axis whose size is not a multiple of the number of devices is left out, and stays whole.

    Args:
        together: logical axes that are split in the same way or not at all. This does not apply to axes of size 1.
        **sizes: size of each logical axis.

    Returns:
        None if there is nothing to split: no mesh of several devices, no rules, or already inside a shard_map.
    """
    mesh, rules = jax.sharding.get_abstract_mesh(), dict(nn.get_logical_axis_rules())
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    shards = {name: count for name, count, kind in axes if kind is AxisType.Auto and count > 1}
    if not shards or not rules:
        return None
    split: dict[str | None, tuple[str, ...]] = {}
    for name, size in sizes.items():
        rule = rules.get(name) or ()
        rule = tuple(axis for axis in ((rule,) if isinstance(rule, str) else rule) if axis in shards)
        if rule and size % math.prod(shards[axis] for axis in rule) == 0:
            split[name] = rule
    if len({split.get(name) for name in together if sizes[name] > 1}) > 1:
        split = {name: rule for name, rule in split.items() if name not in together}
    return split


def manual(axes: Iterable[str]) -> set[str]:
    """`axis_names` of a shard_map that splits arrays over these mesh axes and leaves the others to the compiler.

    Where all others have one device, they are among them: without any other axis the shard_map also runs where nothing
    is compiled. Axes of a shard_map around it are not. Elsewhere axes of one device are left out: XLA of jax 0.11
    aborts where those of nested shard_maps, one behind the other, are not in the order of the mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = set(mesh.axis_names) - set(mesh.manual_axes)
    wanted = set(axes) & free
    return wanted if any(mesh.shape[axis] > 1 for axis in free - wanted) else free


def mean_over_rows(x: Any) -> Any:
    """The mean of arrays over the devices of APART, where each goes through micro-batches of its own; elsewhere x.

    What branches report is a mean over tokens. It is the one over all rows, if it is a sum over the device's tokens,
    divided by the mean of their number.
    """
    return jax.lax.pmean(x, APART) if APART in jax.sharding.get_abstract_mesh().manual_axes else x
