"""minGRU (Feng et al. 2024, arXiv 2410.01201, section 3.1): a GRU whose gate and candidate do not read the state.

z_t = sigmoid(x_t W_z + b),  h_t = (1 - z_t) h_{t-1} + z_t g(x_t W_h);  y = h W_out
"""

import flax.linen as nn
import jax

from seqmodels.fields.mingru import MINGRU
from seqmodels.layers.parameter import parameter, zeros
from seqmodels.mixers.diagonal import CANDIDATES, Diagonal


class MinGru(Diagonal):
    """minGRU mixer. Its options are declared in seqmodels/fields/mingru.py."""

    hidden: int = MINGRU["hidden"]
    candidate: str = MINGRU["candidate"]

    options = MINGRU

    @nn.nowrap
    def gates(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """log(1 - z) and z g(x W_h), [B, T, E] float32."""
        z = self.project("gate_proj", x) + parameter(self, "gate_bias", (self.inner,), ("inner",), zeros)
        return -jax.nn.softplus(z), jax.nn.sigmoid(z) * CANDIDATES[self.candidate](self.project("in_proj", x))
