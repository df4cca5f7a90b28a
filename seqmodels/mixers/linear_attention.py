"""Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236): a feature map in place of the softmax.

S_t = S_{t-1} + phi(k_t) v_t^T,  z_t = z_{t-1} + phi(k_t),  y_t = phi(q_t) S_t / (phi(q_t) . z_t)
"""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from seqmodels.branch import NO_LINKS, Branch, Links, State, real
from seqmodels.fields.linear_attention import LINEAR_ATTENTION
from seqmodels.layers.parameter import normal, residual_std
from seqmodels.mixers.matrix import state_flops
from seqmodels.parallel import linear_attention
from seqmodels.sequence import Sequence

RELU_FLOOR = 1e-3  # keeps the normaliser away from zero


def taylor(x: jax.Array) -> jax.Array:
    """[1, x', x' x'^T / sqrt(2)] with x' = x K^-1/4, the feature map of Based: x [..., K] to [..., 1 + K + K^2].

    The inner product of two features is 1 + s + s^2 / 2 with s = q . k / sqrt(K). Source: Arora et al. 2024, arXiv
    2402.18668, section 4.1.
    """
    x = x * x.shape[-1] ** -0.25
    square = (x[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], -1)
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, square * 2**-0.5], axis=-1)


FEATURE_MAPS = {  # [..., K] to [..., K']; inner products of features are not negative
    "elu": lambda x: jax.nn.elu(x) + 1,
    "relu": lambda x: jax.nn.relu(x) + RELU_FLOOR,
    "softmax": lambda x: jax.nn.softmax(x, axis=-1),
    "taylor": taylor,
}


class LinearAttention(Branch):
    """Linear attention mixer, causal. Its options are declared in seqmodels/fields/linear_attention.py."""

    heads: int = LINEAR_ATTENTION["heads"]
    feature_map: str = LINEAR_ATTENTION["feature_map"]

    options = LINEAR_ATTENTION
    operations = ("linear_attention",)
    ways: ClassVar[tuple[str, ...]] = ("q", "k")
    valued = True

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.width // self.heads

    @property
    def feature_count(self) -> int:
        """K', the number of features of a query or key."""
        return 1 + self.head_dim + self.head_dim**2 if self.feature_map == "taylor" else self.head_dim

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """[H, K', V + 1] of a row's matrix state, the normaliser last."""
        return self.heads, self.feature_count, self.head_dim + 1

    @nn.nowrap
    def init_state(self, batch: int, max_length: int | None = None) -> jax.Array:
        """[B, H, K', V + 1] float32."""
        return jnp.zeros((batch, *self.state_shape), jnp.float32)

    def features(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """phi(q) and phi(k), [B, T, H, K'], of q and k [B, T, H, K]."""
        phi = FEATURE_MAPS[self.feature_map]
        return phi(q), phi(k)

    @nn.nowrap
    def flops(self, length: int) -> float:
        """Operations of the matrix state."""
        return state_flops(self.state_shape, decays=False)

    @nn.compact
    def __call__(
        self, x: jax.Array, seq: Sequence, state: State = None, links: Links = NO_LINKS
    ) -> tuple[jax.Array, State]:
        """x [B, T, D] to y [B, T, D] and the new state."""
        x = real(x, seq, self.dtype)

        def project(name, x):
            shape, axes = (self.width, self.heads, self.head_dim), ("embed", "heads", "head_dim")
            weight = self.matrix(name, shape, axes, normal(self.width**-0.5))
            return checkpoint_name(jnp.einsum("btd,dhk->bthk", x, weight), "projected")

        asked, keyed = (links.of(way, x, seq, self.dtype) for way in self.ways)
        q, k, v = project("q_proj", asked), project("k_proj", keyed), links.value(project("v_proj", x))
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
        out = self.matrix("out_proj", shape, axes, normal(residual_std(self.layers)))
        return jnp.einsum("bthv,hvd->btd", y.astype(self.dtype), out), state
