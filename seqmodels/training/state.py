"""The state of a run: all that it needs to continue where it stopped."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict, FrozenConfigDict

from seqmodels.errors import UserError
from seqmodels.training import sharding
from seqmodels.training.optimizer import averages


class TrainState(struct.PyTreeNode):
    """State of a run after `step` optimizer steps. The data of a step and its dropout follow from (seed, step)."""

    step: jax.Array  # int32, steps done
    skipped: jax.Array  # int32, steps whose loss or gradient was not finite
    params: Any
    opt_state: Any
    ema: Any  # averaged parameters, or None
    carry: Any  # the model's recurrent state for the next batch (truncated BPTT), or None


def abstract_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    mesh: Mesh | AbstractMesh,
    boxed: Any = None,
) -> TrainState:
    """The state as jax.ShapeDtypeStruct with shardings: nothing is allocated.

    Args:
        boxed: result of `abstract_params`, which takes seconds for a deep model; None: it is made here.
    """
    boxed = abstract_params(model, config) if boxed is None else boxed
    shardings = sharding.param_shardings(boxed, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())

    params = placed_params(boxed, mesh)
    places = {_keys(path): place for path, place in jax.tree_util.tree_leaves_with_path(shardings)}
    opt_state = jax.tree_util.tree_map_with_path(
        lambda path, leaf: _with_sharding(leaf, places.get(_keys(path), replicated)),
        jax.eval_shape(optimizer.init, params),
    )
    scalar: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    return TrainState(
        step=scalar,
        skipped=scalar,
        params=params,
        opt_state=opt_state,
        ema=params if averages(config.optimizer) else None,
        carry=abstract_carry(model, config, mesh) if config.training.bptt else None,
    )


def _keys(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The keys behind the last part of a path that is not a key: the path of a parameter, in what has one for each."""
    dicts = [isinstance(part, jax.tree_util.DictKey) for part in path]
    behind = len(dicts) - dicts[::-1].index(False) if False in dicts else 0
    return tuple(part.key for part in path[behind:])


def abstract_params(model: nn.Module, config: ConfigDict) -> Any:
    """Shapes of the parameters, in the boxes that name their axes."""
    return jax.eval_shape(_init_params(model, config), jax.random.key(0))


def placed_params(boxed: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The parameters of `abstract_params` as jax.ShapeDtypeStruct with their shardings on a mesh."""
    return jax.tree.map(_with_sharding, sharding.unbox(boxed), sharding.param_shardings(boxed, mesh))


def abstract_carry(model: nn.Module, config: ConfigDict, mesh: Mesh | AbstractMesh) -> Any:
    """Shapes of the recurrent state that truncated BPTT hands from step to step.

    Raises: UserError where the model's state grows with the context, as attention's cache does.
    """

    def shapes(length):
        return jax.eval_shape(lambda: model.init_state(config.batch_size, length))

    carry, longer = shapes(config.seq_len), shapes(2 * config.seq_len)
    if [x.shape for x in jax.tree.leaves(carry)] != [x.shape for x in jax.tree.leaves(longer)]:
        raise UserError(
            "config.training.bptt=True: the state of this model's attention grows with the context; set it False"
        )
    return jax.tree.map(lambda x: _with_sharding(x, sharding.rows_sharding(mesh, x.shape)), carry)


def init_state(
    model: nn.Module, optimizer: optax.GradientTransformation, config: ConfigDict, abstract: TrainState
) -> TrainState:
    """A fresh state. Each device makes its own part; the values are the same on every mesh.

    Raises: UserError on a CPU whose memory is too small for it: the system would kill the process.
    """
    _check_memory(abstract)
    return lower_init(model, optimizer, config, abstract).compile()(jax.random.key(config.seed))


def not_finite(state: TrainState) -> str:
    """The part of a state that holds a NaN or an infinity, such as "the parameters are"; "" if there is none."""
    parts = {"the parameters are": state.params, "the optimizer's state is": state.opt_state}
    parts |= {"the averaged parameters are": state.ema, "the state carried from step to step is": state.carry}
    finite = np.asarray(_finite([jax.tree.leaves(part) for part in parts.values()]))
    return next((name for name, good in zip(parts, finite, strict=True) if not good), "")


@jax.jit
def _finite(parts: list[list[jax.Array]]) -> jax.Array:
    """[parts] bool: whether all numbers of a part are finite."""

    def one(leaves):
        found = [jnp.isfinite(x).all() for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)]
        return jnp.all(jnp.array(found, bool))

    return jnp.stack([one(leaves) for leaves in parts])


def _check_memory(abstract: TrainState) -> None:
    from seqmodels.evals.memory import free_host_bytes  # evaluators import this module

    free = free_host_bytes() if jax.default_backend() == "cpu" else None
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract) if hasattr(leaf, "size"))
    if free is not None and needed > free:
        raise UserError(
            f"config.model: parameters and optimizer need {needed / 2**30:,.1f} GiB of memory, {free / 2**30:,.1f} are "
            "free; make the model smaller"
        )


def lower_init(
    model: nn.Module, optimizer: optax.GradientTransformation, config: ConfigDict, abstract: TrainState
) -> jax.stages.Lowered:
    """The function from a key to a fresh state, to be compiled."""

    def create(key):
        return _first_state(sharding.unbox(_init_params(model, config)(key)), model, optimizer, config)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(create, out_shardings=shardings).lower(jax.random.key(config.seed))


def state_from(
    params: Any, model: nn.Module, optimizer: optax.GradientTransformation, config: ConfigDict, abstract: TrainState
) -> TrainState:
    """The state before the first step with parameters that are there already, which are consumed."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    create = jax.jit(_first_state, static_argnums=(1, 2, 3), donate_argnums=0, out_shardings=shardings)
    return create(params, model, optimizer, FrozenConfigDict(config))


def _first_state(params, model, optimizer, config):
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        # A copy: two donated arguments may not share a buffer.
        ema=jax.tree.map(jnp.copy, params) if averages(config.optimizer) else None,
        carry=model.init_state(config.batch_size, config.seq_len) if config.training.bptt else None,
    )


def _init_params(model, config):
    # Parameters do not depend on the row, but a kernel that was asked for by name may not serve other lengths.
    row = model.example_input(config.seq_len)
    return lambda key: model.init(key, row)["params"]


def _with_sharding(leaf, placed):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)
