"""Parameters of DenseSSM's links: gates for each channel and state, computed from a layer's input, and others."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from seqmodels.branch import real
from seqmodels.kernels.arrays import computed_once
from seqmodels.layers.norm import RMSNorm
from seqmodels.layers.parameter import Init, normal, parameter
from seqmodels.sequence import Sequence

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "identity": lambda x: x,
}


def gated(gate: jax.Array | None, values: list[jax.Array]) -> jax.Array:
    """sum_i g_i values_i, [B, T, X]: gate [B, T, 1 or m, X], or None for ones. In one pass: values are not stacked."""
    wide = jnp.promote_types(values[0].dtype, jnp.float32)
    products = [v.astype(wide) for v in values]
    if gate is not None:
        gates = [gate[:, :, min(i, gate.shape[2] - 1)].astype(wide) for i in range(len(values))]
        products = [g * v for g, v in zip(gates, products, strict=True)]
    return sum(products[1:], start=products[0]).astype(jnp.result_type(*values, *([] if gate is None else [gate])))


def eye(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """An initialiser that returns the identity matrix."""
    return jnp.eye(shape[0], dtype=dtype)


class Gates(nn.Module):
    """Parameters of the links of one layer: the gates, the projection P, the norms.

    Attributes:
        options: config.model.dense.
        width, inner, state: D, E, N. For a matrix state E counts the channels of all values, N those of all keys.
        sources: m, the number of layers below that are read.
    """

    options: Any
    width: int
    inner: int
    state: int
    sources: int
    dtype: DTypeLike

    def setup(self) -> None:
        options, both = self.options, self.options.gate == "both"
        has_state_gate = options.gate == "state" or (both and options.variant == "input")
        self.count = self.sources if options.per_source else 1
        if options.gate in ("channel", "both"):
            self.channel = self._gate("gate_channel", self.inner, "inner", options.bottleneck)
        if has_state_gate:
            bottleneck = options.bottleneck_state or options.bottleneck
            self.state_gate = self._gate("gate_state", self.state, "state", bottleneck)
        elif both:  # 1 + x W: a gate that starts at zero would make the channel gate's gradient zero
            shape, axes = (self.width, self.count, self.state), ("embed", None, "state")
            self.state_gain = self._matrix("gain_state", shape, axes, normal(0.0))
        if options.projection == "linear":
            self.P = self._matrix("projection", (self.state, self.state), ("state", None), eye)
        if options.norm:
            self.norm_channel = RMSNorm(options.norm_eps, axis="inner")
            if options.variant == "input":
                self.norm_state = RMSNorm(options.norm_eps, axis="state")

    @nn.nowrap
    def _matrix(self, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], init: Init) -> jax.Array:
        return parameter(self, name, shape, axes, init, dtype=self.dtype)

    @nn.nowrap
    def _gate(self, name: str, size: int, axis: str, bottleneck: int) -> tuple[jax.Array, jax.Array]:
        """W1 [D, r] and W2 [r, S, size]. W2 starts at zero, so the gate starts at zero (with sigmoid at a half)."""
        hidden, std = max(1, self.width // bottleneck), self.options.gate_std
        inward = self._matrix(f"{name}_in", (self.width, hidden), ("embed", "rank"), normal(std or self.width**-0.5))
        shape, axes = (hidden, self.count, size), ("rank", None, axis)
        return inward, self._matrix(f"{name}_out", shape, axes, normal(std))

    def __call__(self, x: jax.Array, seq: Sequence) -> tuple[jax.Array | None, jax.Array | None]:
        """g_E [B, T, S, E] and g_N [B, T, S, N] from the layer's normalised input x [B, T, D]. None stands for ones."""
        x, options = real(x, seq, self.dtype), self.options

        def mlp(weights: tuple[jax.Array, jax.Array]) -> jax.Array:
            inward, outward = weights
            hidden = jax.nn.silu(x @ inward)
            # A CPU would compute the gradient of this by columns for that of outward, many times as slowly
            return ACTIVATIONS[options.activation](computed_once(jnp.einsum("btr,rse->btse", hidden, outward)))

        channel = mlp(self.channel) if options.gate in ("channel", "both") else None
        if options.gate == "state" or (options.gate == "both" and options.variant == "input"):
            return channel, mlp(self.state_gate)
        if options.gate == "both":
            return channel, 1 + jnp.einsum("btd,dsn->btsn", x, self.state_gain)
        return channel, None
