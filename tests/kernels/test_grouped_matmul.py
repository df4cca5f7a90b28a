"""Every implementation of the grouped product against a loop over groups in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.kernels import grouped_matmul as op
from seqmodels.kernels.dispatch import UnsupportedError
from seqmodels.kernels.grouped_matmul import grouped_matmul
from tests.kernels.grouped_cases import (
    ROWS,
    SIZES,
    by_hand,
    check_a_row_that_is_not_finite,
    inputs,
    poisoned,
    products,
)
from tests.kernels.helpers import assert_close, serving, stacked

SERVING = serving(op, rows=ROWS, inner=24, outer=40, groups=5, dtype="float32")


@functools.cache
def run(implementation):
    return products(functools.partial(grouped_matmul, implementation=implementation))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("implementation", SERVING)
def test_equals_a_loop(implementation, sizes):
    """NaN in the rows of no group reaches nothing."""
    args = inputs()
    got = run(implementation)(poisoned(args, SIZES[sizes]), SIZES[sizes])
    assert_close(got, by_hand(args, SIZES[sizes]), 1e-6)


@pytest.mark.parametrize("implementation", SERVING)
def test_rows_and_groups_apart_are_exactly_zero(implementation):
    sizes = SIZES["fewer rows"]
    y, dx, dw = run(implementation)(poisoned(inputs(), sizes), sizes)
    assert not y[sum(sizes) :].any() and not dx[sum(sizes) :].any()
    assert not dw[np.array(sizes) == 0].any()


@pytest.mark.parametrize("implementation", SERVING)
def test_float64(implementation):
    with jax.enable_x64(True):
        args = inputs(dtype=np.float64)
        assert_close(run(implementation)(args, SIZES["uneven"]), by_hand(args, SIZES["uneven"]), 1e-14)


@pytest.mark.parametrize("implementation", SERVING)
def test_bfloat16_sums_in_float32(implementation):
    """One rounding, at the end, of a sum over 1200 numbers."""
    sizes = (700, 0, 500)
    args = inputs(1200, 1200, 8, 3, dtype=jnp.bfloat16)
    got = run(implementation)(args, sizes)
    for x, want in zip(got, by_hand(args, sizes), strict=True):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_allclose(x.astype(jnp.float32), want, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("implementation", SERVING)
def test_a_row_that_is_not_finite_stays_alone(implementation):
    """And in the gradient of its own group's matrix; so does a gradient, next to the other groups."""
    check_a_row_that_is_not_finite(run(implementation), inputs(), SIZES["uneven"], 1e-6)


@pytest.mark.parametrize("implementation", SERVING)
def test_vmap(implementation):
    args = stacked([inputs(seed=seed) for seed in (0, 1)])
    sizes = [SIZES["uneven"], SIZES["fewer rows"]]
    got = jax.vmap(run(implementation))(args, jnp.asarray(sizes))
    want = [by_hand(inputs(seed=seed), sizes[seed]) for seed in (0, 1)]
    assert_close(got, [np.stack(x) for x in zip(*want, strict=True)], 1e-6)


def test_mistakes_are_named():
    args = inputs()
    x, w, sizes = args["x"], args["w"], jnp.asarray(SIZES["uneven"])
    with pytest.raises(ValueError, match=r"w \[X, K, N\], got \(37, 24\) and \(5, 23, 40\)"):
        grouped_matmul(x, w[:, 1:], sizes)
    with pytest.raises(ValueError, match=r"sizes must be \[5\].* got \(4,\)"):
        grouped_matmul(x, w, sizes[1:])
    with pytest.raises(ValueError, match="integers, got float32"):
        grouped_matmul(x, w, sizes.astype(jnp.float32))
    with pytest.raises(ValueError, match="one floating dtype, got float32 and bfloat16"):
        grouped_matmul(x, w.astype(jnp.bfloat16), sizes)
    with pytest.raises(UnsupportedError, match="unknown"):
        grouped_matmul(x, w, sizes, implementation="triton")
