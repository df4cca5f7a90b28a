"""How a parameter is declared: once, with all that the rest of the code has to know of it."""

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
    """A float32 parameter in the tree that `init` returns, with what was declared of it. `unbox` gives the array.

    Attributes:
        names: logical axes. Under a scan over blocks "layers" stands in front.
        decay: whether weight decay applies; None: to matrices, not to vectors.
        group: of the learning rate; "" is the rest.
        read: dtype that the model reads it in.
    """

    decay: bool | None = struct.field(default=None, pytree_node=False)
    group: str = struct.field(default="", pytree_node=False)
    read: Any = struct.field(default=jnp.float32, pytree_node=False)

    @property
    def axes(self) -> int:
        """Axes of one layer's parameter: a vector has one, also where a scan stacks the layers' in front."""
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
) -> jax.Array:
    """Declares a float32 parameter of a module and returns it as `dtype`, in which the module computes.

    Args:
        axes: logical name of each axis, of `seqmodels.training.sharding.RULES`; None for one that is never split.
        init: (key, shape, dtype) -> array.
        decay: weight decay; None: for matrices and larger, not for vectors.
        group: of the learning rate (`config.optimizer.groups`), such as "ssm".
    """
    read = jnp.dtype(dtype)

    def boxed(key, shape):
        return Parameter(init(key, shape, jnp.float32), tuple(axes), decay=decay, group=group, read=read)

    return module.param(name, boxed, tuple(shape)).astype(read)


def declarations(boxed: Any) -> list[Parameter]:
    """Every parameter of a tree, as `init` returns it, with its declaration, in the order of `jax.tree.leaves`.

    A module that declares its parameters by Flax alone has the defaults.
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
    """Uniform on [-bound, bound], as torch.nn.Linear and Conv1d are with bound = fan_in^-1/2."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def residual_std(layers: int, std: float = 0.02) -> float:
    """Standard deviation of a projection onto the residual stream, which `layers` layers of two branches write to.

    Radford et al. 2019 (GPT-2), section 2.3.
    """
    return std / math.sqrt(2 * layers)


ones: Init = nn.initializers.ones
zeros: Init = nn.initializers.zeros
