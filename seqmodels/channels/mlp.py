"""Channel mixers of two or three matrices: SwiGLU and its kin (Shazeer 2020, arXiv 2002.05202, eq. 5 and 6)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.errors import UserError
from seqmodels.layers.parameter import matrix, residual_std

ACTIVATIONS = {"silu": jax.nn.silu, "gelu": lambda x: jax.nn.gelu(x, approximate=False), "relu": jax.nn.relu}


def gated_mlp(x, gate, up, down, activation=jax.nn.silu):
    """(activation(x gate) * (x up)) down, with x [..., D], gate and up [D, F] (up None: without), down [F, D]."""
    hidden = activation(x @ gate)
    return (hidden if up is None else hidden * (x @ up)) @ down


class Mlp(nn.Module):
    """SwiGLU without biases, [B, T, D] to [B, T, D].

    `hidden` is F; 0 takes 8/3 of the width, rounded up to a multiple of 64. `activation` is silu, gelu (exact) or relu.
    `gated` False leaves the factor x up out. `layers` is the depth of the model.
    """

    width: int
    hidden: int = 0
    activation: str = "silu"
    gated: bool = True
    layers: int = 1
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        if self.hidden < 0:
            raise UserError(f"mlp.hidden is {self.hidden}; it must be 0 (8/3 of the width) or positive")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"mlp.activation is {self.activation!r}; allowed: {', '.join(ACTIVATIONS)}")

    @nn.compact
    def __call__(self, x):
        hidden = self.hidden or -(-8 * self.width // (3 * 64)) * 64
        inward, outward = ("embed", "mlp"), ("mlp", "embed")
        gate = matrix(self, "gate", (self.width, hidden), inward, dtype=self.dtype)
        up = matrix(self, "up", (self.width, hidden), inward, dtype=self.dtype) if self.gated else None
        down = matrix(self, "down", (hidden, self.width), outward, residual_std(self.layers), self.dtype)
        return gated_mlp(x.astype(self.dtype), gate, up, down, ACTIVATIONS[self.activation])
