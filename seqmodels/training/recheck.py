"""Finds devices that compute wrong sums: now and then a step is computed twice, and must give the same bits."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from seqmodels import job
from seqmodels.errors import UserError
from seqmodels.training.state import TrainState

DETERMINISTIC = "XLA_FLAGS=--xla_gpu_deterministic_ops=true"  # without it a GPU may add in another order


class Recheck:
    """Computes the steps, one in `every` of them twice; 0: none."""

    def __init__(self, every: int, mesh: Mesh) -> None:
        self._every, self._mesh = every, mesh

    def step(self, compiled: Callable, state: TrainState, batch: Any, step: int) -> tuple[TrainState, dict]:
        """What `compiled(state, batch)` returns, which is given the buffers of the state.

        Raises: UserError, in all processes, which names the devices where the second result differs.
        """
        if not self._every or step % self._every:
            return compiled(state, batch)
        again = _copied(state)
        result = compiled(state, batch)
        if differ := differing(result, compiled(again, batch), self._mesh):
            flags = "" if self._mesh.devices.flat[0].platform == "cpu" else f", or set {DETERMINISTIC}"
            raise UserError(
                f"step {step}, computed twice, gave other bits on {named(differ, self._mesh)}: a device computes wrong "
                f"sums, or rounds in a changing order; nothing of the step is saved. Start without that host{flags}"
            )
        return result


def differing(left: Any, right: Any, mesh: Mesh) -> list[int]:
    """Positions in the mesh of the devices whose parts of two trees of global arrays have not the same bits.

    Every process of the job calls it, and gets the same answer.
    """
    parts: dict[jax.Device, tuple[list, list]] = defaultdict(lambda: ([], []))
    for leaves, which in ((jax.tree.leaves(left), 0), (jax.tree.leaves(right), 1)):
        for leaf in leaves:
            for shard in leaf.addressable_shards:
                parts[shard.device][which].append(shard.data)
    answers = {device: _differ(*pair) for device, pair in parts.items()}  # all devices at once
    found = np.array([bool(answers.get(device, False)) for device in mesh.devices.flat])
    if jax.process_count() > 1:
        found = multihost_utils.process_allgather(found).any(axis=0)
    return [int(place) for place in np.flatnonzero(found)]


def named(places: list[int], mesh: Mesh) -> str:
    """Devices by name and host, for a message."""
    devices = [mesh.devices.flat[place] for place in places]
    if len(devices) == mesh.size > 1:
        return f"all {mesh.size} devices"
    here = job.current()
    shown = ", ".join(f"device {device.id} of {here.name(device.process_index)}" for device in devices[:4])
    return shown + (f" and {len(devices) - 4} more" if len(devices) > 4 else "")


def _copied(state: TrainState) -> TrainState:
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings)(state)


@jax.jit
def _differ(left: list[jax.Array], right: list[jax.Array]) -> jax.Array:
    """Whether any bit differs: not by value, as NaN is not NaN, and 0 is -0."""

    def bits(x):
        x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
        return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))

    return jnp.stack([jnp.any(bits(a) != bits(b)) for a, b in zip(left, right, strict=True)]).any()
