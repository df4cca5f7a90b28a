"""The device mesh, and where every array lies on it.

Parameters and activations name their axes logically ("embed", "heads", "batch", ...). RULES says which axis of the mesh
each of them is split over. An axis whose size does not divide stays whole, so every model runs on every mesh.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from seqmodels import placement
from seqmodels.errors import UserError
from seqmodels.placement import axes_of

# From the axis whose neighbours are farthest apart to that whose are nearest: the last ones are inside a host of
# several GPUs. Experts send less than fsdp does, which gathers every parameter in every layer.
AXES = ("data", "expert", "fsdp", "tensor", "sequence")

BATCH_AXES = ("data", "expert", "fsdp")  # rows are split over all of these: experts too take tokens of different rows

RULES = (
    ("batch", BATCH_AXES),
    ("length", "sequence"),
    ("embed", "fsdp"),
    ("inner", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("expert", "expert"),
    ("head_dim", None),
    ("state", None),
    ("rank", None),
    ("conv", None),
    ("layers", None),
    ("channels", None),
    ("outputs", None),
)


def make_mesh(config: ConfigDict, devices: list[jax.Device] | None = None) -> Mesh:
    """Mesh with the five AXES, of the sizes in `config.mesh`; data=-1 takes the devices that the others leave.

    Raises: UserError where more devices are asked for than there are, or rows or tokens do not divide.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: config.mesh[axis] for axis in AXES}
    asked = math.prod(size for size in sizes.values() if size != -1)
    if asked > len(devices):
        shape = ", ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)
        raise UserError(f"config.mesh asks for {asked} devices ({shape}); there are {len(devices)}: lower an axis")
    if sizes["data"] == -1:
        sizes["data"] = len(devices) // asked
    _check_divides(config, sizes)
    count = math.prod(sizes.values())
    if jax.process_count() > 1 and count < len(devices):
        raise UserError(
            f"config.mesh takes {count} of {len(devices)} devices; a job of several processes needs them all"
        )
    return Mesh(_placed(sizes, devices[:count]), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _placed(sizes: dict[str, int], devices: list[jax.Device]) -> np.ndarray:
    """Devices in the shape of the mesh, neighbours near each other. Only `data` goes from one TPU slice to another.

    Raises: UserError where data does not divide among the slices.
    """
    shape = tuple(sizes.values())
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform != "tpu":
        return mesh_utils.create_device_mesh(shape, devices)
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if sizes["data"] % slices:
        raise UserError(f"config.mesh.data={sizes['data']}: must be a multiple of the {slices} slices of TPUs")
    inside, between = (sizes["data"] // slices, *shape[1:]), (slices, *(1,) * (len(shape) - 1))
    return mesh_utils.create_hybrid_device_mesh(inside, between, devices, allow_split_physical_axes=True)


def flat_mesh() -> Mesh:
    """All devices on the axis fsdp, which splits parameters and rows: for what is no training."""
    return jax.make_mesh((1, 1, jax.device_count(), 1, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_mesh(config: ConfigDict) -> AbstractMesh:
    """The mesh of `config.mesh` without devices, to plan for a machine that is not there; data=-1 becomes data=1.

    Raises: UserError where rows or tokens do not divide.
    """
    sizes = {axis: config.mesh[axis] for axis in AXES}
    sizes["data"] = max(sizes["data"], 1)
    _check_divides(config, sizes)
    return AbstractMesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def row_shards(sizes: Mapping[str, int]) -> int:
    """Number of parts that rows are split into on a mesh whose axes have these `sizes`."""
    return math.prod(sizes[axis] for axis in BATCH_AXES)


def _check_divides(config: ConfigDict, sizes: dict[str, int]) -> None:
    shards, pieces = row_shards(sizes), config.training.accumulate
    if config.batch_size % (shards * pieces):
        micro = f" times training.accumulate={pieces}" if pieces > 1 else ""
        raise UserError(
            f"config.batch_size={config.batch_size}: must be a multiple of {shards * pieces}, the {shards} devices of "
            f"mesh.data, mesh.fsdp and mesh.expert{micro}; or set --config.mesh.data"
        )
    if config.seq_len % sizes["sequence"]:
        raise UserError(f"config.seq_len={config.seq_len}: must be a multiple of mesh.sequence={sizes['sequence']}")


def spec_of(names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """PartitionSpec of an array with these logical axis names, by RULES."""
    return placement.spec_of(names, shape, mesh.shape, RULES)


def parameter_spec(names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """PartitionSpec of a parameter, and of what the optimizer keeps for it, by RULES."""
    return placement.parameter_spec(names, shape, mesh.shape, RULES)


def is_box(leaf: Any) -> bool:
    """Whether this is a parameter in the box that names its axes."""
    return isinstance(leaf, nn.meta.AxisMetadata)


def unbox(tree: Any) -> Any:
    """The arrays of a tree of Flax's axis metadata boxes; other leaves stay as they are."""
    return jax.tree.map(lambda leaf: leaf.value if is_box(leaf) else leaf, tree, is_leaf=is_box)


def param_shardings(boxed: Any, mesh: Mesh | AbstractMesh) -> Any:
    """NamedSharding of each parameter, from its logical axis names; `boxed` is abstract or concrete.

    Raises: UserError where the mesh axis "expert" does not divide the experts: each device would hold and run them all.
    """

    def one(leaf):
        if is_box(leaf):
            _check_experts(leaf.names, leaf.value.shape, mesh)
            return NamedSharding(mesh, parameter_spec(leaf.names, leaf.value.shape, mesh))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(one, boxed, is_leaf=is_box)


def _check_experts(names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> None:
    experts = dict(zip(names, shape, strict=True)).get("expert", 0)
    if experts % (devices := mesh.shape["expert"]):
        raise UserError(f"config.mesh.expert={devices}: must be a divisor of the {experts} experts of a layer")


def check_used(params: Any, mesh: Mesh) -> None:
    """Raises UserError where "tensor" divides no axis of the parameters, given by their shapes: its devices would all
    compute the same."""
    used = {axis for leaf in jax.tree.leaves(params) for entry in leaf.sharding.spec for axis in axes_of(entry)}
    if (size := mesh.shape["tensor"]) > 1 and "tensor" not in used:
        raise UserError(f"config.mesh.tensor={size}: divides no number of heads or channels of the model")


def rows_sharding(mesh: Mesh | AbstractMesh, shape: tuple[int, ...]) -> NamedSharding:
    """Sharding of an array whose first axis is rows (batch): what a recurrent state has."""
    return NamedSharding(
        mesh, spec_of(("batch",) + (None,) * (len(shape) - 1), shape, mesh) if shape else PartitionSpec()
    )


def tokens_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of [B, T] tokens: rows over BATCH_AXES, time over sequence."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, "sequence"))


def batch_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Sharding of an array of a batch: [B], [B, T] or [B, T, C]. An axis that does not divide stays whole."""
    names = ("batch", "length", None)[: len(shape)]
    return NamedSharding(mesh, spec_of(names, shape, mesh))


def local_rows(mesh: Mesh, batch_size: int) -> slice | None:
    """The rows of a batch that the devices of this process take: the least slice with all of them; None: the batch."""
    where = batch_sharding(mesh, (batch_size,)).addressable_devices_indices_map((batch_size,))
    pieces = [index[0].indices(batch_size) for index in where.values() if index]
    rows = slice(min(start for start, *_ in pieces), max(stop for _, stop, _ in pieces))
    return None if rows == slice(0, batch_size) else rows


def put_batch(
    batch: dict[str, np.ndarray], mesh: Mesh, rows: slice | None = None, batch_size: int = 0
) -> dict[str, jax.Array]:
    """Makes global arrays of a batch, of which every process passes the whole or the rows that its devices take.

    Args:
        batch: arrays [B], [B, T] or [B, T, C], or these `rows` of them.
        rows: as of `local_rows`; None: the whole batch.
        batch_size: B, where `batch` is a part.
    """
    first = rows.start if rows else 0

    def put(part: np.ndarray) -> jax.Array:
        if rows and len(part) != rows.stop - rows.start:
            raise UserError(f"dataset.batch(n, rows): gave {len(part)} rows; must give those of {rows}")
        shape = (batch_size if rows else len(part), *part.shape[1:])

        def piece(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(shape[0])
            return part[(slice(start - first, stop - first), *index[1:])]

        return jax.make_array_from_callback(shape, batch_sharding(mesh, shape), piece)

    return {name: put(part) for name, part in batch.items()}
