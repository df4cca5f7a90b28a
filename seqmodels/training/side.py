"""Side outputs of branches: losses, which are added to the objective, and figures, which are only logged.

A branch says `self.sow("losses", name, value)` or `self.sow("figures", name, value)`, with a float scalar. A loss is a
mean over tokens and already weighted by its coefficient. Only the training step reads them.

Two more collections are for branches that need them. RUNNING has what the micro-batches of one step add up: a branch
finds there the `self.variable` of the micro-batch before, and zeros in the first one; where a step has no micro-batches
the collection is not mutable. ROUTING has the logits of routers, for tests and analyses that ask for them.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from seqmodels.backbone import plan, scanned

COLLECTIONS = ("losses", "figures")
RUNNING, ROUTING = "running", "routing"

Values = dict[str, jax.Array]


class SideOutputs(NamedTuple):
    """Values by "name/layer", where layer is the block's number in the whole stack; by "name" outside of blocks.

    If several branches of a block report a name, by "name/layer.place", with the branch's place in the parameter tree.
    """

    losses: Values
    figures: Values


def collect(reported: dict[str, Any], model_config: ConfigDict) -> SideOutputs:
    """The scalars in the collections that a call of the model filled.

    Args:
        reported: those of COLLECTIONS that are among the model's variables.
        model_config: config.model, which says how many blocks a scan goes over.

    Losses of one name in one branch are added up, figures averaged.

    Raises: ValueError for a value that is not a scalar.
    """
    losses, figures = (by_layer(reported.get(name, {}), model_config) for name in COLLECTIONS)
    for name, values in [*losses.items(), *figures.items()]:
        if shapes := [value.shape for value in values if value.ndim]:
            raise ValueError(f"a branch reports {name.split('/')[0]!r} of shape {shapes[0]}; it must be a scalar")
    return SideOutputs(
        {name: sum(values[1:], values[0]) for name, values in losses.items()},
        {name: jax.lax.stop_gradient(sum(values[1:], values[0]) / len(values)) for name, values in figures.items()},
    )


def weighted(side: SideOutputs, count: jax.Array) -> SideOutputs:
    """All values times a count, so that micro-batches can be added up. The sum over the whole count is the mean."""
    return jax.tree.map(lambda value: value.astype(jnp.float32) * count, side)


def metrics(sums: SideOutputs, count: jax.Array) -> Values:
    """Means by name and layer; for losses also the sum over the layers, by name.

    Args:
        sums: of `weighted`, added up.
        count: the whole count.

    Raises: ValueError for a name that is reported as a loss and as a figure.
    """
    means = jax.tree.map(lambda value: value / count, sums)
    totals: Values = {}
    for name, value in means.losses.items():
        if "/" in name:
            base = name.rsplit("/", 1)[0]
            totals[base] = totals.get(base, 0.0) + value
    return join(join(totals, means.losses), means.figures)


def join(first: Values, second: Values) -> Values:
    """Both dicts in one. Raises: ValueError if they share a name."""
    if shared := sorted(first.keys() & second.keys()):
        raise ValueError(f"a branch reports {shared[0]!r}, which is the name of another metric")
    return first | second


def by_layer(collection: dict[str, Any], model_config: ConfigDict) -> dict[str, list[jax.Array]]:
    """Every value of a collection that branches `sow` into, by "name/layer"; see `SideOutputs`."""
    found: dict[tuple[str, str], dict[str, list[jax.Array]]] = {}  # by name and layer, by place in the block
    if not collection:
        return {}
    unrolled, repeats = scanned(model_config)
    size = (len(plan(model_config)) - unrolled) // max(repeats, 1)
    for path, value in jax.tree_util.tree_leaves_with_path(collection):
        keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]  # the last key is a tuple's index
        name, stacked = keys[-1], keys[0] == "blocks"
        if stacked:
            within = int(keys[1].removeprefix("block_"))
            layers = [(f"/{unrolled + i * size + within}", value[i]) for i in range(repeats)]
        elif keys[0].startswith("block_"):
            layers = [(f"/{keys[0].removeprefix('block_')}", value)]
        else:
            layers = [("", value)]
        for layer, one in layers:
            found.setdefault((name, layer), {}).setdefault(keys[1 + stacked], []).append(one)
    return {
        name + layer + (f".{place}" if len(places) > 1 else ""): values
        for (name, layer), places in found.items()
        for place, values in places.items()
    }
