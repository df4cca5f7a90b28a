"""Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236): a feature map in place of the softmax.

S_t = S_{t-1} + phi(k_t) v_t^T,  z_t = z_{t-1} + phi(k_t),  y_t = phi(q_t) S_t / (phi(q_t) . z_t)
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax.ad_checkpoint import checkpoint_name

from seqmodels.errors import UserError
from seqmodels.layers.parameter import matrix, residual_std
from seqmodels.parallel import linear_attention
from seqmodels.sequence import Sequence

RELU_FLOOR = 1e-3  # keeps the normaliser away from zero


def taylor(x: jax.Array) -> jax.Array:
    """[1, x, x x^T / sqrt(2)] of x K^-1/4: the product of two is 1 + s + s^2 / 2 with s = q.k / sqrt(K) (Based).

    x [..., K] to [..., 1 + K + K^2]. Source: Arora et al. 2024, arXiv 2402.18668, section 4.1.
    """
    x = x * x.shape[-1] ** -0.25
    square = (x[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], -1)
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, square * 2**-0.5], axis=-1)


FEATURE_MAPS = {  # [..., K] to [..., K'], none negative in its products
    "elu": lambda x: jax.nn.elu(x) + 1,
    "relu": lambda x: jax.nn.relu(x) + RELU_FLOOR,
    "softmax": lambda x: jax.nn.softmax(x, axis=-1),
    "taylor": taylor,
}


def bidirectional_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """softmax(q) softmax(k)^T v, q over its channels and k over all positions (Shen et al. 2021, arXiv 1812.01243).

    Not causal: every token weighs the keys of all others. For encoders; no language model here uses it.

    Args:
        q, k: [B, T, H, K]. v: [B, T, H, V]. mask: [B, T] bool, False on padding, which no token sees.

    Returns:
        [B, T, H, V] in v's dtype; both softmaxes and their sums are float32.
    """
    q, k = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (q, k))
    where = None if mask is None else mask[:, :, None, None]
    k = jax.nn.softmax(k, axis=1, where=where)
    v32 = v.astype(k.dtype) if where is None else jnp.where(where, v.astype(k.dtype), 0)
    context = jnp.einsum("bthk,bthv->bhkv", k, v32)
    return jnp.einsum("bthk,bhkv->bthv", jax.nn.softmax(q, axis=-1), context).astype(v.dtype)


class LinearAttention(nn.Module):
    """Linear attention mixer, causal.

    Attributes:
        width: D. heads: H, of D / H channels in queries, keys and values. feature_map: one of FEATURE_MAPS.
    """

    width: int
    heads: int = 2
    feature_map: str = "elu"
    dtype: jnp.dtype = jnp.float32
    implementation: Mapping[str, str] = FrozenDict()
    layers: int = 1

    operations = ("linear_attention",)
    decays = False

    def __post_init__(self):
        super().__post_init__()
        if self.heads < 1 or self.width % self.heads:
            name = type(self).__name__.lower().replace("linear", "linear_")
            raise UserError(f"{name}.heads is {self.heads}; it must divide the width, which is {self.width}")
        if self.feature_map not in FEATURE_MAPS:
            allowed = ", ".join(FEATURE_MAPS)
            raise UserError(f"linear_attention.feature_map is {self.feature_map!r}; allowed: {allowed}")

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.width // self.heads

    @property
    def feature_count(self) -> int:
        """K', features of a query or key."""
        return 1 + self.head_dim + self.head_dim**2 if self.feature_map == "taylor" else self.head_dim

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """[H, K', V + 1] of a row's matrix state, the normaliser last."""
        return self.heads, self.feature_count, self.head_dim + 1

    @nn.nowrap
    def init_state(self, batch: int, max_length: int = 0) -> jax.Array:
        """[B, H, K', V + 1] float32."""
        return jnp.zeros((batch, *self.state_shape), jnp.float32)

    def features(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """phi(q) and phi(k), [B, T, H, K'], of q and k [B, T, H, K]."""
        phi = FEATURE_MAPS[self.feature_map]
        return phi(q), phi(k)

    @nn.compact
    def __call__(self, x: jax.Array, seq: Sequence, state=None):
        """x [B, T, D] to y [B, T, D] and the new state."""
        x = x.astype(self.dtype)
        if seq.mask is not None:  # padding may hold anything
            x = jnp.where(seq.mask[..., None], x, 0)

        def project(name):
            shape, axes = (self.width, self.heads, self.head_dim), ("embed", "heads", "head_dim")
            weight = matrix(self, name, shape, axes, self.width**-0.5, self.dtype)
            return checkpoint_name(jnp.einsum("btd,dhk->bthk", x, weight), "projected")

        q, k, v = project("q_proj"), project("k_proj"), project("v_proj")
        q, k = self.features(q, k)
        y, state = linear_attention(
            q,
            k,
            v,
            normalise=True,
            initial_state=self.init_state(x.shape[0]) if state is None else state,
            implementation=self.implementation.get("linear_attention"),
            **seq.documents(),
        )
        shape, axes = (self.heads, self.head_dim, self.width), ("heads", "head_dim", "embed")
        out = matrix(self, "out_proj", shape, axes, residual_std(self.layers), self.dtype)
        return jnp.einsum("bthv,hvd->btd", y.astype(self.dtype), out), state
