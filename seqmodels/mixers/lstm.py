"""LSTM (Hochreiter and Schmidhuber 1997) with a forget gate (Gers et al. 2000), gates as in torch.nn.LSTM.

i, f, o = sigmoid(x_t W + h_{t-1} U + b),  g = tanh(...),  c_t = f c_{t-1} + i g,  h_t = o tanh(c_t);  y = h W_out
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from seqmodels.branch import Branch, State, real
from seqmodels.fields.lstm import LSTM
from seqmodels.kernels.segments import resets
from seqmodels.layers.parameter import normal, parameter, residual_std, uniform
from seqmodels.mixers.recurrence import recur
from seqmodels.sequence import Sequence


def cell(state: dict[str, jax.Array], x: jax.Array, product: jax.Array) -> dict[str, jax.Array]:
    """The new h and c [B, E] of the old ones, x W and h U + b [B, 4, E]: gates i, f, g, o."""
    i, f, g, o = jnp.moveaxis(x + product, 1, 0)
    c = jax.nn.sigmoid(f) * state["c"] + jax.nn.sigmoid(i) * jnp.tanh(g)
    return dict(h=jax.nn.sigmoid(o) * jnp.tanh(c), c=c)


class Lstm(Branch):
    """LSTM mixer. Its options are declared in seqmodels/fields/lstm.py.

    torch's two biases are always added up, so there is one.
    """

    hidden: int = LSTM["hidden"]
    forget_bias: float = LSTM["forget_bias"]

    options = LSTM

    @property
    def inner(self) -> int:
        """E, the width of h and c."""
        return self.hidden or self.width

    @nn.nowrap
    def init_state(self, batch: int, max_length: int | None = None) -> dict[str, jax.Array]:
        """h and c [B, E] float32."""
        return {name: jnp.zeros((batch, self.inner), jnp.float32) for name in ("h", "c")}

    @nn.nowrap
    def flops(self, length: int) -> float:
        """Sums of the gates, c and h, less the two operations counted for each element of the bias."""
        return (2 * 4 + 3 + 1 - 2 * 4) * self.inner

    @nn.compact
    def __call__(self, x: jax.Array, seq: Sequence, state: State = None) -> tuple[jax.Array, State]:
        """x [B, T, D] to y [B, T, D] and the new state."""
        state = self.init_state(x.shape[0]) if state is None else state
        x, fresh = real(x, seq, self.dtype), uniform(self.inner**-0.5)

        def fresh_bias(key, shape, dtype):
            return fresh(key, shape, dtype).at[1].add(self.forget_bias)

        inward = self.matrix("in_proj", (self.width, 4, self.inner), ("embed", None, "inner"), fresh)
        weight = self.matrix("recurrent", (self.inner, 4, self.inner), ("state", None, "inner"), fresh)
        bias = parameter(self, "bias", (4, self.inner), (None, "inner"), fresh_bias, decay=False)
        gates = checkpoint_name(jnp.einsum("btd,dge->btge", x, inward), "projected")
        h, state = recur(cell, gates, weight, bias, state, resets(**seq.documents()), seq.mask)
        h = checkpoint_name(h.astype(self.dtype), "scan")
        out = self.matrix("out_proj", (self.inner, self.width), ("inner", "embed"), normal(residual_std(self.layers)))
        return h @ out, state
