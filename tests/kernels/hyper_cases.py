"""Random arguments of a step of hyper-connections, and its values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from seqmodels.kernels.hyper_connection import hyper_connection

EPS = 1e-2  # large enough that an implementation without it is seen
LOW = ("streams", "y", "matrix")


def inputs(batch=2, length=3, streams=3, width=32, seed=0, dtype="float32") -> dict:
    """Streams, y and the matrix in `dtype`."""
    draw, token = np.random.default_rng(seed), (batch, length)
    shapes = dict(streams=(*token, streams, width), y=(*token, width), weights=(*token, streams))
    shapes |= dict(matrix=(streams, width, 2 * streams), scale=(2,), pre_bias=(streams,), post_bias=(streams,))
    arrays = {name: draw.normal(size=shape) for name, shape in shapes.items()}
    arrays["matrix"] *= (streams * width) ** -0.5  # products of one, so that no gate is shut
    return {k: jnp.asarray(x, dtype if k in LOW else jnp.float32) for k, x in arrays.items()}


@functools.partial(jax.jit, static_argnames="implementation")
def run(args, implementation):
    """The results, and the gradients of a random functional of all of them."""
    results, pull = jax.vjp(lambda args: hyper_connection(**args, eps=EPS, implementation=implementation), args)
    draw = np.random.default_rng(7)
    return results, *pull(tuple(jnp.asarray(draw.normal(size=x.shape), x.dtype) for x in results))


def by_hand(args):
    """X', u and post by the docstring's equations, in float64."""
    X, y, s, W, (a_p, a_q), b_p, b_q = (np.asarray(x, np.float64) for x in args.values())
    n = X.shape[2]
    X = X + s[..., None] * y[:, :, None]
    flat = X.reshape(*X.shape[:2], -1)
    normed = flat / np.sqrt(np.mean(flat**2, axis=-1, keepdims=True) + EPS)
    c = normed @ W.reshape(-1, 2 * n)
    pre, post = 1 / (1 + np.exp(-a_p * c[..., :n] - b_p)), 2 / (1 + np.exp(-a_q * c[..., n:] - b_q))
    return X, np.einsum("btn,btnd->btd", pre, X), post


def reference(args):
    """`run` of the reference in float64, from the same numbers."""
    with jax.enable_x64(True):
        return run({k: jnp.asarray(np.asarray(x, np.float64)) for k, x in args.items()}, "reference")
