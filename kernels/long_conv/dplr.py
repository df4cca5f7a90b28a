"""The filter of S4: a state space model whose matrix is diagonal plus low rank (Gu et al. 2022, arXiv 2111.00396).

    dh/dt = (diag(L) - P P*) h + B x,   y = 2 Re(C h),   one of each pair of conjugate states is kept

The filter of L taps under the bilinear rule is found from its values at the L-th roots of unity, z = exp(-i theta),

    sum_l K_l z^l = exp(i theta / 2) (S(CB) - g S(CP) S(P*B) / (1 + g S(P*P)))          g = cos(theta / 2)
    S(v) = sum_n v_n / (s - g L_n) + v_n^* / (s - g L_n^*)                              s = 2i / dt sin(theta / 2)

which is the paper's Cauchy product with Woodbury's identity (appendix C.3), multiplied out so that it has no pole at
z = -1. C is here the paper's C~ = C (1 - A^L), with the matrix A of a step: `truncated_readout` finds it from C, so a
model's parameters do not depend on L.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ELEMENTS = 2**18  # of the largest array of one piece of roots, roots x N x E


class Dplr(NamedTuple):
    """A continuous system. All are [N, E] complex, one of each conjugate pair, except dt [E]; real parts of L < 0.

    P stands for both factors of the low-rank part. So the matrix plus its adjoint is negative, and a step of any length
    shrinks every state: the recurrence, and powers of its matrix, are stable whatever the parameters.
    """

    L: jax.Array
    P: jax.Array
    B: jax.Array
    dt: jax.Array


class Step(NamedTuple):
    """A system by the bilinear rule: h_t = a h_{t-1} - w 2 Re(sum_n q_n h_{n,t-1}) + b x_t, all [N, E] complex."""

    a: jax.Array
    w: jax.Array
    q: jax.Array
    b: jax.Array

    def __call__(self, h: jax.Array, x: jax.Array) -> jax.Array:
        """The next state [..., N, E] of h and x [..., E]: of order N, as no matrix is made."""
        return self.a * h - self.w * real_sum(self.q * h)[..., None, :] + self.b * x[..., None, :]


def real_sum(v: jax.Array) -> jax.Array:
    """[..., E]: the sum over states [..., N, E] and their conjugates."""
    return 2 * jnp.sum(v.real, axis=-2)


def bilinear(system: Dplr) -> Step:
    """The step (1 - dt/2 A)^-1 (1 + dt/2 A) h + (1 - dt/2 A)^-1 dt B x, by Woodbury's identity."""
    half = system.dt / 2
    d = 1 / (1 - half * system.L)
    q = 2 * system.P.conj() * d
    w = half * d * system.P / (1 + half * real_sum(system.P.conj() * d * system.P))
    b = 2 * half * d * system.B
    return Step(d * (1 + half * system.L), w, q, b - w * real_sum(system.P.conj() * b))


def matrix(step: Step) -> jax.Array:
    """The step as a real matrix [E, 2N, 2N] on the states [Re h, Im h], from the left."""
    states, channels = step.a.shape
    unit = jnp.eye(states, dtype=step.a.dtype)
    basis = jnp.concatenate([unit, 1j * unit])[..., None]
    columns = step(jnp.broadcast_to(basis, (2 * states, states, channels)), jnp.zeros((channels,), step.a.real.dtype))
    return jnp.moveaxis(jnp.concatenate([columns.real, columns.imag], axis=1), (2, 1, 0), (0, 1, 2))


def truncated_readout(step: Step, c: jax.Array, length: int) -> jax.Array:
    """C (1 - A^L) [N, E] of the readout C, by repeated squaring of matrices [E, 2N, 2N]."""
    high = jax.lax.Precision.HIGHEST
    power, row = matrix(step), jnp.concatenate([c.real, -c.imag]).T  # row @ [Re h, Im h] = Re(C h)
    rest = row
    while length:
        if length % 2:
            rest = jnp.einsum("ei,eij->ej", rest, power, precision=high)
        length //= 2
        if length:
            power = jnp.einsum("eij,ejk->eik", power, power, precision=high)
    real, imaginary = jnp.split((row - rest).T, 2)
    return real - 1j * imaginary


def dplr_filter(system: Dplr, c: jax.Array, length: int) -> jax.Array:
    """The first `length` taps [L, E] of the system with readout `c` [N, E], in real numbers."""
    truncated = truncated_readout(bilinear(system), c, length)
    return jnp.fft.irfft(spectrum(system, truncated, length), length, axis=0)


def spectrum(system: Dplr, c: jax.Array, length: int) -> jax.Array:
    """The filter's values [L // 2 + 1, E] at the roots of unity of angles 0 to pi, piece by piece of the roots.

    Args:
        c: [N, E] the truncated readout.
    """
    L, P, B, dt = system
    count = length // 2 + 1
    size = max(min(ELEMENTS // L.size, count), 1)
    pieces = -(-count // size)
    halves = np.pi / length * np.minimum(np.arange(pieces * size), count - 1).reshape(pieces, size)  # theta / 2
    numerators = (c * B, c * P, P.conj() * B, P.conj() * P)

    @jax.checkpoint  # else the sums' terms, [L, N, E], would be kept for the backward pass
    def values(root):
        s, g, turn = (v[:, None] for v in root)
        s = s * (2 / dt)
        one, other = (1 / (s[:, None] - g[:, None] * v) for v in (L, L.conj()))
        cb, cp, pb, pp = (
            jnp.einsum("rne,ne->re", one, v) + jnp.einsum("rne,ne->re", other, v.conj()) for v in numerators
        )
        return turn * (cb - g * cp * pb / (1 + g * pp))

    angles = (1j * np.sin(halves), np.cos(halves), np.exp(1j * halves))
    roots = [jnp.asarray(v, dt.dtype if np.isrealobj(v) else L.dtype) for v in angles]
    return jax.lax.map(values, roots).reshape(pieces * size, -1)[:count]
