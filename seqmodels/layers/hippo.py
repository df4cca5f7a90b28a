"""HiPPO (Gu et al. 2020, arXiv 2008.07669): linear systems whose states are the coefficients of all input so far.

    dx/dt = A x + B u                                        (legs: dx/dt = (A x + B u) / t)
    x_n(t) = integral of u(t - s) p_n(s) over s              (legs: over t, too)

s is the time that has passed since the input, and the functions p_n are orthonormal (legs: in the mean over [0, t]):

| measure | p_n(s) | A and B are exact for |
|---|---|---|
| legs | sqrt(2n + 1) P_n(1 - 2 s / t) on [0, t] | every u |
| legt | sqrt(2n + 1) P_n(1 - 2 s) on [0, 1] | polynomials of degrees below N |
| lagt | L_n(s) exp(-s / 2) on [0, inf) | every u |
| fourier | 1, 0, sqrt(2) cos(2 pi s), sqrt(2) sin(2 pi s), .. on [0, 1] | u of period 1, of N / 2 - 1 harmonics |

P_n and L_n are the polynomials of Legendre and Laguerre. The windows of legt and fourier have length 1; A / w and B / w
have one of length w. These two forget what leaves the window by its value in the expansion, hence the last column.
In fourier that value is twice the series minus u, as a series is the mean of both ends where they differ.
Everything here is NumPy in float64: in float32 the eigenvectors of larger LegS matrices are wrong.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Array = np.ndarray


def legs(size: int) -> tuple[Array, Array]:
    """A_nk = -sqrt((2n + 1)(2k + 1)) below the diagonal, -(n + 1) on it; B_n = sqrt(2n + 1)."""
    b = np.sqrt(2 * np.arange(size) + 1.0)
    return -np.tril(np.outer(b, b), -1) - np.diag(np.arange(size) + 1.0), b


def legt(size: int) -> tuple[Array, Array]:
    """A_nk = -sqrt((2n + 1)(2k + 1)), times (-1)^(n - k) above the diagonal; B_n = sqrt(2n + 1)."""
    n = np.arange(size)
    b = np.sqrt(2 * n + 1.0)
    sign = np.where(n[:, None] < n, (-1.0) ** (n[:, None] - n), 1.0)
    return -np.outer(b, b) * sign, b


def lagt(size: int) -> tuple[Array, Array]:
    """A_nk = -1 below the diagonal, -1/2 on it; B_n = 1."""
    return np.eye(size) / 2 - np.tril(np.ones((size, size))), np.ones(size)


def fourier(size: int) -> tuple[Array, Array]:
    """A turns each pair of cosine and sine, minus 2 p p^T; B = 2 p, with p = 1, 0, sqrt(2), 0, .. The size is even."""
    p = np.zeros(size)
    p[::2] = np.sqrt(2.0)
    p[0] = 1.0
    turn = np.zeros((size, size))
    cosine, frequency = np.arange(0, size, 2), 2 * np.pi * np.arange(size // 2)
    turn[cosine, cosine + 1], turn[cosine + 1, cosine] = -frequency, frequency
    return turn - 2 * np.outer(p, p), 2 * p


MEASURES: dict[str, Callable[[int], tuple[Array, Array]]] = dict(legs=legs, legt=legt, lagt=lagt, fourier=fourier)


def hippo(measure: str, size: int) -> tuple[Array, Array]:
    """A [N, N] and B [N] of a measure, float64.

    Raises:
        ValueError: there is no such measure, the size is below 1, or it is odd with fourier.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure={measure!r}: must be one of {', '.join(MEASURES)}")
    if size < 1 or (measure == "fourier" and size % 2):
        raise ValueError(f"size={size}: must be at least 1, and even with measure='fourier'")
    return MEASURES[measure](size)


class Nplr(NamedTuple):
    """LegS as a normal matrix plus one of rank 1, in the basis of eigenvectors of the normal one.

    Only one of each pair of conjugate eigenvalues is kept, so M = N / 2, and a real vector y is 2 Re(V V* y).

        A = 2 Re(V diag(eigenvalues) V*) - p p^T,    P = V* p,    B = V* b

    Attributes:
        eigenvalues: [M], real parts -1/2, imaginary parts above zero and rising.
        low_rank: [M] P. input: [M] B. vectors: [N, M] V.
    """

    eigenvalues: Array
    low_rank: Array
    input: Array
    vectors: Array


def low_rank(size: int) -> Array:
    """p [N] with p_n = sqrt(n + 1/2): A + p p^T + I / 2 is skew-symmetric for LegS."""
    return np.sqrt(np.arange(size) + 0.5)


def nplr(size: int) -> Nplr:
    """The normal plus low-rank form of LegS (Gu et al. 2022, arXiv 2111.00396, theorem 1), complex128.

    The normal part is -1/2 plus a skew-symmetric matrix S, so eigenvalues come from the Hermitian -i S, which is exact
    to rounding; a solver for general matrices is not.

    Raises:
        ValueError: the size is odd or below 2.
    """
    if size < 2 or size % 2:
        raise ValueError(f"size={size}: must be even and at least 2")
    a, b = legs(size)
    p = low_rank(size)
    normal = a + np.outer(p, p)
    skew = (normal - normal.T) / 2
    frequencies, vectors = np.linalg.eigh(-1j * skew)
    upper = slice(size // 2, size)  # eigh sorts: the upper half is positive
    v = vectors[:, upper]
    return Nplr(-0.5 + 1j * frequencies[upper], v.conj().T @ p, v.conj().T @ b, v)
