"""What S4, S4D and H3 share: linear systems that are the same for all tokens, one for each channel.

    h_t = A h_{t-1} + B x_t,   y_t = 2 Re(C h_t) + D x_t        h of N / 2 complex numbers, one of each conjugate pair

From the first token on this is a convolution with the filter C A^l B, which is how such models are trained, packed
documents included. From a state on it is run as a recurrence, token by token or in chunks. Both are the same function
of the same parameters, for rows of any length. With the C of another layer the filter reads this layer's states for
that layer: the cross kernels of DenseSSM (seqmodels/depth/lti.py).
"""

import math
from typing import ClassVar, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from seqmodels.branch import NO_LINKS, Links, State, real
from seqmodels.kernels.arrays import join_time, split_time
from seqmodels.kernels.segments import resets
from seqmodels.layers.parameter import Init, normal, ones, parameter, residual_std, zeros
from seqmodels.mixers.linked import Linked
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


class Continuous(Protocol):
    """A system of continuous time without a readout: a pytree, as layers hand it to the layers above them."""

    def at(self, c: jax.Array, stretch: float | jax.Array) -> System:
        """It in discrete time, read by C [N / 2, E]; `stretch` is a factor of its steps, [B, T, 1] for each token."""


@struct.dataclass
class Stream:
    """What a layer writes into its state, from which any layer can read this state.

    Attributes:
        x: [B, T, E], zero on padding. system: what it goes into.
        state: [B, N / 2, E] complex, before the first token; None: nothing was before it.
        y: [B, T, E] the layer's own readout without the skip, if DenseSSM's OUTPUT needs it.
    """

    x: jax.Array
    system: Continuous
    state: jax.Array | None
    y: jax.Array | None = None


@struct.dataclass
class Readout:
    """The read side of a layer: C [N / 2, E], D [E], and what it multiplies, and keeps beside the state, in H3."""

    C: jax.Array
    D: jax.Array
    gate: jax.Array | None = None
    conv: jax.Array | None = None

    def gated(self, y: jax.Array) -> jax.Array:
        """y [B, T, E] times the gate [B, T, E]."""
        return y if self.gate is None else self.gate * y


def fresh_log_dt(smallest: float, largest: float) -> Init:
    """log of a step size that is log-uniform in [smallest, largest]."""
    low, high = math.log(smallest), math.log(largest)
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


