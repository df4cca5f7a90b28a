"""Parameters rounded once for many calls: a model in bfloat16 rounds its float32 matrices again in every call.

A training step has to, but each token of a generated text would read them all, twice as wide as need be.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

MOVES = ("transpose", "reshape", "slice", "squeeze")  # what may come before the rounding: numbers stay the same


def rounded(model, params: Any) -> tuple[Any, Any]:
    """`params` for `model(...)`, and for `model.logits`: what it only reads rounded is rounded. The results stay."""
    leaves, tree = jax.tree.flatten(params)
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)
    return tuple(jax.tree.unflatten(tree, _cast(leaves, dtypes)) for dtypes in _dtypes(model, tree, shapes))


@functools.partial(jax.jit, static_argnums=1)
def _cast(leaves, dtypes):
    return [leaf.astype(dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)]


@functools.lru_cache(maxsize=16)
def _dtypes(model, tree, shapes):
    """The dtype that each parameter is read in, by `model(...)` and by `model.logits`."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    hidden = jax.ShapeDtypeStruct((1, 1, model.config.width), jnp.dtype(model.config.dtype))
    state = jax.eval_shape(lambda: model.init_state(1, 1))

    def read(method, *arguments):
        def call(leaves, *arguments):
            return model.apply({"params": jax.tree.unflatten(tree, leaves)}, *arguments, method=method)

        jaxpr = jax.make_jaxpr(call)(list(shapes), *arguments).jaxpr
        found = (_converted_to(jaxpr, x) for x in jaxpr.invars[: len(shapes)])
        return tuple(dtypes.pop() if len(dtypes) == 1 else x.dtype for dtypes, x in zip(found, shapes, strict=True))

    return read("__call__", tokens, None, None, state), read("logits", hidden)


def _converted_to(jaxpr, x) -> set:
    """The dtypes that a variable is converted to; its own is among them if it is used in any other way."""
    dtypes = {x.aval.dtype} if any(x is y for y in jaxpr.outvars) else set()
    for equation in jaxpr.eqns:
        for i in (i for i, y in enumerate(equation.invars) if y is x):
            name, inner = equation.primitive.name, equation.params.get("jaxpr")
            inner = getattr(inner, "jaxpr", inner)  # of a call, or a scan over layers
            if name == "convert_element_type":
                dtypes.add(jnp.dtype(equation.params["new_dtype"]))
            elif name in MOVES:
                dtypes |= _converted_to(jaxpr, equation.outvars[0])
            elif inner is not None and len(inner.invars) == len(equation.invars):
                dtypes |= _converted_to(inner, inner.invars[i])
            else:
                dtypes.add(x.aval.dtype)
    return dtypes
