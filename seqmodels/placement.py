"""Where arrays lie on a mesh: from their logical axes and rules to a PartitionSpec. `seqmodels.training.sharding` has
the rules."""

import math
from collections.abc import Mapping, Sequence

from jax.sharding import PartitionSpec

Rules = Sequence[tuple[str, str | tuple[str, ...] | None]]  # logical axis, and the mesh axes that split it
Names = tuple[str | None, ...]

GATHERED = "fsdp"  # the mesh axis that splits parameters which every device needs whole, one layer at a time

LARGE = 2**16  # numbers: a smaller parameter is rather held by every device than sent


def spec_of(names: Names, shape: tuple[int, ...], mesh: Mapping[str, int], rules: Rules) -> PartitionSpec:
    """PartitionSpec of an array with these logical axis names.

    It follows the rules, but uses each axis of the mesh once, and only if it divides the axis of the array.

    Args:
        mesh: size of each of its axes.
    """
    splits, used = dict[str | None, str | tuple[str, ...] | None](rules), set[str]()
    entries: list[str | tuple[str, ...] | None] = []
    for name, size in zip(names, shape, strict=True):
        axes = tuple(axis for axis in axes_of(splits.get(name)) if axis not in used)
        if axes and size % math.prod(mesh[axis] for axis in axes) == 0:
            used.update(axes)
            entries.append(axes if len(axes) > 1 else axes[0])
        else:
            entries.append(None)
    return PartitionSpec(*entries)


def parameter_spec(names: Names, shape: tuple[int, ...], mesh: Mapping[str, int], rules: Rules) -> PartitionSpec:
    """PartitionSpec of a parameter, and of what the optimizer keeps for it.

    It is `spec_of`. But a large parameter that has no axis for `fsdp` is split over its largest axis that divides: else
    each device would hold all of it and of the optimizer's moments, and gather what others computed.
    """
    entries = list(spec_of(names, shape, mesh, rules))
    count = mesh[GATHERED]
    if count == 1 or math.prod(shape) < LARGE or GATHERED in entries:
        return PartitionSpec(*entries)
    axes = [axes_of(entry) for entry in entries]
    parts = [math.prod(mesh[axis] for axis in each) * count for each in axes]
    able = [i for i, size in enumerate(shape) if size % parts[i] == 0 and names[i] not in ("layers", "expert")]
    if able:
        largest = max(able, key=lambda i: shape[i])
        entries[largest] = (*axes[largest], GATHERED) if axes[largest] else GATHERED
    return PartitionSpec(*entries)


def axes_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of an entry of a PartitionSpec or of a rule."""
    return (entry,) if isinstance(entry, str) else entry or ()
