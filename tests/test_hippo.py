"""HiPPO's matrices against the projections that define them, computed by quadrature."""

import numpy as np
import pytest
import scipy.integrate
from numpy.polynomial import laguerre, legendre

from seqmodels.layers import hippo

N = 8


def nodes(low, high, count):
    z, weights = legendre.leggauss(count)
    return low + (high - low) * (z + 1) / 2, weights * (high - low) / 2


def legendre_functions(s):
    """sqrt(2n + 1) P_n(1 - 2 s), [N, ...]."""
    n = np.arange(N)
    return np.sqrt(2 * n + 1)[:, None] * legendre.legvander(1 - 2 * s, N - 1).T


def laguerre_functions(s):
    return laguerre.lagvander(s, N - 1).T * np.exp(-s / 2)


def fourier_functions(s):
    pairs = [[np.cos(2 * np.pi * k * s), np.sin(2 * np.pi * k * s)] for k in range(N // 2)]
    return np.concatenate([np.stack([pairs[0][0], 0 * s]), *np.sqrt(2) * np.array(pairs[1:])])


def wave(t):
    return np.sin(3 * t) + np.cos(t) ** 2


def wave_slope(t):
    return 3 * np.cos(3 * t) - np.sin(2 * t)


POLYNOMIAL = np.polynomial.Polynomial(np.random.default_rng(0).normal(size=N))


def periodic(t):
    return 0.3 + np.sin(2 * np.pi * t) - 0.5 * np.cos(6 * np.pi * t)


def periodic_slope(t):
    return 2 * np.pi * np.cos(2 * np.pi * t) + 3 * np.pi * np.sin(6 * np.pi * t)


CASES = {  # functions p_n, the window, nodes of the quadrature, a signal for which the matrices are exact, its slope
    "legt": (legendre_functions, 1, 40, POLYNOMIAL, POLYNOMIAL.deriv()),
    "lagt": (laguerre_functions, 120, 300, wave, wave_slope),
    "fourier": (fourier_functions, 1, 60, periodic, periodic_slope),
}


@pytest.mark.parametrize("measure", CASES)
def test_state_is_the_projection(measure):
    """The derivative of the coefficients is A x + B u, at several times."""
    functions, window, count, signal, slope = CASES[measure]
    a, b = hippo.hippo(measure, N)
    s, weights = nodes(0, window, count)
    basis = functions(s) * weights
    for t in (0.4, 1.7):
        x, dx = basis @ signal(t - s), basis @ slope(t - s)
        np.testing.assert_allclose(a @ x + b * signal(t), dx, rtol=0, atol=1e-10 * np.abs(a).max() * np.abs(x).max())


def test_legs_state_is_the_projection_of_all_history():
    a, b = hippo.hippo("legs", N)
    s, weights = nodes(0, 1, 60)
    basis = legendre_functions(s) * weights
    for t in (0.4, 5.0):
        x, dx = basis @ wave(t * (1 - s)), basis @ ((1 - s) * wave_slope(t * (1 - s)))
        np.testing.assert_allclose((a @ x + b * wave(t)) / t, dx, rtol=0, atol=1e-10)


def test_legt_tracks_a_polynomial_online():
    """Integrated by scipy from the coefficients at one time, the state is the coefficients at a later time."""
    a, b = hippo.hippo("legt", N)
    s, weights = nodes(0, 1, 40)
    basis = legendre_functions(s) * weights
    start, end = basis @ POLYNOMIAL(-s), basis @ POLYNOMIAL(1 - s)
    run = scipy.integrate.solve_ivp(lambda t, x: a @ x + b * POLYNOMIAL(t), (0, 1), start, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(run.y[:, -1], end, rtol=0, atol=1e-8)
    np.testing.assert_allclose(end @ legendre_functions(s), POLYNOMIAL(1 - s), rtol=0, atol=1e-10)  # it is complete


@pytest.mark.parametrize("size", [2, 8, 64, 256])
def test_nplr_is_legs(size):
    a, b = hippo.legs(size)
    form = hippo.nplr(size)
    p = hippo.low_rank(size)
    v = form.vectors
    close = dict(rtol=0, atol=1e-12 * np.abs(a).max())
    np.testing.assert_allclose(2 * np.real(v * form.eigenvalues @ v.conj().T) - np.outer(p, p), a, **close)
    np.testing.assert_allclose(2 * np.real(v @ form.low_rank), p, **close)
    np.testing.assert_allclose(2 * np.real(v @ form.input), b, **close)
    np.testing.assert_allclose(v.conj().T @ v, np.eye(size // 2), rtol=0, atol=1e-12)
    assert (form.eigenvalues.real == -0.5).all() and (np.diff(form.eigenvalues.imag) > 0).all()
    assert form.eigenvalues.imag.min() > 0


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: hippo.hippo("legx", 4), "measure='legx': must be one of legs, legt, lagt, fourier"),
        (lambda: hippo.hippo("fourier", 5), "size=5: must be at least 1, and even"),
        (lambda: hippo.nplr(5), "size=5: must be even and at least 2"),
    ],
)
def test_errors(call, match):
    with pytest.raises(ValueError, match=match):
        call()
