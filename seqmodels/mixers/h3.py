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

from seqmodels.branch import State, real
from seqmodels.fields.h3 import H3 as OPTIONS
from seqmodels.layers.parameter import normal, parameter, residual_std, uniform, zeros
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

    @nn.compact
    def __call__(self, x: jax.Array, seq: Sequence, state: State = None) -> tuple[jax.Array, State]:
        """x [B, T, D] to y [B, T, D] and the new state."""
        x, width = real(x, seq, self.dtype), self.width

        def project(name, x, axes, init):
            y = x @ self.matrix(f"{name}_proj", (width, width), axes, init)
            if not self.bias:
                return y
            return y + parameter(self, f"{name}_bias", (width,), axes[1:], zeros, dtype=self.dtype)

        inward = ("embed", "inner"), normal(width**-0.5)
        q, k, v = (checkpoint_name(project(name, x, *inward), "projected") for name in ("query", "key", "value"))
        taps = parameter(self, "shift_taps", (self.conv, width), ("conv", "inner"), uniform(self.conv**-0.5))
        past = dict(initial_state=None if state is None else state["conv"])
        k, conv = short_conv(k, taps, implementation=self.implementation.get("short_conv"), **past, **seq.documents())
        s, new = self.filtered(real(k * v, seq, self.dtype), seq, state)
        y = q * checkpoint_name(s, "scan")
        return project("out", y, ("inner", "embed"), normal(residual_std(self.layers))), dict(new, conv=conv)
