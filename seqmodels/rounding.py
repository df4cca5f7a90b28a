"""Parameters that are cast once for many calls. A model in bfloat16 casts its float32 matrices in every call.

A training step must do so. But in generation, each token would read all matrices in float32: twice the bytes needed.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from seqmodels.layers.parameter import declarations


def rounded(model: nn.Module, params: Any) -> tuple[Any, Any]:
    """`params` for `model(...)`, and `params` for `model.logits`, cast to the dtypes that the model reads them in.

    The model's results are the same as with the original `params`.
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
        # the embedding table may also be the matrix of the logits, which casts it
        tuple(dtype if "vocab" in parameter.names else parameter.read for parameter in declared),
    )
