"""Random arguments of a source of Attention Residuals, and what it gives when steps read it, with all gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from seqmodels.kernels.attn_residual import attn_residual

EPS = 1e-2  # large enough that an implementation without it is seen


def inputs(batch=2, length=3, width=32, steps=3, seed=0, dtype="float32") -> dict:
    """The source and the vectors in `dtype`, and the parts of gradients that K steps would return."""
    draw, token = np.random.default_rng(seed), (batch, length)
    value, reads = draw.normal(size=(*token, width)), draw.normal(size=(steps, *token, width))
    arrays = dict(value=value, vectors=0.5 * draw.normal(size=(steps, width)), reads=reads)
    low = {name: jnp.asarray(x, dtype) for name, x in arrays.items()}
    weights, offsets = draw.uniform(size=(steps, *token)), draw.normal(size=(steps, *token))
    return low | dict(weights=jnp.asarray(weights, "float32"), offsets=jnp.asarray(offsets, "float32"))


@functools.partial(jax.jit, static_argnames="implementation")
def run(args, implementation):
    """The scores, and the gradients of the source and the vectors."""
    value, vectors, reads = args["value"], args["vectors"], tuple(args["reads"])

    def source(value, vectors):
        wide = value.astype(jnp.result_type(value, jnp.float32))
        square = jnp.mean(jax.lax.stop_gradient(wide) ** 2, axis=-1)
        return attn_residual(value, square, vectors, eps=EPS, implementation=implementation)

    (*values, scores, marks), pull = jax.vjp(source, value, vectors)
    dvalue, dvectors = pull((*reads, args["weights"], args["offsets"]))
    return dict(values=values, scores=scores, marks=marks), dict(value=dvalue, vectors=dvectors)


def reference(args):
    """`run` of the reference in float64, from the same numbers."""
    with jax.enable_x64(True):
        return run({k: jnp.asarray(np.asarray(x, np.float64)) for k, x in args.items()}, "reference")
