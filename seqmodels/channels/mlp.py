"""Channel mixers of two or three matrices: SwiGLU and its variants (Shazeer 2020, arXiv 2002.05202, eq. 5 and 6)."""

from collections.abc import Callable

import flax.linen as nn
import jax

from seqmodels.branch import Branch, State, real
from seqmodels.fields.mlp import MLP
from seqmodels.layers.matmul import matmul
from seqmodels.layers.parameter import normal, parameter, residual_std, zeros
from seqmodels.sequence import Sequence

Weights = tuple[jax.Array, jax.Array | None]  # a matrix and its bias

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def affine(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    """x weight + bias, or x weight if `bias` is None."""
    y = matmul(x, weight)
    return y if bias is None else y + bias


def gated_mlp(
    x: jax.Array,
    gate: Weights,
    up: Weights | None,
    down: Weights,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
) -> jax.Array:
    """(activation(x gate) * (x up)) down, with x [..., D]. Each weight is a pair of a matrix and its bias or None.

    gate and up are [D, F], down is [F, D]. If up is None, the factor (x up) is left out.
    """
    hidden = activation(affine(x, *gate))
    return affine(hidden if up is None else hidden * affine(x, *up), *down)


def inner_width(hidden: int, width: int) -> int:
    """The option `hidden`; where it is 0, 8/3 of the width, rounded up to a multiple of 64."""
    return hidden or -(-8 * width // (3 * 64)) * 64


class Mlp(Branch):
    """SwiGLU and its variants. The options are declared in seqmodels/fields/mlp.py."""

    hidden: int = MLP["hidden"]
    activation: str = MLP["activation"]
    gated: bool = MLP["gated"]

    options = MLP
    mixes_time = False
    biased = True

    @nn.compact
    def __call__(self, x: jax.Array, seq: Sequence, state: State = None) -> tuple[jax.Array, State]:
        """x [B, T, D] to y [B, T, D]; no state."""
        hidden = inner_width(self.hidden, self.width)
        inward, outward = ("embed", "mlp"), ("mlp", "embed")
        out = normal(residual_std(self.layers))

        def biases(name, size, axis):
            return parameter(self, name, (size,), (axis,), zeros, dtype=self.dtype) if self.bias else None

        gate = self.matrix("gate", (self.width, hidden), inward, normal(0.02)), biases("gate_bias", hidden, "mlp")
        up = None
        if self.gated:
            up = self.matrix("up", (self.width, hidden), inward, normal(0.02)), biases("up_bias", hidden, "mlp")
        down = self.matrix("down", (hidden, self.width), outward, out), biases("down_bias", self.width, "embed")
        return gated_mlp(real(x, seq, self.dtype), gate, up, down, ACTIVATIONS[self.activation]), {}
