"""Gated DeltaNet (Yang, Kautz & Hatamizadeh 2025, arXiv 2412.06464): DeltaNet whose state also decays.

S_t = e^{g_t} S_{t-1} + beta_t k_t (v_t - k_t^T e^{g_t} S_{t-1})^T,  o_t = K^-1/2 q_t S_t
g_t = -exp(A_log) softplus(x_t W_a + dt_bias),  beta_t = sigmoid(x_t W_beta)
y = (norm_head(o) * silu(x W_g)) W_o

As in Qwen3-Next and OLMo Hybrid. A key and its query may serve several value heads (`key_heads`).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from seqmodels.fields.gated_deltanet import GATED_DELTANET
from seqmodels.layers.matmul import wide_matmul
from seqmodels.layers.parameter import normal, parameter
from seqmodels.mixers.deltanet import DeltaNet
from seqmodels.mixers.mamba import init_dt_bias
from seqmodels.mixers.matrix import delta_flops


def init_A_log(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
    """log of A, one per head, with A uniform in [0.01, 16]: as in Qwen3-Next, where log 0 cannot occur."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 0.01, 16))


class GatedDeltaNet(DeltaNet):
    """Gated DeltaNet mixer. Its options are declared in seqmodels/fields/gated_deltanet.py."""

    heads: int = GATED_DELTANET["heads"]
    key_heads: int = GATED_DELTANET["key_heads"]
    key_dim: int = GATED_DELTANET["key_dim"]
    value_dim: int = GATED_DELTANET["value_dim"]
    conv: int = GATED_DELTANET["conv"]
    negative_eigenvalues: bool = GATED_DELTANET["negative_eigenvalues"]
    norm_eps: float = GATED_DELTANET["norm_eps"]
    dt_min: float = GATED_DELTANET["dt_min"]
    dt_max: float = GATED_DELTANET["dt_max"]
    dt_floor: float = GATED_DELTANET["dt_floor"]

    options = GATED_DELTANET

    @property
    def key_shape(self) -> tuple[int, int]:
        """[Hk, K] of a token's key."""
        return self.key_heads or self.heads, self.key_dim or 3 * self.width // (4 * self.heads)

    @property
    def value_shape(self) -> tuple[int, int]:
        """[H, V] of a token's value."""
        return self.heads, self.value_dim or 2 * self.key_shape[1]

    @nn.nowrap
    def flops(self, length: int) -> float:
        """Operations of the matrix state."""
        return delta_flops(self.state_shape, decays=True)

    @nn.nowrap
    def log_decay(self, x: jax.Array) -> jax.Array:
        """g [B, T, H] float32 from x [B, T, D]."""
        weight = self.matrix("dt_proj", (self.width, self.heads), ("embed", "heads"), normal(self.width**-0.5))
        dt_bias = init_dt_bias(self.dt_min, self.dt_max, self.dt_floor)
        bias = parameter(self, "dt_bias", (self.heads,), ("heads",), dt_bias, group="ssm")
        A_log = parameter(self, "A_log", (self.heads,), ("heads",), init_A_log, group="ssm")
        return -jnp.exp(A_log) * jax.nn.softplus(wide_matmul(x, weight) + bias)

    @nn.nowrap
    def gate(self, x: jax.Array) -> jax.Array:
        """[B, T, H, V], a factor of the normed readout."""
        return jax.nn.silu(self.by_heads("gate_proj", x, self.value_shape, "heads"))
