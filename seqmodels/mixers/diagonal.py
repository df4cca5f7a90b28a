"""What mixers with a gated diagonal recurrence share: h_t = exp(log_decay_t) h_{t-1} + i_t, both from x_t alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from seqmodels.branch import Branch, State, real
from seqmodels.layers.matmul import wide_matmul
from seqmodels.layers.parameter import normal, residual_std
from seqmodels.parallel import linear_scan
from seqmodels.sequence import Sequence


class Diagonal(Branch):
    """Base of minGRU, minLSTM and HGRN, which say what the decays and inputs are, and how the state is read."""

    hidden: int = 0

    operations = ("linear_scan",)

    @property
    def inner(self) -> int:
        """E, the width of the state."""
        return self.hidden or self.width

    @nn.nowrap
    def init_state(self, batch: int, max_length: int | None = None) -> jax.Array:
        """[B, E] float32."""
        return jnp.zeros((batch, self.inner), jnp.float32)

    @nn.nowrap
    def flops(self, length: int) -> float:
        """The recurrence: a product and a sum."""
        return 2 * self.inner

    @nn.nowrap
    def project(self, name: str, x: jax.Array) -> jax.Array:
        """x [B, T, D] times the matrix `name`: [B, T, E], float32, as gates need it."""
        weight = self.matrix(name, (self.width, self.inner), ("embed", "inner"), normal(self.width**-0.5))
        return checkpoint_name(wide_matmul(x, weight), "projected")

    @nn.nowrap
    def gates(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """log_decay and input [B, T, E] float32 of the recurrence, from x [B, T, D]."""
        raise NotImplementedError

    @nn.nowrap
    def read(self, h: jax.Array, x: jax.Array) -> jax.Array:
        """What is projected to the output, [B, T, E], of the states h [B, T, E] and x [B, T, D]."""
        return h

    @nn.compact
    def __call__(self, x: jax.Array, seq: Sequence, state: State = None) -> tuple[jax.Array, State]:
        """x [B, T, D] to y [B, T, D] and the new state."""
        x = real(x, seq, self.dtype)
        log_decay, inputs = self.gates(x)
        h, state = linear_scan(
            log_decay,
            inputs.astype(self.dtype),
            initial_state=self.init_state(x.shape[0]) if state is None else state,
            implementation=self.implementation.get("linear_scan"),
            **seq.documents(),
        )
        y = self.read(checkpoint_name(h, "scan"), x).astype(self.dtype)
        out = self.matrix("out_proj", (self.inner, self.width), ("inner", "embed"), normal(residual_std(self.layers)))
        return y @ out, state


def positive(x: jax.Array) -> jax.Array:
    """x + 1/2 from zero on, sigmoid(x) below: continuous and above zero (Feng et al. 2024, appendix B.3)."""
    return jnp.where(x >= 0, x + 0.5, jax.nn.sigmoid(x))


CANDIDATES = {"linear": lambda x: x, "positive": positive}
