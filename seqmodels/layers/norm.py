"""Root mean square norm (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4)."""

import flax.linen as nn
import jax
import jax.numpy as jnp


def rms_norm(x, scale=None, eps=1e-5):
    """Divide x [..., D] by its root mean square over D, then multiply by `scale` [D] if there is one.

    The statistics are float32 (float64 for float64); the result has the dtype of x.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    y = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    if scale is not None:
        y = y * scale
    return y.astype(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` over the last axis with a learned float32 scale [D], which starts at one.

    `axis` is the logical name of the normalised axis.
    """

    eps: float = 1e-5
    axis: str = "embed"

    @nn.compact
    def __call__(self, x):
        scale = self.param(
            "scale", nn.with_logical_partitioning(nn.initializers.ones, (self.axis,)), (x.shape[-1],), jnp.float32
        )
        return rms_norm(x, scale, self.eps)
