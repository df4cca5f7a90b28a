"""AdamW, Muon and schedule-free AdamW, their parameter groups, other rules of single parameters, and learning rates."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from ml_collections import ConfigDict

from seqmodels.fields import refuse
from seqmodels.layers.parameter import Parameter, declarations
from seqmodels.nearest import nearest
from seqmodels.schedule import rate
from seqmodels.training.sharding import is_box, unbox

MUON_RMS = 0.2  # of Muon's updates, as large as AdamW's usually are (Liu et al. 2025, arXiv 2502.16982)


def make_optimizer(
    config: ConfigDict, boxed: Any = None, schedule: Callable[[jax.Array], jax.Array] | None = None
) -> optax.GradientTransformation:
    """The update direction of `config.name`, for descent as `params - learning_rate * direction`.

    The learning rate is not in it: the step multiplies by `make_schedule(...)(step)`, so that it depends on the step
    alone. Gradients are clipped by their global norm where `clip` is not 0.

    adamw: Loshchilov and Hutter 2019.
    muon: matrices by Muon (Jordan et al. 2024), with updates as large as AdamW's; the others by AdamW.
    schedule_free: AdamW without a schedule (Defazio et al. 2024, arXiv 2405.15682). Gradients are taken between z, the
        parameters of plain steps, and their average, which is the result: `averaged_params`.

    Args:
        config: `config.optimizer`.
        boxed: the parameters with their declarations; None: all of them decay, and none is a matrix.
        schedule: learning rate of a step, which schedule_free weighs its average by; None: `learning_rate`.
    """
    mask = None if boxed is None else decay_mask(boxed)
    clip = clip_by_global_norm(config.clip) if config.clip else optax.identity()
    decay = optax.add_decayed_weights(config.weight_decay, mask=mask)
    if config.name == "schedule_free":
        return _schedule_free(config, clip, decay, schedule or (lambda step: jnp.float32(config.learning_rate)))
    rule = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    if config.name == "muon" and boxed is not None:
        axes = matrices(boxed)
        labels = jax.tree.map(lambda a: "adam" if isinstance(a, optax.MaskedNode) else "muon", axes, is_leaf=_is_axes)
        options = dict(muon_weight_dimension_numbers=axes, consistent_rms=MUON_RMS)
        muon = optax.contrib.muon(-1.0, beta=config.muon, **options)  # optax subtracts: -1 gives the direction
        rule = optax.partition({"adam": rule, "muon": muon}, labels)
    return optax.chain(clip, rule, decay)


def _schedule_free(config, clip, decay, schedule) -> optax.GradientTransformation:
    """optax's, whose steps are divided by their learning rate."""
    adam = optax.scale_by_adam(b1=0.0, b2=config.b2, eps=config.eps)
    base = optax.chain(adam, decay, optax.scale_by_learning_rate(schedule))
    rule = optax.contrib.schedule_free(base, lambda count: schedule(count - 1), b1=config.b1)

    def update(grads, state, params=None):
        clipped, cut = clip.update(grads, state[0], params)
        rate = schedule(state[1].step_count - 1)
        moves, free = rule.update(clipped, state[1], params)
        return jax.tree.map(lambda move: -move / rate, moves), (cut, free)

    return optax.GradientTransformation(lambda params: (clip.init(params), rule.init(params)), update)


def averages(config: ConfigDict) -> bool:
    """Whether a run keeps averaged parameters, which are evaluated. `config` is `config.optimizer`."""
    return config.ema > 0 or config.name == "schedule_free"


def averaged_params(config: ConfigDict, average: Any, params: Any, opt_state: Any) -> Any:
    """The average after a step, of the average before it and the new parameters and state of the optimizer."""
    if config.name == "schedule_free":
        return optax.contrib.schedule_free_eval_params(opt_state[1], params)
    return jax.tree.map(lambda old, p: config.ema * old + (1 - config.ema) * p, average, params)


def matrices(boxed: Any) -> Any:
    """For each parameter the axes that Muon takes as the rows and columns of a matrix; MaskedNode: it is not for Muon.

    Matrices are the parameters that decay and have two axes or more, but for embeddings, heads and convolutions. The
    model's width is on one side, and what remains on the other; layers, experts and axes without a name are apart.
    """
    leaves = [_matrix_axes(leaf) for leaf in declarations(boxed)]
    return jax.tree.unflatten(jax.tree.structure(unbox(boxed)), leaves)


def _is_axes(x: Any) -> bool:
    return isinstance(x, optax.contrib.MuonDimensionNumbers | optax.MaskedNode)


def _matrix_axes(leaf: Parameter) -> optax.contrib.MuonDimensionNumbers | optax.MaskedNode:
    axes = [i for i, name in enumerate(leaf.names) if name not in ("layers", "expert")]
    if len(axes) > 2:
        axes = [i for i in axes if leaf.names[i] is not None]
    names = [leaf.names[i] for i in axes]
    if not leaf.decayed or len(axes) < 2 or leaf.group in ("embedding", "head") or {"vocab", "conv"} & set(names):
        return optax.MaskedNode()
    split = len(axes) - 1 if names[-1] == "embed" else 1
    return optax.contrib.MuonDimensionNumbers(tuple(axes[:split]), tuple(axes[split:]))


def global_norm(tree: Any) -> jax.Array:
    """Root of the sum of squares of all leaves, float32.

    Rows first and the rest together: a sum to a scalar is two kernels, of two microseconds each for a small leaf, and a
    model has hundreds of leaves. On a mesh that splits parameters each leaf becomes a scalar: devices would gather the
    rows of each leaf, but add up all scalars in one exchange.
    """
    squares = [jnp.square(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(tree)]
    if _parameters_split():
        return jnp.sqrt(sum(jnp.sum(x) for x in squares))
    rows = [jnp.ravel(jnp.sum(x, axis=-1) if x.ndim > 1 else x) for x in squares]
    return jnp.sqrt(jnp.sum(jax.lax.optimization_barrier(jnp.concatenate(rows))))


def _parameters_split() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return any(mesh.shape.get(axis, 1) > 1 for axis in ("fsdp", "tensor", "expert"))


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
