"""Parameters cast once for many calls. A model in bfloat16 casts its float32 matrices again in every call.

A training step has to. But each token of a generated text would read them all, in twice as many bytes as need be.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from seqmodels.layers.parameter import declarations


def rounded(model: nn.Module, params: Any) -> tuple[Any, Any]:
    """`params` for `model(...)`, and for `model.logits`: each cast to the dtype that the model reads it in.

    A model gives the same results with them as with `params`.
    """
    leaves, tree = jax.tree.flatten(params)
    return tuple(jax.tree.unflatten(tree, _cast(leaves, dtypes)) for dtypes in _dtypes(model))


@functools.partial(jax.jit, static_argnums=1)
def _cast(leaves, dtypes):
    return [leaf.astype(dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)]


@functools.lru_cache(maxsize=16)
def _dtypes(model: nn.Module) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The dtype that each parameter is read in, by `model(...)` and by `model.logits`."""
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    declared = declarations(boxed)
    dtype = jnp.dtype(model.config.dtype)
    return (
        tuple(parameter.read for parameter in declared),
        # the table that embeds tokens may also make the logits, where it is cast
        tuple(dtype if "vocab" in parameter.names else parameter.read for parameter in declared),
    )
