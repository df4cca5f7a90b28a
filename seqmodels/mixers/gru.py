"""GRU (Cho et al. 2014, arXiv 1406.1078), gates as in torch.nn.GRU: the reset gate is applied behind the product.

r, z = sigmoid(x_t W + h_{t-1} U + b),  n = tanh(x_t W + b_x + r (h_{t-1} U + b)),  h_t = (1 - z) n + z h_{t-1}
y = h W_out
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from seqmodels.branch import Branch, State, real
from seqmodels.fields.gru import GRU
from seqmodels.kernels.segments import resets
from seqmodels.layers.parameter import normal, parameter, residual_std, uniform
from seqmodels.mixers.recurrence import recur
from seqmodels.sequence import Sequence


def cell(state: dict[str, jax.Array], x: jax.Array, product: jax.Array) -> dict[str, jax.Array]:
    """The new h [B, E] of the old one, x W + b_x and h U + b [B, 3, E]: gates r, z, and the candidate n."""
    r, z = (jax.nn.sigmoid(x[:, gate] + product[:, gate]) for gate in (0, 1))
    n = jnp.tanh(x[:, 2] + r * product[:, 2])
    return dict(h=n + z * (state["h"] - n))


class Gru(Branch):
    """GRU mixer. Its options are declared in seqmodels/fields/gru.py.

    torch's two biases of r and of z are always added up, so there is one. Those of the candidate are two.
    """

    hidden: int = GRU["hidden"]

    options = GRU

    @property
    def inner(self) -> int:
        """E, the width of h."""
        return self.hidden or self.width

    @nn.nowrap
    def init_state(self, batch: int, max_length: int | None = None) -> dict[str, jax.Array]:
        """h [B, E] float32."""
        return dict(h=jnp.zeros((batch, self.inner), jnp.float32))

    @nn.nowrap
    def flops(self, length: int) -> float:
        """Sums of the gates, the candidate and h, less the two operations counted for each element of the bias."""
        return (2 * 2 + 4 + 3 - 2 * 3) * self.inner

    @nn.compact
    def __call__(self, x: jax.Array, seq: Sequence, state: State = None) -> tuple[jax.Array, State]:
        """x [B, T, D] to y [B, T, D] and the new state."""
        state = self.init_state(x.shape[0]) if state is None else state
        x, fresh = real(x, seq, self.dtype), uniform(self.inner**-0.5)
        inward = self.matrix("in_proj", (self.width, 3, self.inner), ("embed", None, "inner"), fresh)
        weight = self.matrix("recurrent", (self.inner, 3, self.inner), ("state", None, "inner"), fresh)
        bias = parameter(self, "bias", (3, self.inner), (None, "inner"), fresh, decay=False)
        candidate = parameter(self, "candidate_bias", (self.inner,), ("inner",), fresh, dtype=self.dtype)
        gates = jnp.einsum("btd,dge->btge", x, inward).at[:, :, 2].add(candidate)
        gates = checkpoint_name(gates, "projected")
        h, state = recur(cell, gates, weight, bias, state, resets(**seq.documents()), seq.mask)
        h = checkpoint_name(h.astype(self.dtype), "scan")
        out = self.matrix("out_proj", (self.inner, self.width), ("inner", "embed"), normal(residual_std(self.layers)))
        return h @ out, state
