"""minLSTM (Feng et al. 2024, arXiv 2410.01201, section 3.2): an LSTM whose gates do not read the state and add up to 1.

f, i = sigmoid(x_t W_f + b_f), sigmoid(x_t W_i + b_i);  h_t = (f h_{t-1} + i g(x_t W_h)) / (f + i);  y = h W_out
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.fields.minlstm import MINLSTM
from seqmodels.layers.parameter import parameter, zeros
from seqmodels.mixers.diagonal import CANDIDATES, Diagonal


class MinLstm(Diagonal):
    """minLSTM mixer. Its options are declared in seqmodels/fields/minlstm.py."""

    hidden: int = MINLSTM["hidden"]
    candidate: str = MINLSTM["candidate"]
    forget_bias: float = MINLSTM["forget_bias"]

    options = MINLSTM

    @nn.nowrap
    def gates(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """log(f / (f + i)) and i / (f + i) g(x W_h), [B, T, E] float32. f / (f + i) is sigmoid(log f - log i)."""

        def fresh(key, shape, dtype):
            return jnp.full(shape, self.forget_bias, dtype)

        def log_gate(name, init):
            bias = parameter(self, f"{name}_bias", (self.inner,), ("inner",), init)
            return jax.nn.log_sigmoid(self.project(f"{name}_proj", x) + bias)

        f, i = log_gate("forget", fresh), log_gate("input", zeros)
        inputs = jax.nn.sigmoid(i - f) * CANDIDATES[self.candidate](self.project("in_proj", x))
        return jax.nn.log_sigmoid(f - i), inputs
