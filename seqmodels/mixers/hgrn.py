"""HGRN (Qin et al. 2023, arXiv 2311.04823): a gated linear recurrence whose decays have a lower bound in each layer.

l_t = g + (1 - g) sigmoid(x_t W_l),  h_t = l_t h_{t-1} + (1 - l_t) silu(x_t W_c);  y = (norm(h) * silu(x W_g)) W_out

The recurrence is real, as in flash-linear-attention. The bound g of each channel is learned. A fresh one is l / L in
layer l of L, as the paper's, whose bounds are coupled over the layers so that they go on rising.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.fields.hgrn import HGRN
from seqmodels.layers.norm import rms_norm
from seqmodels.layers.parameter import ones, parameter
from seqmodels.mixers.diagonal import Diagonal

SMALLEST = 0.01  # fresh bound of the lowest layer: sigmoid never reaches 0


class Hgrn(Diagonal):
    """HGRN mixer. Its options are declared in seqmodels/fields/hgrn.py."""

    hidden: int = HGRN["hidden"]
    norm_eps: float = HGRN["norm_eps"]

    options = HGRN

    @nn.nowrap
    def gates(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """log l and (1 - l) silu(x W_c), [B, T, E] float32, with 1 - l = (1 - g) (1 - sigmoid(x W_l))."""

        def fresh(key, shape, dtype):
            bound = max(self.below / self.layers, SMALLEST)
            return jnp.full(shape, jnp.log(bound / (1 - bound)), dtype)

        z, c = self.project("decay_proj", x), self.project("in_proj", x)
        bound = parameter(self, "bound_logit", (self.inner,), ("inner",), fresh)
        log_sigmoid = jax.nn.log_sigmoid
        log_decay = jnp.logaddexp(log_sigmoid(bound), log_sigmoid(-bound) + log_sigmoid(z))
        return log_decay, jax.nn.sigmoid(-bound) * jax.nn.sigmoid(-z) * jax.nn.silu(c)

    @nn.nowrap
    def read(self, h: jax.Array, x: jax.Array) -> jax.Array:
        """norm(h) silu(x W_g), [B, T, E]."""
        scale = parameter(self, "scale", (self.inner,), ("inner",), ones)
        return rms_norm(h, scale, self.norm_eps) * jax.nn.silu(self.project("read_proj", x))
