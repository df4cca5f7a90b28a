"""Gated channel mixer: SwiGLU (Shazeer 2020, arXiv 2002.05202, eq. 6)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.errors import UserError
from seqmodels.layers.parameter import matrix, residual_std


def swiglu(x, gate, up, down):
    """(silu(x gate) * (x up)) down, with x [..., D], gate and up [D, F], down [F, D]."""
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


class Mlp(nn.Module):
    """SwiGLU without biases, [B, T, D] to [B, T, D].

    `hidden` is F; 0 takes 8/3 of the width, rounded up to a multiple of 64. `layers` is the depth of the model.
    """

    width: int
    hidden: int = 0
    layers: int = 1
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        if self.hidden < 0:
            raise UserError(f"mlp.hidden is {self.hidden}; it must be 0 (8/3 of the width) or positive")

    @nn.compact
    def __call__(self, x):
        hidden = self.hidden or -(-8 * self.width // (3 * 64)) * 64
        inward, outward = ("embed", "mlp"), ("mlp", "embed")
        gate = matrix(self, "gate", (self.width, hidden), inward, dtype=self.dtype)
        up = matrix(self, "up", (self.width, hidden), inward, dtype=self.dtype)
        down = matrix(self, "down", (hidden, self.width), outward, residual_std(self.layers), self.dtype)
        return swiglu(x.astype(self.dtype), gate, up, down)