def in_spans(
    system: Continuous,
    c: jax.Array,
    stretch: float | jax.Array,
    x: jax.Array,
    h: jax.Array,
    reset: jax.Array | None,
    mask: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """As `System.scan`, SPAN tokens at a time; the backward pass computes the states within a span again."""
    length = x.shape[1]
    if length <= SPAN:
        return system.at(c, stretch).scan(x, h, reset, mask)
    if mask is None and length % SPAN:  # the last span is padded
        mask = jnp.ones(x.shape[:2], bool)

    steps = stretch if isinstance(stretch, jax.Array) else None  # of each token

    @jax.checkpoint
    def span(h, tokens):
        steps, x, *documents = tokens
        y, h = system.at(c, stretch if steps is None else steps).scan(x, h, *documents)
        return h, y

    h, y = jax.lax.scan(span, h, split_time((steps, x, reset, mask), SPAN))
    return join_time(y, length), h


def read_state(
    stream: Stream, c: jax.Array, skip: jax.Array | None, seq: Sequence, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """y = 2 Re(C h) + D x, [B, T, E] in x's dtype, and the last state h [B, N / 2, E].

    Args:
        c: [N / 2, E], of the layer that reads. skip: D [E]; None: zero.
        implementation: of `long_conv`.
    """
    x, (batch, _, width) = stream.x, stream.x.shape
    h = jnp.zeros((batch, len(c), width), jnp.complex64) if stream.state is None else stream.state
    stretch = seq.stretch()
    y, h = in_spans(stream.system, c, stretch, x.astype(jnp.float32), h, resets(**seq.documents()), seq.mask)
    if stream.state is not None or isinstance(stretch, jax.Array):  # with steps of each token it is no convolution
        return (y if skip is None else y + skip * x).astype(x.dtype), h
    # Nothing then computes what was read above, and nothing the last state unless it is asked for.
    taps = stream.system.at(c, stretch).filter(x.shape[1])
    return long_conv(x, taps, skip, implementation=implementation, **seq.documents()), h


class Lti(Linked):
    """Base of S4 and S4D, which say what the system is. y = GLU(gelu(S(x)) W), as in the authors' code."""

    state: int = 64
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dt_scale: float = 1.0

    operations: ClassVar[tuple[str, ...]] = ("long_conv",)
    biased = True
    link = "lti"
    state_operations: ClassVar[int]  # on a complex state and token, the readout among them, in real numbers
    counted: ClassVar[int]  # two for each number of the parameters of a complex state, which the caller counts

    @property
    def pairs(self) -> int:
        """Complex states of a channel."""
        return self.state // 2

    @property
    def stream_sizes(self) -> tuple[int, int]:
        """Channels, and complex states of each: the widths of DenseSSM's gates."""
        return self.width, self.pairs

    @property
    def read_flops(self) -> float:
        """Operations per token of running the recurrence and reading its state."""
        return self.state_operations * self.pairs * self.width

    @nn.nowrap
    def flops(self, length: int) -> float:
        """Those of the recurrence, without those that are counted already."""
        return self.read_flops - self.counted * self.pairs * self.width

    @nn.nowrap
    def init_state(self, batch: int, max_length: int | None = None) -> dict[str, jax.Array]:
        """real and imag [B, N / 2, E] float32."""
        return parts(jnp.zeros((batch, self.pairs, self.width), jnp.complex64))

    def setup(self) -> None:
        self.system = self.declare_system()
        self.C = pair(parameter(self, "C", (2, self.pairs, self.width), (None, "state", "inner"), normal(0.5**0.5)))
        self.D = parameter(self, "D", (self.width,), ("inner",), ones)
        self.declare_projections()

    @nn.nowrap
    def declare_system(self) -> Continuous:
        """Declares the parameters of the system without its readout."""
        raise NotImplementedError

    @nn.nowrap
    def declare_projections(self) -> None:
        """Declares what is before and behind the system."""
        shape, axes = (self.width, 2, self.width), ("inner", None, "embed")
        self.out_proj = self.matrix("out_proj", shape, axes, normal(residual_std(self.layers)))
        if self.bias:
            self.out_bias = parameter(self, "out_bias", shape[1:], axes[1:], zeros, dtype=self.dtype, decay=False)

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

    def stream_and_readout(
        self, x: jax.Array, seq: Sequence, state: State = None, links: Links = NO_LINKS
    ) -> tuple[Stream, Readout]:
        """The system's input is x [B, T, D] itself."""
        return self.stream(real(x, seq, self.dtype), state), Readout(self.C, self.D)

    @nn.nowrap
    def stream(self, x: jax.Array, state: State) -> Stream:
        """The stream of x [B, T, E] from a state as in `init_state`, or None."""
        return Stream(x, self.system, None if state is None else jax.lax.complex(state["real"], state["imag"]))

    def scan(self, stream: Stream, readout: Readout, seq: Sequence) -> tuple[jax.Array, jax.Array]:
        """y [B, T, E] in the stream's dtype and the last state [B, N / 2, E] complex."""
        y, h = read_state(stream, readout.C, readout.D, seq, self.implementation.get("long_conv"))
        return readout.gated(checkpoint_name(y, "scan")), h

    def project(self, y: jax.Array) -> jax.Array:
        """GLU(gelu(y) W): [B, T, E] to [B, T, D]."""
        y = jnp.einsum("bte,ecd->btcd", jax.nn.gelu(y, approximate=False), self.out_proj)
        y = y + self.out_bias if self.bias else y
        return y[:, :, 0] * jax.nn.sigmoid(y[:, :, 1])

    @nn.nowrap
    def new_state(self, readout: Readout, state: jax.Array) -> State:
        """As in `init_state`."""
        return parts(state)
