"""S4D (Gu et al. 2022, arXiv 2206.11893): a state space model whose matrix A is diagonal, one for each channel.

    zoh: h_t = exp(dt A) h_{t-1} + (exp(dt A) - 1) / A B x_t
    bilinear: h_t = (1 + dt A / 2) / (1 - dt A / 2) h_{t-1} + dt / (1 - dt A / 2) B x_t

Fresh models have one of the paper's matrices A (section 4): that of S4 without its part of rank 1 (legs), or simple
series like it (lin, inv), or real numbers (real).
"""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from seqmodels.fields.s4d import S4D
from seqmodels.kernels.long_conv.diagonal import diagonal_filter
from seqmodels.kernels.long_conv.dplr import real_sum
from seqmodels.layers.hippo import nplr
from seqmodels.mixers.lti import Lti, everywhere
from seqmodels.parallel import linear_scan


def legs(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues of the normal part of HiPPO-LegS, and its input: A and B [N / 2], complex."""
    form = nplr(size)
    return form.eigenvalues, form.input


def lin(size: int) -> tuple[np.ndarray, np.ndarray]:
    """A_n = -1/2 + i pi n, B_n = 1."""
    n = np.arange(size // 2)
    return -0.5 + 1j * np.pi * n, np.ones(size // 2, complex)


def inv(size: int) -> tuple[np.ndarray, np.ndarray]:
    """A_n = -1/2 + i N / pi (N / (2n + 1) - 1), B_n = 1."""
    n = np.arange(size // 2)
    return -0.5 + 1j * size / np.pi * (size / (2 * n + 1) - 1), np.ones(size // 2, complex)


def real(size: int) -> tuple[np.ndarray, np.ndarray]:
    """A_n = -(n + 1), B_n = 1. They rotate only if training makes them."""
    return -(np.arange(size // 2) + 1.0 + 0j), np.ones(size // 2, complex)


FRESH: dict[str, Callable[[int], tuple[np.ndarray, np.ndarray]]] = dict(legs=legs, lin=lin, inv=inv, real=real)


class Diagonal(NamedTuple):
    """A diagonal system in discrete time, [N / 2, E] complex: log_a, the logarithm of A, and B and C.

    log_a and B may be those of each token, [B, T, N / 2, E].
    """

    log_a: jax.Array
    b: jax.Array
    c: jax.Array
    implementation: str | None = None

    def filter(self, length: int) -> jax.Array:
        """The taps [L, E]."""
        return diagonal_filter(self.log_a, self.b * self.c, length)

    def scan(
        self, x: jax.Array, h: jax.Array, reset: jax.Array | None, mask: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """See `lti.System`."""
        inputs = self.b * x[:, :, None]
        # documents of this piece are numbered, that of the state is 0
        ids, first = (None, None) if reset is None else (jnp.cumsum(reset, axis=1), jnp.zeros(len(x), int))
        h, last = linear_scan(
            jnp.broadcast_to(self.log_a, inputs.shape),
            inputs,
            initial_state=h,
            segment_ids=ids,
            initial_segment=first,
            mask=mask,
            implementation=self.implementation,
        )
        return real_sum(self.c * h), last


def zoh(a: jax.Array, b: jax.Array, dt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log A and B in discrete time, of A and B [N / 2, E] and dt [E], for an input that is held for each step."""
    return dt * a, jnp.expm1(dt * a) / a * b


def bilinear(a: jax.Array, b: jax.Array, dt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same by the rule of Tustin."""
    half = dt / 2 * a
    return jnp.log((1 + half) / (1 - half)), dt * b / (1 - half)


RULES = dict(zoh=zoh, bilinear=bilinear)


@struct.dataclass
class Eigen:
    """The continuous system of a layer, see `lti.Continuous`: a, b [N / 2, E] complex and dt [E]."""

    a: jax.Array
    b: jax.Array
    dt: jax.Array
    rule: str = struct.field(pytree_node=False)
    implementation: str | None = struct.field(pytree_node=False)  # of `linear_scan`

    def at(self, c: jax.Array, stretch: float | jax.Array) -> Diagonal:
        """It with the readout c in discrete time."""
        each = stretch[:, :, None] if isinstance(stretch, jax.Array) else stretch
        return Diagonal(*RULES[self.rule](self.a, self.b, each * self.dt), c, self.implementation)


class S4d(Lti):
    """S4D mixer. Its options are declared in seqmodels/fields/s4d.py."""

    state: int = S4D["state"]
    init_A: str = S4D["init_A"]
    rule: str = S4D["rule"]
    dt_min: float = S4D["dt_min"]
    dt_max: float = S4D["dt_max"]
    dt_scale: float = S4D["dt_scale"]

    options = S4D
    operations: ClassVar[tuple[str, ...]] = ("linear_scan", "long_conv")
    follows_time: ClassVar[str] = "token"
    state_operations = 6 + 4 + 4  # a h, + b x, and the readout
    counted = 2 * (2 + 2 + 2)  # A, B and C

    @nn.nowrap
    def declare_system(self) -> Eigen:
        """Fresh, it is one of FRESH in every channel."""
        eigenvalues, inputs = FRESH[self.init_A](self.state)
        decay = -jnp.exp(self.per_state("A_log", everywhere(np.log(-eigenvalues.real))))
        a = jax.lax.complex(decay, self.per_state("A_imag", everywhere(eigenvalues.imag)))
        B, dt = self.complex_per_state("B", inputs), self.step_size()
        return Eigen(a, B, dt, self.rule, self.implementation.get("linear_scan"))
