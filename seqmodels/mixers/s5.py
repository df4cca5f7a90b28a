"""S5 (Smith et al. 2023, arXiv 2208.04933): one linear system for all channels, with a diagonal complex state.

    dx/dt = L x + B u,   y = 2 Re(C x) + D u,   output = g sigmoid(W g) with g = gelu(y)

L is diagonal and holds one eigenvalue of each conjugate pair. Each state has its own step dt: over a step in which the
input is held (zero-order hold), x_k = exp(dt L) x_{k-1} + (exp(dt L) - 1) / L B u_k. A fresh L is HiPPO-N, the normal
part of LegS, in J equal blocks. Names and shapes of the parameters are those of the authors' code, except `log_step`,
which is a vector there with one more axis.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from seqmodels.branch import Branch, State, real
from seqmodels.fields.s5 import S5 as OPTIONS
from seqmodels.layers.hippo import nplr
from seqmodels.layers.parameter import Init, normal, parameter, zeros
from seqmodels.mixers.lti import fresh_log_dt
from seqmodels.parallel import linear_scan
from seqmodels.sequence import Sequence

SLOWEST_DECAY = 1e-4  # smallest -Re(L) with clip_eigs

Declared = dict[str, Any]  # options of `parameter`

# Group and weight decay of B, C and D by the field `rates`; without `decay`, matrices have it, and vectors do not.
REST: Declared = dict(group="")
SSM: Declared = dict(group="ssm", decay=False)
DECAYED_SSM: Declared = dict(group="ssm", decay=True)
RATES: dict[str, tuple[Declared, Declared, Declared]] = {
    "standard": (SSM, REST, REST),
    "BandCdecay": (DECAYED_SSM, REST, REST),
    "BfastandCdecay": (REST, REST, REST),
    "noBCdecay": (SSM, SSM, SSM),
}


def discretise(eigenvalues: jax.Array, step: jax.Array, rule: str) -> tuple[jax.Array, jax.Array]:
    """Logarithm of the decay, and the factor of B u: complex64, in the shape of `step`.

    Args:
        eigenvalues: [P / 2] complex64, L. step: [..., P / 2] float32, dt.
        rule: "zoh": exp(dt L) and (exp(dt L) - 1) / L; "bilinear": (1 + dt L / 2) / (1 - dt L / 2) and
            dt / (1 - dt L / 2).
    """
    z = step * eigenvalues
    if rule == "zoh":
        return z, jnp.expm1(z) / eigenvalues
    return jnp.log1p(z / 2) - jnp.log1p(-z / 2), step / (1 - z / 2)


def to_pairs(x: jax.Array) -> jax.Array:
    """Complex [...] as real and imaginary parts [..., 2]."""
    return jnp.stack([x.real, x.imag], axis=-1)


def to_complex(x: jax.Array) -> jax.Array:
    """Real and imaginary parts [..., 2] as complex [...]."""
    return jax.lax.complex(x[..., 0], x[..., 1])


def fresh_eigenvalues(blocks: int) -> tuple[Init, Init]:
    """Real and imaginary parts of HiPPO-N's eigenvalues, the same in every block."""

    def part(name: str) -> Init:
        def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
            values = getattr(nplr(2 * shape[0] // blocks).eigenvalues, name)
            return jnp.asarray(np.tile(values, blocks), dtype)

        return init

    return part("real"), part("imag")


def fresh_B(blocks: int) -> Init:
    """V* B for a real B [P, D] of variance 1 / P, in each block: [P / 2, D, 2]."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        half, width, _ = shape
        vectors = nplr(2 * half // blocks).vectors
        B = nn.initializers.lecun_normal()(key, (2 * half, width), dtype)
        turned = jnp.einsum("nm,jnd->jmd", vectors.conj(), B.reshape(blocks, -1, width), precision="highest")
        return to_pairs(turned.reshape(half, width)).astype(dtype)

    return init


def fresh_C(blocks: int, distribution: str) -> Init:
    """C V for a complex C [D, P], in each block: [D, P / 2, 2].

    Args:
        distribution: of real and imaginary parts: "trunc_standard_normal", with variance 1 / P; "lecun_normal", with
            variance 1 / (P D), as in the authors' code; "complex_normal", with variance 1 / 2 and without V.
    """

    def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
        width, half, _ = shape
        if distribution == "complex_normal":
            return normal(math.sqrt(0.5))(key, shape, dtype)
        vectors = nplr(2 * half // blocks).vectors
        rows = width if distribution == "lecun_normal" else 1
        lecun = nn.initializers.variance_scaling(1.0 / rows, "fan_in", "truncated_normal", in_axis=1, out_axis=2,
                                                 batch_axis=0)  # fmt: skip
        C = to_complex(lecun(key, (width, 2 * half, 2), dtype))
        turned = jnp.einsum("djn,nm->djm", C.reshape(width, blocks, -1), vectors, precision="highest")
        return to_pairs(turned.reshape(width, half)).astype(dtype)

    return init


class S5(Branch):
    """S5 mixer. Its options are declared in seqmodels/fields/s5.py."""

    state: int = OPTIONS["state"]
    blocks: int = OPTIONS["blocks"]
    discretization: str = OPTIONS["discretization"]
    activation: str = OPTIONS["activation"]
    C_init: str = OPTIONS["C_init"]
    clip_eigs: bool = OPTIONS["clip_eigs"]
    rates: str = OPTIONS["rates"]
    dt_global: bool = OPTIONS["dt_global"]
    dt_min: float = OPTIONS["dt_min"]
    dt_max: float = OPTIONS["dt_max"]
    dt_scale: float = OPTIONS["dt_scale"]

    options = OPTIONS
    operations = ("linear_scan",)
    biased = True
    follows_time = "token"

    @property
    def pairs(self) -> int:
        """P / 2, complex numbers of state."""
        return self.state // 2

    def setup(self) -> None:
        width, pairs = self.width, self.pairs
        of_B, of_C, of_D = RATES[self.rates]
        real_part, imaginary_part = fresh_eigenvalues(self.blocks)
        self.Lambda_re = parameter(self, "Lambda_re", (pairs,), ("inner",), real_part, **SSM)
        self.Lambda_im = parameter(self, "Lambda_im", (pairs,), ("inner",), imaginary_part, **SSM)
        of_step = REST | dict(decay=True) if self.dt_global else SSM
        log_step = fresh_log_dt(self.dt_min, self.dt_max)
        self.log_step = parameter(self, "log_step", (pairs,), ("inner",), log_step, **of_step)
        B, C = fresh_B(self.blocks), fresh_C(self.blocks, self.C_init)
        self.B = parameter(self, "B", (pairs, width, 2), ("inner", "embed", None), B, dtype=self.dtype, **of_B)
        self.C = parameter(self, "C", (width, pairs, 2), ("embed", "inner", None), C, dtype=self.dtype, **of_C)
        self.D = parameter(self, "D", (width,), ("embed",), normal(1.0), **of_D)
        outputs = {"gelu": (), "full_glu": ("value", "gate")}.get(self.activation, ("gate",))
        self.projections = {name: self.dense(name) for name in outputs}

    @nn.nowrap
    def dense(self, name: str) -> tuple[jax.Array, jax.Array | None]:
        """Matrix [D, D] and bias [D], or None, of the gated output."""
        shape, axes = (self.width, self.width), ("embed", None)
        weight = self.matrix(f"{name}_proj", shape, axes, normal(self.width**-0.5))
        return weight, parameter(self, f"{name}_bias", (self.width,), (None,), zeros) if self.bias else None

    @nn.nowrap
    def init_state(self, batch: int, max_length: int | None = None) -> jax.Array:
        """[B, P / 2, 2] float32: real and imaginary parts."""
        return jnp.zeros((batch, self.pairs, 2), jnp.float32)

    @nn.nowrap
    def flops(self, length: int) -> float:
        """The input's factor and the recurrence, both complex, and the skip connection."""
        return (6 + 6 + 2) * self.pairs + 2 * self.width

    def __call__(self, x: jax.Array, seq: Sequence, state: State = None) -> tuple[jax.Array, State]:
        """x [B, T, D] to y [B, T, D] and the new state."""
        state = self.init_state(x.shape[0]) if state is None else state
        x = real(x, seq, self.dtype)
        # States, decays and steps are float32 and complex64 whatever the dtype, as they are summed over time.
        wide = dict(preferred_element_type=jnp.float32)
        Bu = to_complex(checkpoint_name(jnp.einsum("btd,pdc->btpc", x, self.B, **wide), "projected"))
        log_decay, factor = self.recurrence(seq)
        h, last = linear_scan(
            jnp.broadcast_to(log_decay, Bu.shape),
            factor * Bu,
            initial_state=to_complex(state),
            implementation=self.implementation.get("linear_scan"),
            **seq.documents(),
        )
        h = checkpoint_name(h, "scan")
        parts = jnp.stack([h.real, -h.imag], axis=-1).astype(self.dtype)  # Re(C h) = Re(C) Re(h) - Im(C) Im(h)
        y = 2 * jnp.einsum("btpc,dpc->btd", parts, self.C, **wide) + self.D * x
        return self.activate(y.astype(self.dtype)), to_pairs(last)

    def recurrence(self, seq: Sequence) -> tuple[jax.Array, jax.Array]:
        """Log decay and factor of the input, complex64 [P / 2], or [B, T, P / 2] where tokens have steps."""
        decay = jnp.minimum(self.Lambda_re, -SLOWEST_DECAY) if self.clip_eigs else self.Lambda_re
        step = jnp.exp(self.log_step) * seq.stretch(self.dt_scale)
        return discretise(jax.lax.complex(decay, self.Lambda_im), step, self.discretization)

    def activate(self, y: jax.Array) -> jax.Array:
        """The gated output of y [B, T, D]."""

        def project(name: str) -> jax.Array:
            weight, bias = self.projections[name]
            product = g @ weight
            return product if bias is None else product + bias.astype(self.dtype)

        g = jax.nn.gelu(y, approximate=True)
        if self.activation == "gelu":
            return g
        gate = jax.nn.sigmoid(project("gate"))
        inside = {"half_glu1": lambda: g, "half_glu2": lambda: y, "full_glu": lambda: project("value")}
        return inside[self.activation]() * gate
