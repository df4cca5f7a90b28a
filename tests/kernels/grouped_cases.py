"""Sizes of groups, random arguments, and a loop in float64, whose results every implementation must give."""

import jax
import jax.numpy as jnp
import numpy as np

SIZES = {  # of five groups, in 37 rows
    "uneven": (7, 9, 1, 12, 8),
    "empty groups": (0, 16, 0, 21, 0),
    "one group": (0, 0, 37, 0, 0),
    "fewer rows": (5, 0, 11, 3, 0),
    "no row": (0, 0, 0, 0, 0),
}
ROWS = 37


def inputs(rows=ROWS, inner=24, outer=40, groups=5, seed=0, dtype=np.float32) -> dict:
    """x, w and dy."""
    draw = np.random.default_rng(seed)
    shapes = dict(x=(rows, inner), w=(groups, inner, outer), dy=(rows, outer))
    return {name: jnp.asarray(draw.normal(size=shape), dtype) for name, shape in shapes.items()}


def poisoned(args, sizes) -> dict:
    """With NaN in the rows that belong to no group."""
    real = np.arange(len(args["x"]))[:, None] < sum(sizes)
    return args | {name: jnp.where(real, args[name], jnp.nan) for name in ("x", "dy")}


def by_hand(args, sizes):
    """y, dx and dw, group by group."""
    x, w, dy = (np.asarray(args[name], np.float64) for name in ("x", "w", "dy"))
    y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
    start = 0
    for group, size in enumerate(sizes):
        rows = slice(start, start + size)
        y[rows], dx[rows], dw[group] = x[rows] @ w[group], dy[rows] @ w[group].T, x[rows].T @ dy[rows]
        start += size
    return y, dx, dw


def products(operation):
    """A function of inputs and sizes: y, and the gradients of x and w by its rule of differentiation."""

    @jax.jit
    def run(args, sizes):
        y, pull = jax.vjp(lambda x, w: operation(x, w, sizes), args["x"], args["w"])
        return y, *pull(args["dy"])

    return lambda args, sizes: run(args, jnp.asarray(sizes, jnp.int32))
