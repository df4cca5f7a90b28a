"""Declaration of parameters: each is declared once, with everything that other code must know about it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

Init = Callable[..., jax.Array]  # (key, shape, dtype) -> array


class Parameter(nn.LogicallyPartitioned):
    """A float32 parameter in the tree that `init` returns, with its declaration. `unbox` returns the array.

    Attributes:
        names: logical axes. Under a scan over blocks "layers" is the first.
        decay: whether weight decay applies. None: it applies to matrices, not to vectors.
        group: of the learning rate; "" is the rest.
        read: dtype that the model reads it in.
        sign_step: its value goes by this much against the sign of its gradient in every step; None: AdamW.
    """

    decay: bool | None = struct.field(default=None, pytree_node=False)
    group: str = struct.field(default="", pytree_node=False)
    read: Any = struct.field(default=jnp.float32, pytree_node=False)
    sign_step: float | None = struct.field(default=None, pytree_node=False)

    @property
    def axes(self) -> int:
        """Number of axes of one layer's parameter. A vector has one, even if a scan adds an axis for the layers."""
        return sum(name != "layers" for name in self.names)

    @property
    def decayed(self) -> bool:
        """Whether weight decay applies."""
        return self.axes >= 2 if self.decay is None else self.decay


def parameter(
    module: nn.Module,
    name: str,
    shape: Sequence[int],
    axes: Sequence[str | None],
    init: Init,
    *,
    dtype: DTypeLike = jnp.float32,
    decay: bool | None = None,
    group: str = "",
    sign_step: float | None = None,
) -> jax.Array:
    """Declare a float32 parameter of a module, and return it as `dtype`, in which the module computes.

    Args:
        axes: logical name of each axis, from `seqmodels.training.sharding.RULES`; None for an axis that is never split.
        init: (key, shape, dtype) -> array.
        decay: whether weight decay applies. None: it applies to matrices and larger arrays, not to vectors.
        group: group of the learning rate (`config.optimizer.groups`), such as "ssm".
        sign_step: in every training step the value goes by this much against the sign of its gradient, whatever the
            learning rate, and the gradient counts in no norm. None: AdamW.
    """
    read = jnp.dtype(dtype)
    declared = dict(decay=decay, group=group, read=read, sign_step=sign_step)

    def boxed(key, shape):
        return Parameter(init(key, shape, jnp.float32), tuple(axes), **declared)

    return module.param(name, boxed, tuple(shape)).astype(read)


def declarations(boxed: Any) -> list[Parameter]:
    """Every parameter of a tree, as `init` returns it, with its declaration, in the order of `jax.tree.leaves`.

    Parameters that a module declares by Flax alone get the default declaration.
    """

    def declared(leaf: Any) -> Parameter:
        if isinstance(leaf, Parameter):
            return leaf
        if isinstance(leaf, nn.Partitioned):
            return Parameter(leaf.value, leaf.names)
        return Parameter(leaf, (None,) * leaf.ndim)

    leaves = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata))
    return [declared(leaf) for leaf in leaves]


def normal(std: float) -> Init:
    """Normal with this standard deviation."""
    return nn.initializers.normal(std)


def uniform(bound: float) -> Init:
    """Uniform on [-bound, bound]. torch.nn.Linear and Conv1d use this with bound = fan_in^-1/2."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def residual_std(layers: int, std: float = 0.02) -> float:
    """Standard deviation of a projection onto the residual stream of `layers` layers with two branches each.

    Radford et al. 2019 (GPT-2), section 2.3.
    """
    return std / math.sqrt(2 * layers)


ones: Init = nn.initializers.ones
zeros: Init = nn.initializers.zeros
