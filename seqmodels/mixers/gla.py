"""Gated linear attention (Yang et al. 2024, arXiv 2312.06635): every row of the matrix state has its own decay.

S_t = diag(exp g_t) S_{t-1} + k_t v_t^T,  o_t = q_t S_t,  g_t = log sigmoid(x_t W_1 W_2 + b) / 16
y = (norm_head(o) * silu(x W_g)) W_o
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from seqmodels.branch import Branch, State, real
from seqmodels.fields.gla import GLA
from seqmodels.layers.norm import rms_norm
from seqmodels.layers.parameter import normal, ones, parameter, residual_std, zeros
from seqmodels.mixers.matrix import state_flops
from seqmodels.parallel import linear_attention
from seqmodels.sequence import Sequence


class Gla(Branch):
    """Gated linear attention mixer. Its options are declared in seqmodels/fields/gla.py."""

    heads: int = GLA["heads"]
    key_dim: int = GLA["key_dim"]
    value_dim: int = GLA["value_dim"]
    gate_rank: int = GLA["gate_rank"]
    gate_divisor: float = GLA["gate_divisor"]
    norm_eps: float = GLA["norm_eps"]

    options = GLA
    operations = ("linear_attention",)

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """[H, K, V] of a row's matrix state."""
        return self.heads, self.key_dim or self.width // (2 * self.heads), self.value_dim or self.width // self.heads

    @nn.nowrap
    def init_state(self, batch: int, max_length: int | None = None) -> jax.Array:
        """[B, H, K, V] float32."""
        return jnp.zeros((batch, *self.state_shape), jnp.float32)

    @nn.nowrap
    def flops(self, length: int) -> float:
        """Operations of the matrix state."""
        return state_flops(self.state_shape, decays=True)

    @nn.compact
    def __call__(self, x: jax.Array, seq: Sequence, state: State = None) -> tuple[jax.Array, State]:
        """x [B, T, D] to y [B, T, D] and the new state."""
        heads, keys, values = self.state_shape
        x = real(x, seq, self.dtype)

        def project(name, size):
            shape, axes = (self.width, heads, size), ("embed", "heads", "head_dim")
            weight = self.matrix(name, shape, axes, normal(self.width**-0.5))
            return checkpoint_name(jnp.einsum("btd,dhk->bthk", x, weight), "projected")

        q, k = project("q_proj", keys), project("k_proj", keys)
        v, gate = project("v_proj", values), project("gate_proj", values)
        inward = self.matrix("decay_in", (self.width, self.gate_rank), ("embed", "rank"), normal(self.width**-0.5))
        shape, axes = (self.gate_rank, heads, keys), ("rank", "heads", "head_dim")
        outward = self.matrix("decay_out", shape, axes, normal(self.gate_rank**-0.5))
        bias = parameter(self, "decay_bias", (heads * keys,), ("heads",), zeros)
        number = jnp.einsum("btr,rhk->bthk", x @ inward, outward, preferred_element_type=jnp.float32)
        number = number + bias.reshape(heads, keys)
        y, state = linear_attention(
            q,
            k,
            v,
            jax.nn.log_sigmoid(number) / self.gate_divisor,
            scale=keys**-0.5,
            initial_state=self.init_state(x.shape[0]) if state is None else state,
            implementation=self.implementation.get("linear_attention"),
            **seq.documents(),
        )
        scale = parameter(self, "scale", (values,), ("head_dim",), ones)
        y = rms_norm(y, scale, self.norm_eps) * jax.nn.silu(gate)
        shape, axes = (heads, values, self.width), ("heads", "head_dim", "embed")
        out = self.matrix("out_proj", shape, axes, normal(residual_std(self.layers)))
        return jnp.einsum("bthv,hvd->btd", y.astype(self.dtype), out), state
