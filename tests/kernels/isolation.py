"""What is not finite in one document, in padding or in a dropped state reaches no other document: one check for all."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqmodels.kernels.arrays import expand_to

GOOD_BAD_GOOD = (0.3, 0.65)  # where the second and the third document begin, as shares of the length


def layout(length: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Two rows of three documents, and which tokens belong to the second document, [2, T] bool.

    The first row goes on with its state's document. The second begins another one at once, and has padding.
    """
    first, second = (int(share * length) for share in GOOD_BAD_GOOD)
    number = np.arange(length)
    ids = (number >= first).astype(np.int32) + (number >= second)
    mask = np.ones((2, length), bool)
    mask[1, [first - 1, first, second, length - 1]] = False
    static = dict(segment_ids=np.stack([ids, ids]), initial_segment=np.array([0, 7], np.int32), mask=mask)
    return static, np.stack([ids == 1] * 2)


def spoilt(args: Mapping[str, Any], names: tuple[str, ...], static: Mapping[str, Any], bad: np.ndarray) -> dict:
    """`args` with NaN and infinities in some tokens of the second documents, in padding, and in the second row's state.

    names: the arrays [2, T, ...].
    """
    padding = ~static["mask"]
    draw, out = np.random.default_rng(5), dict(args)
    values = np.array([np.nan, np.inf, -np.inf])
    for name in names:
        x = np.array(args[name])
        hit = padding | (bad & (draw.random(bad.shape) < 0.5))
        hit[0, np.flatnonzero(bad[0])[-1]] = hit[0, np.flatnonzero(bad[0])[0]] = True  # next to the other documents
        x[hit] = draw.choice(values, x[hit].shape)
        out[name] = x
    out["initial_state"] = np.array(args["initial_state"])
    out["initial_state"][1] = draw.choice(values, out["initial_state"][1].shape)
    return out


def compiled(operation: Callable, static: Mapping[str, Any]) -> Callable:
    """A function of `args` and cotangents: (y, final state) and gradients. It is compiled once for several calls."""

    @jax.jit
    def values(args, cotangents):
        out, pull = jax.vjp(lambda args: operation(**args, **static), args)
        return out, pull(jax.tree.map(lambda c, x: c.astype(x.dtype), cotangents, out))[0]

    return lambda args, cotangents: values({name: jnp.asarray(x) for name, x in args.items()}, cotangents)


def check_isolation(
    operation: Callable, args: Mapping[str, Any], names: tuple[str, ...], tolerance: float = 1e-6
) -> None:
    """Outputs and gradients of the finite documents are those of a batch in which all is finite.

    Args:
        operation: takes `args`, segment_ids, initial_segment and mask.
        args: two rows; names: those with a time axis.
    """
    length = args[names[0]].shape[1]
    static, bad = layout(length)
    shapes = jax.eval_shape(lambda args: operation(**args, **static), dict(args))
    draw = np.random.default_rng(6)
    dy, dstate = (draw.normal(size=x.shape) for x in shapes)
    run = compiled(operation, static)
    wanted, wanted_gradients = run(args, (dy, dstate))
    not_finite = np.where(expand_to(bad, dy.ndim), np.nan, dy)  # as the gradient of a loss of what is not finite
    not_finite = np.where(expand_to(static["mask"], dy.ndim), not_finite, np.nan)
    given = spoilt(args, names, static, bad)
    (y, state), gradients = run(given, (not_finite, dstate))
    good = ~bad & static["mask"]

    def near(x, want, label):
        x, want = np.asarray(x, np.float64), np.asarray(want, np.float64)
        error = np.abs(x - want).max() / max(np.abs(want).max(), 1e-30)
        assert error <= tolerance, f"{label}: relative error {error:.1e}"

    near(np.asarray(y)[good], np.asarray(wanted[0])[good], "y")
    near(state, wanted[1], "final state")
    assert not np.isfinite(np.asarray(y)[bad & static["mask"]]).all(), "the second document hides what is not finite"
    for name in names:
        near(np.asarray(gradients[name])[good], np.asarray(wanted_gradients[name])[good], f"gradient of {name}")
    near(gradients["initial_state"], wanted_gradients["initial_state"], "gradient of initial_state")
