"""AdamW with parameter groups, and learning-rate schedules."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from seqmodels.training.sharding import is_box

# The state-space parameters and the gains of norms: decay pulls them to values that mean something else than "small".
UNDECAYED = ("A_log", "D", "dt_bias", "scale")


def make_optimizer(config: ConfigDict, mask=None) -> optax.GradientTransformation:
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


def global_norm(tree) -> jax.Array:
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


def decay_mask(boxed):
    """True for each parameter that takes weight decay: matrices and larger, except the UNDECAYED.

    `boxed` is the parameters, abstract or concrete, in the boxes with their logical axis names: under a scan over
    layers a vector has a leading axis called "layers", and is a vector all the same.
    """

    def one(path, leaf):
        axes = sum(name != "layers" for name in leaf.names) if is_box(leaf) else leaf.ndim
        return axes >= 2 and path[-1].key not in UNDECAYED

    return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=is_box)


def make_schedule(config: ConfigDict, steps: int) -> Callable[[jax.Array | int], jax.Array]:
    """Learning rate of step t = 0 .. steps - 1. `config` is `config.optimizer`.

    Warm-up of W steps: peak (t + 1) / W. Then with u from 0 at step W to 1 at the last step:
      cosine:   peak (floor + (1 - floor) (1 + cos(pi u)) / 2)
      wsd:      peak, and over the last `decay` of the steps linearly down to peak x floor (Hu et al. 2024)
      constant: peak
    """
    warmup = round(config.warmup if config.warmup > 1 else config.warmup * steps)
    last, peak, floor = steps - 1, config.learning_rate, config.floor

    def schedule(step):
        t = jnp.asarray(step, jnp.float32)
        if config.schedule == "cosine":
            u = jnp.clip((t - warmup) / max(last - warmup, 1), 0, 1)
            share = floor + (1 - floor) * (1 + jnp.cos(jnp.pi * u)) / 2
        elif config.schedule == "wsd":
            length = max(round(config.decay * steps), 1)
            share = 1 - (1 - floor) * jnp.clip((t - (last - length)) / length, 0, 1)
        else:
            share = jnp.ones_like(t)
        return peak * share * jnp.minimum((t + 1) / max(warmup, 1), 1)

    return schedule
