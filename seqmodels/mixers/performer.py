"""Performer (Choromanski et al. 2021, arXiv 2009.14794): softmax attention estimated by positive random features.

    phi(x) = exp(w_i . x - |x|^2 / 2) / sqrt(m), i = 1..m, x = K^-1/4 times a query or key, w_i normal

The expectation of phi(q) . phi(k) is exp(q . k / sqrt(K)). Everything else is linear attention.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.fields.performer import PERFORMER
from seqmodels.layers.norm import rms_norm
from seqmodels.mixers.linear_attention import LinearAttention

# An exponent is at most |w|^2 / 2, which is K / 2 or a little more. So heads of up to 64 channels stay below this limit
# by themselves. For wider heads the limit keeps sums over long rows finite.
LARGEST_EXPONENT = 60.0


def draw_features(key: jax.Array, heads: int, features: int, width: int, orthogonal: bool = True) -> jax.Array:
    """Directions w [H, m, K] float32, each normally distributed.

    With `orthogonal`, blocks of K directions are orthogonal, which gives better estimates. The length of each is then
    the length of an independent normal vector (section 2.4).
    """
    blocks = -(-features // width)
    directions, lengths = jax.random.split(key)
    normal = jax.random.normal(directions, (heads, blocks, width, width), jnp.float32)
    if not orthogonal:
        return normal.reshape(heads, blocks * width, width)[:, :features]
    q, r = jnp.linalg.qr(normal)
    q = q * jnp.sign(jnp.diagonal(r, axis1=-2, axis2=-1))[..., None, :]  # uniform among all rotations
    norms = jnp.linalg.norm(jax.random.normal(lengths, (heads, blocks, width, width), jnp.float32), axis=-1)
    return (jnp.swapaxes(q, -1, -2) * norms[..., None]).reshape(heads, blocks * width, width)[:, :features]


def positive_features(x: jax.Array, w: jax.Array, query: bool) -> jax.Array:
    """phi of x [B, T, H, K] with directions w [H, m, K]: [B, T, H, m] float32.

    The largest exponent of each query is subtracted; the normaliser cancels this factor. Nothing is subtracted from
    keys: a factor common to all keys depends on the later ones, which a causal model must not know.
    """
    x = x.astype(jnp.float32) * x.shape[-1] ** -0.25
    exponent = jnp.einsum("bthk,hmk->bthm", x, w, precision="highest") - jnp.sum(x * x, axis=-1, keepdims=True) / 2
    if query:
        exponent = exponent - jax.lax.stop_gradient(jnp.max(exponent, axis=-1, keepdims=True))
    return jnp.exp(jnp.minimum(exponent, LARGEST_EXPONENT)) * w.shape[1] ** -0.5


class Performer(LinearAttention):
    """Performer mixer, causal: LinearAttention with random features.

    Its options are declared in seqmodels/fields/performer.py. In training, the directions come from the random stream
    "features" if there is one; it changes every `redraw` steps. Evaluation and generation always use the directions of
    `seed`. These are constants, not parameters, and equal in all layers and runs.
    """

    random_features: int = PERFORMER["random_features"]
    orthogonal: bool = PERFORMER["orthogonal"]
    seed: int = PERFORMER["seed"]
    redraw: int = PERFORMER["redraw"]
    qk_norm: bool = PERFORMER["qk_norm"]

    options = PERFORMER

    @property
    def feature_count(self) -> int:
        """m, the number of features of a query or key."""
        return self.random_features

    @property
    def redraw_every(self) -> int:
        """Training steps after which the directions are drawn again."""
        return self.redraw

    @nn.nowrap
    def flops(self, length: int) -> float:
        """Operations of the matrix state, and of the directions' products with queries and keys."""
        return super().flops(length) + 2 * 2 * self.heads * self.random_features * self.head_dim

    def directions(self) -> jax.Array:
        """w [H, m, K]."""
        sizes = (self.heads, self.random_features, self.head_dim, self.orthogonal)
        if self.redraw and self.has_rng("features"):
            return draw_features(self.make_rng("features"), *sizes)
        with jax.ensure_compile_time_eval():  # a constant of the program, not drawn again at every call
            return draw_features(jax.random.key(self.seed), *sizes)

    def features(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """phi(q) and phi(k), [B, T, H, m], of q and k [B, T, H, K]."""
        if self.qk_norm:
            q, k = rms_norm(q), rms_norm(k)
        w = self.directions()
        # the exponentials may overflow float16, but not bfloat16
        dtype = jnp.float32 if self.dtype == jnp.float16 else self.dtype
        return positive_features(q, w, True).astype(dtype), positive_features(k, w, False).astype(dtype)
