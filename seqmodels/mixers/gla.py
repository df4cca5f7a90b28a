"""Gated linear attention (Yang et al. 2024, arXiv 2312.06635): every row of the matrix state has a decay of its own.

S_t = diag(exp g_t) S_{t-1} + k_t v_t^T,  o_t = q_t S_t,  g_t = log sigmoid(x_t W_1 W_2 + b) / 16
y = (norm_head(o) * silu(x W_g)) W_o
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax.ad_checkpoint import checkpoint_name

from seqmodels.errors import UserError
from seqmodels.layers.norm import rms_norm
from seqmodels.layers.parameter import matrix, residual_std
from seqmodels.parallel import linear_attention
from seqmodels.sequence import Sequence


class Gla(nn.Module):
    """Gated linear attention mixer.

    Attributes:
        width: D. heads: H. key_dim: K; 0 takes D / (2 H). value_dim: V; 0 takes D / H.
        gate_rank: inner width of the decays' projection. gate_divisor: 16, which keeps fresh decays near one.
        norm_eps: epsilon of the heads' norm, whose weights [V] all heads share.
        layers: depth of the model, for the first output projection.
    """

    width: int
    heads: int = 2
    key_dim: int = 0
    value_dim: int = 0
    gate_rank: int = 16
    gate_divisor: float = 16.0
    norm_eps: float = 1e-5
    dtype: jnp.dtype = jnp.float32
    implementation: Mapping[str, str] = FrozenDict()
    layers: int = 1

    operations = ("linear_attention",)
    decays = True

    def __post_init__(self):
        super().__post_init__()
        if self.heads < 1 or (self.width % (2 * self.heads) and not (self.key_dim and self.value_dim)):
            raise UserError(f"gla.heads is {self.heads}; twice that must divide the width, which is {self.width}")
        for field, smallest in dict(key_dim=0, value_dim=0, gate_rank=1, gate_divisor=1).items():
            if getattr(self, field) < smallest:
                raise UserError(f"gla.{field} is {getattr(self, field)}; it must be at least {smallest}")

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """[H, K, V] of a row's matrix state."""
        return self.heads, self.key_dim or self.width // (2 * self.heads), self.value_dim or self.width // self.heads

    @nn.nowrap
    def init_state(self, batch: int, max_length: int = 0) -> jax.Array:
        """[B, H, K, V] float32."""
        return jnp.zeros((batch, *self.state_shape), jnp.float32)

    @nn.compact
    def __call__(self, x: jax.Array, seq: Sequence, state=None):
        """x [B, T, D] to y [B, T, D] and the new state."""
        heads, keys, values = self.state_shape
        x = x.astype(self.dtype)
        if seq.mask is not None:  # padding may hold anything
            x = jnp.where(seq.mask[..., None], x, 0)

        def project(name, size):
            shape, axes = (self.width, heads, size), ("embed", "heads", "head_dim")
            weight = matrix(self, name, shape, axes, self.width**-0.5, self.dtype)
            return checkpoint_name(jnp.einsum("btd,dhk->bthk", x, weight), "projected")

        q, k = project("q_proj", keys), project("k_proj", keys)
        v, gate = project("v_proj", values), project("gate_proj", values)
        inward = matrix(self, "decay_in", (self.width, self.gate_rank), ("embed", "rank"), self.width**-0.5, self.dtype)
        shape, axes = (self.gate_rank, heads, keys), ("rank", "heads", "head_dim")
        outward = matrix(self, "decay_out", shape, axes, self.gate_rank**-0.5, self.dtype)
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("heads",))
        bias = self.param("decay_bias", zeros, (heads * keys,), jnp.float32)  # a vector: no weight decay
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
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("head_dim",))
        y = rms_norm(y, self.param("scale", ones, (values,), jnp.float32), self.norm_eps) * jax.nn.silu(gate)
        shape, axes = (heads, values, self.width), ("heads", "head_dim", "embed")
        out = matrix(self, "out_proj", shape, axes, residual_std(self.layers), self.dtype)
        return jnp.einsum("bthv,hvd->btd", y.astype(self.dtype), out), state
