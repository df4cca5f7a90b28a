"""Matrices that `fsdp` splits, gathered by a layer: once forward, once backward, in the dtype that the layer reads."""

import functools

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec

from seqmodels.placement import GATHERED, axes_of, parameter_spec

NAME = "gathered"  # of the whole matrices among the activations of a block, which `model.remat` never keeps


def splits_matrices() -> bool:
    """Whether the current mesh splits matrices that a layer gathers."""
    return bool(nn.get_logical_axis_rules()) and _sizes().get(GATHERED, 1) > 1


def gathered(w: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """The parameter w with these logical axes, whole on every device of `fsdp`; on other meshes w itself.

    Left to itself, XLA gathers what each product reads: in the backward pass once to compute the forward pass again,
    and once transposed, for the gradient of the product's input. The gradient of w is added up part by part.
    """
    if not splits_matrices():
        return w
    stored = parameter_spec(names, w.shape, _sizes(), nn.get_logical_axis_rules())
    if GATHERED not in {axis for entry in stored for axis in axes_of(entry)}:
        return w
    return checkpoint_name(_gather(stored, w), NAME)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(stored: PartitionSpec, w: jax.Array) -> jax.Array:
    """w, of which each device holds the part that `stored` says: said twice, else XLA gathers it in float32."""
    whole = PartitionSpec(*(tuple(axis for axis in axes_of(entry) if axis != GATHERED) or None for entry in stored))
    return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(w, stored), whole)


_gather.defvjp(
    lambda stored, w: (_gather(stored, w), None),
    lambda stored, _, gradient: (jax.lax.with_sharding_constraint(gradient, stored),),
)


def _sizes() -> dict[str, int]:
    """Devices of each axis of the current mesh that the compiler splits arrays over."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: count if kind is AxisType.Auto else 1 for name, count, kind in axes}
