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


def check_a_row_that_is_not_finite(run, args, sizes, tolerance):
    """An infinity in x, and NaN in dy, in the first and the last row of the fourth group, stay in this group."""
    first, last = sum(sizes[:3]), sum(sizes[:4]) - 1
    want = by_hand(args, sizes)
    given = dict(x=args["x"].at[first].set(np.inf), dy=args["dy"].at[last].set(np.nan))
    for name, row, at in (("x", first, 0), ("dy", last, 1)):
        got = run(args | {name: given[name]}, sizes)
        others = np.arange(len(args["x"])) != row
        whole = [np.asarray(x, np.float32) for x in got]
        near = lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * np.abs(y).max())  # noqa: E731
        near(whole[at][others], want[at][others])
        near(whole[1 - at], want[1 - at])
        near(np.delete(whole[2], 3, axis=0), np.delete(want[2], 3, axis=0))
        assert not np.isfinite(whole[at][row]).any() and not np.isfinite(whole[2][3]).all()


def products(operation):
    """A function of inputs and sizes: y, and the gradients of x and w by its rule of differentiation."""

    @jax.jit
    def run(args, sizes):
        y, pull = jax.vjp(lambda x, w: operation(x, w, sizes), args["x"], args["w"])
        return y, *pull(args["dy"])

    return lambda args, sizes: run(args, jnp.asarray(sizes, jnp.int32))
