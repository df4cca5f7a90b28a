"""AdamW with parameter groups, the rule of parameters that AdamW does not update, and learning-rate schedules."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from seqmodels.fields import refuse
from seqmodels.layers.parameter import declarations
from seqmodels.nearest import nearest
from seqmodels.schedule import rate
from seqmodels.training.sharding import is_box, unbox


def make_optimizer(config: ConfigDict, mask: Any = None) -> optax.GradientTransformation:
    """The update direction of AdamW (Loshchilov and Hutter 2019), for descent as `params - learning_rate * direction`.

    The learning rate is not in it: the step multiplies by `make_schedule(...)(step)`, so that it depends on the step
    alone. `config` is `config.optimizer`, `mask` a tree of bools from `decay_mask`; None decays everything.
    Gradients are clipped by their global norm where `clip` is not 0.
    """
    return optax.chain(
        clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=mask),
    )


def global_norm(tree: Any) -> jax.Array:
    """Root of the sum of squares of all leaves, float32.

    Rows first and the rest together: a sum to a scalar is two kernels, of two microseconds each for a small leaf, and a
    model has hundreds of leaves.
    """
    squares = (jnp.square(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(tree))
    rows = [jnp.ravel(jnp.sum(x, axis=-1) if x.ndim > 1 else x) for x in squares]
    return jnp.sqrt(jnp.sum(jax.lax.optimization_barrier(jnp.concatenate(rows))))


def clip_by_global_norm(largest: float) -> optax.GradientTransformation:
    """Scale the gradients down to a `global_norm` of `largest`, if it is more."""

    def update(grads, state, params=None):
        scale = jnp.minimum(1, largest / jnp.maximum(global_norm(grads), largest))
        return jax.tree.map(lambda g: scale * g, grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def decay_mask(boxed: Any) -> Any:
    """True for each parameter that takes weight decay, as it was declared (`seqmodels.layers.parameter`).

    `boxed` is the parameters, abstract or concrete, with their declarations.
    """
    return jax.tree.unflatten(jax.tree.structure(unbox(boxed)), [leaf.decayed for leaf in declarations(boxed)])


def rate_factors(groups: str, boxed: Any) -> Any:
    """The factor of the learning rate of each parameter, from "ssm=0.1,embedding=0.5".

    A group is the one that a parameter is declared with, or a name on its path, such as mlp, block_0 or embedding. Of
    several that a parameter is in, the last in the text counts. Without one the factor is 1; with 0 the parameter is
    frozen. The factor also scales the weight decay, which is a part of the update.

    Args:
        groups: `config.optimizer.groups`.
        boxed: the parameters with their declarations.

    Raises:
        UserError: text that is not NAME=FACTOR, or a group that no parameter of this model is in.
    """
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_box)
    names = [
        {leaf.group, *(key.key for key in path if hasattr(key, "key"))}
        for (path, _), leaf in zip(leaves, declarations(boxed), strict=True)
    ]
    there = sorted(set().union(*names) - {""})
    groups_there = sorted({leaf.group for leaf in declarations(boxed)} - {""})
    factors = {}
    for text in filter(None, map(str.strip, groups.split(","))):
        name, equals, number = text.partition("=")
        try:
            factor = float(number)
        except ValueError:
            factor = -1.0
        if not (equals and 0 <= factor < math.inf):
            refuse(
                "optimizer.groups",
                groups,
                f"GROUP=FACTOR, separated by commas, each factor at least 0; {text!r} is not",
            )
        if name not in there:
            near = nearest(name, there)
            guess = near if "did you mean" in near else ""
            known = f"of this model's groups, {', '.join(groups_there)}{guess}; or names on the paths of parameters"
            refuse("optimizer.groups", groups, f"{known}, such as block_0")
        factors[name] = factor
    found = [next((factors[name] for name in reversed(factors) if name in own), 1.0) for own in names]
    return jax.tree.unflatten(jax.tree.structure(unbox(boxed)), found)


def sign_rule(boxed: Any) -> Callable[[Any], tuple[Any, Any]] | None:
    """The rule of the parameters that are declared with `sign_step`; None if there are none.

    Args:
        boxed: the parameters with their declarations.

    Returns:
        A function of the gradients. It returns them with zeros for these parameters, so that neither AdamW nor the
        norm sees them, and what a step subtracts from all parameters by this rule.
    """
    steps = [leaf.sign_step for leaf in declarations(boxed)]
    if all(step is None for step in steps):
        return None

    def split(grads: Any) -> tuple[Any, Any]:
        leaves, tree = jax.tree.flatten(grads)
        rest = [g if step is None else jnp.zeros_like(g) for g, step in zip(leaves, steps, strict=True)]
        moves = [0.0 if step is None else step * jnp.sign(g) for g, step in zip(leaves, steps, strict=True)]
        return jax.tree.unflatten(tree, rest), jax.tree.unflatten(tree, moves)

    return split


def make_schedule(config: ConfigDict, steps: int) -> Callable[[jax.Array | int], jax.Array]:
    """`seqmodels.schedule.rate` as a function of the step. `config` is `config.optimizer`."""
    return lambda step: rate(config, steps, jnp.asarray(step, jnp.float32), jnp)
