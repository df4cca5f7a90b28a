"""H3 (Fu et al. 2023, arXiv 2212.14052): two linear systems with products between them, as attention has.

    q, k, v = x W_q, x W_k, x W_v;   y = (q * S(shift(k) * v)) W_out

shift is a filter over a few tokens: a state space model whose matrix shifts its state is one of as many taps as it has
states. S is the diagonal system of S4D. Channels are their own heads (head dimension 1 of the paper).
"""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from seqmodels.branch import NO_LINKS, Links, State, real
from seqmodels.fields.h3 import H3 as OPTIONS
from seqmodels.layers.parameter import Init, normal, parameter, residual_std, uniform, zeros
from seqmodels.mixers.lti import Readout, Stream
from seqmodels.mixers.s4d import S4d
from seqmodels.parallel import short_conv
from seqmodels.sequence import Sequence


class H3(S4d):
    """H3 mixer. Its options are declared in seqmodels/fields/h3.py."""

    state: int = OPTIONS["state"]
    init_A: str = OPTIONS["init_A"]
    rule: str = OPTIONS["rule"]
    dt_min: float = OPTIONS["dt_min"]
    dt_max: float = OPTIONS["dt_max"]
    dt_scale: float = OPTIONS["dt_scale"]
    conv: int = OPTIONS["conv"]

    options = OPTIONS
    operations: ClassVar[tuple[str, ...]] = ("linear_scan", "long_conv", "short_conv")

    @nn.nowrap
    def init_state(self, batch: int, max_length: int | None = None) -> dict[str, jax.Array]:
        """conv [B, W - 1, E], and that of S4D; float32."""
        return super().init_state(batch) | dict(conv=jnp.zeros((batch, self.conv - 1, self.width), jnp.float32))

    @nn.nowrap
    def declare_projections(self) -> None:
        """query, key, value and out, and the shift's taps."""
        width, init = self.width, normal(self.width**-0.5)
        inward = {name: self.dense(name, ("embed", "inner"), init) for name in ("query", "key", "value")}
        self.dense_layers = inward | dict(out=self.dense("out", ("inner", "embed"), normal(residual_std(self.layers))))
        self.shift_taps = parameter(self, "shift_taps", (self.conv, width), ("conv", "inner"), uniform(self.conv**-0.5))

    @nn.nowrap
    def dense(self, name: str, axes: tuple[str, str], init: Init) -> tuple[jax.Array, jax.Array | None]:
        """Declare a matrix [D, D] and a bias [D], or None."""
        weight = self.matrix(f"{name}_proj", (self.width, self.width), axes, init)
        if not self.bias:
            return weight, None
        return weight, parameter(self, f"{name}_bias", (self.width,), axes[1:], zeros, dtype=self.dtype)

    @nn.nowrap
    def apply_dense(self, name: str, x: jax.Array) -> jax.Array:
        """x W + b, [B, T, D]."""
        weight, bias = self.dense_layers[name]
        return x @ weight if bias is None else x @ weight + bias

    def stream_and_readout(
        self, x: jax.Array, seq: Sequence, state: State = None, links: Links = NO_LINKS
    ) -> tuple[Stream, Readout]:
        """The system's input is shift(k) * v, and q multiplies what is read."""
        x = real(x, seq, self.dtype)
        q, k, v = (checkpoint_name(self.apply_dense(name, x), "projected") for name in ("query", "key", "value"))
        past = dict(initial_state=None if state is None else state["conv"])
        implementation = self.implementation.get("short_conv")
        k, conv = short_conv(k, self.shift_taps, implementation=implementation, **past, **seq.documents())
        return self.stream(real(k * v, seq, self.dtype), state), Readout(self.C, self.D, q, conv)

    def project(self, y: jax.Array) -> jax.Array:
        """[B, T, E] to [B, T, D]."""
        return self.apply_dense("out", y)

    @nn.nowrap
    def new_state(self, readout: Readout, state: jax.Array) -> State:
        """As in `init_state`."""
        return super().new_state(readout, state) | dict(conv=readout.conv)
