"""What S4, S4D and H3 share: linear systems that are the same for all tokens, one for each channel.

    h_t = A h_{t-1} + B x_t,   y_t = 2 Re(C h_t) + D x_t        h of N / 2 complex numbers, one of each conjugate pair

From the first token on this is a convolution with the filter C A^l B, which is how such models are trained, packed
documents included. From a state on it is run as a recurrence, token by token or in chunks. Both are the same function
of the same parameters, for rows of any length.
"""

from collections.abc import Callable
from typing import ClassVar, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from seqmodels.branch import Branch, State, real
from seqmodels.kernels.arrays import join_time, split_time
from seqmodels.kernels.segments import resets
from seqmodels.layers.parameter import Init, normal, ones, parameter, residual_std, zeros
from seqmodels.parallel import long_conv
from seqmodels.sequence import Sequence

SPAN = 64  # tokens of which the recurrence keeps every state at a time, B x SPAN x N / 2 x E complex numbers


class System(Protocol):
    """A system of discrete time without its skip D."""

    def filter(self, length: int) -> jax.Array:
        """The taps 2 Re(C A^l B) for l below `length`, [L, E] float32."""

    def scan(
        self, x: jax.Array, h: jax.Array, reset: jax.Array | None, mask: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """y [B, T, E] float32 and the last state, of x [B, T, E] and h [B, N / 2, E] complex; reset, mask: [B, T]."""


def fresh_log_dt(smallest: float, largest: float) -> Init:
    """log of a step size that is log-uniform in [smallest, largest]."""
    low, high = jnp.log(smallest), jnp.log(largest)
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, low, high)


def everywhere(values: np.ndarray) -> Init:
    """These numbers [...] in every channel: [..., E]."""
    return lambda key, shape, dtype=jnp.float32: jnp.broadcast_to(jnp.asarray(values, dtype)[..., None], shape)


def pair(value: jax.Array) -> jax.Array:
    """The complex array [...] of the real and imaginary parts [2, ...]."""
    return jax.lax.complex(value[0], value[1])


def parts(value: jax.Array) -> dict[str, jax.Array]:
    """A complex array as a state of real arrays, which any code can store."""
    return dict(real=value.real, imag=value.imag)


# The system in discrete time, by the factor of its steps: a number, or [B, T, 1] for the tokens of a scan.
SystemAt = Callable[[float | jax.Array], System]


def in_spans(
    system: SystemAt,
    stretch: float | jax.Array,
    x: jax.Array,
    h: jax.Array,
    reset: jax.Array | None,
    mask: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """As `System.scan`, SPAN tokens at a time; the backward pass computes the states within a span again."""
    length = x.shape[1]
    if length <= SPAN:
        return system(stretch).scan(x, h, reset, mask)
    if mask is None and length % SPAN:  # the last span is padded
        mask = jnp.ones(x.shape[:2], bool)

    steps = stretch if isinstance(stretch, jax.Array) else None  # of each token

    @jax.checkpoint
    def span(h, tokens):
        steps, x, *documents = tokens
        y, h = system(stretch if steps is None else steps).scan(x, h, *documents)
        return h, y

    h, y = jax.lax.scan(span, h, split_time((steps, x, reset, mask), SPAN))
    return join_time(y, length), h


class Lti(Branch):
    """Base of S4 and S4D, which say what the system is. y = GLU(gelu(S(x)) W), as in the authors' code."""

    state: int = 64
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dt_scale: float = 1.0

    operations: ClassVar[tuple[str, ...]] = ("long_conv",)
    biased = True

    @property
    def pairs(self) -> int:
        """Complex states of a channel."""
        return self.state // 2

    @nn.nowrap
    def init_state(self, batch: int, max_length: int | None = None) -> dict[str, jax.Array]:
        """real and imag [B, N / 2, E] float32."""
        return parts(jnp.zeros((batch, self.pairs, self.width), jnp.complex64))

    @nn.nowrap
    def system(self) -> SystemAt:
        """Declares the parameters, and returns the system in discrete time by the factor of its steps."""
        raise NotImplementedError

    @nn.nowrap
    def step_size(self) -> jax.Array:
        """dt [E]."""
        fresh = fresh_log_dt(self.dt_min, self.dt_max)
        return self.dt_scale * jnp.exp(parameter(self, "log_dt", (self.width,), ("inner",), fresh, group="ssm"))

    @nn.nowrap
    def per_state(self, name: str, init: Init) -> jax.Array:
        """Declare a parameter [N / 2, E] of the matrices A and B: without weight decay, in the group "ssm"."""
        axes, shape = ("state", "inner"), (self.pairs, self.width)
        return parameter(self, name, shape, axes, init, decay=False, group="ssm")

    @nn.nowrap
    def complex_per_state(self, name: str, fresh: np.ndarray) -> jax.Array:
        """The same of complex numbers, all channels beginning with `fresh` [N / 2]: [N / 2, E]."""
        axes, shape = (None, "state", "inner"), (2, self.pairs, self.width)
        init = everywhere(np.stack([fresh.real, fresh.imag]))
        return pair(parameter(self, name, shape, axes, init, decay=False, group="ssm"))

    @nn.nowrap
    def readout(self) -> jax.Array:
        """C [N / 2, E], fresh from a complex normal distribution."""
        axes, shape = (None, "state", "inner"), (2, self.pairs, self.width)
        return pair(parameter(self, "C", shape, axes, normal(0.5**0.5)))

    @nn.nowrap
    def filtered(self, x: jax.Array, seq: Sequence, state: State) -> tuple[jax.Array, dict[str, jax.Array]]:
        """y [B, T, E] in x's dtype and the new state: by convolution from the first token, by recurrence from a state.

        Args:
            x: [B, T, E], zero on padding.
            state: as in `init_state`, or None.
        """
        system = self.system()
        skip = parameter(self, "D", (self.width,), ("inner",), ones)
        old = self.init_state(x.shape[0]) if state is None else state
        h = jax.lax.complex(old["real"], old["imag"])
        stretch = seq.stretch()
        read, h = in_spans(system, stretch, x.astype(jnp.float32), h, resets(**seq.documents()), seq.mask)
        if state is not None or isinstance(stretch, jax.Array):  # with steps of each token it is no convolution
            return (read + skip * x).astype(x.dtype), parts(h)
        # Nothing then computes what was read above, and nothing the last state unless it is asked for.
        implementation = self.implementation.get("long_conv")
        taps = system(stretch).filter(x.shape[1])
        return long_conv(x, taps, skip, implementation=implementation, **seq.documents()), parts(h)

    @nn.compact
    def __call__(self, x: jax.Array, seq: Sequence, state: State = None) -> tuple[jax.Array, State]:
        """x [B, T, D] to y [B, T, D] and the new state."""
        y, state = self.filtered(real(x, seq, self.dtype), seq, state)
        y = jax.nn.gelu(checkpoint_name(y, "scan"), approximate=False)
        shape, axes = (self.width, 2, self.width), ("inner", None, "embed")
        y = jnp.einsum("bte,ecd->btcd", y, self.matrix("out_proj", shape, axes, normal(residual_std(self.layers))))
        if self.bias:
            y = y + parameter(self, "out_bias", shape[1:], axes[1:], zeros, dtype=self.dtype, decay=False)
        return y[:, :, 0] * jax.nn.sigmoid(y[:, :, 1]), state
