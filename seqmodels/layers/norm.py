"""Root mean square norm (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4) and layer norm (Ba et al. 2016)."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from seqmodels.layers.parameter import ones, parameter, zeros


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, scale: jax.Array | None = None, eps: float = 1e-5) -> jax.Array:
    """Divide x [..., D] by its root mean square over D, then multiply by `scale` [D] if there is one.

    The statistics are float32 (float64 for float64); the result has the dtype of x. The only array of the size of x
    that is saved for the backward pass is x itself, which a residual stream saves anyway.
    """
    return _forward(x, scale, eps)[0]


def _forward(x, scale, eps):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    reciprocal = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    reciprocal = checkpoint_name(reciprocal, "statistics")
    y = wide * reciprocal
    if scale is not None:
        y = y * scale
    return y.astype(x.dtype), (x, scale, reciprocal)


def _backward(eps, kept, dy):
    """With y = n scale and n = x / rms: dx = (g - n mean(g n)) / rms for g = dy scale."""
    x, scale, reciprocal = kept
    normed = x.astype(reciprocal.dtype) * reciprocal
    g = dy.astype(reciprocal.dtype)
    dscale = None
    if scale is not None:
        dscale = jnp.sum(g * normed, axis=range(x.ndim - 1)).astype(scale.dtype)
        g = g * scale
    dx = reciprocal * (g - normed * jnp.mean(g * normed, axis=-1, keepdims=True))
    return dx.astype(x.dtype), dscale


rms_norm.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def gated_norm(x: jax.Array, z: jax.Array, scale: jax.Array, groups: int = 1, eps: float = 1e-5) -> jax.Array:
    """x silu(z) over its root mean square of each group of channels, times scale (Dao and Gu 2024, section 7).

    x and z are [..., E], scale is [E]. The computation is float32; the result has the dtype of x. The backward pass
    needs x, z and the result.
    """
    return _gated_forward(x, z, scale, groups, eps)[0]


def _gated(x, z):
    return x.astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))


def _grouped(x, groups):
    return x.astype(jnp.float32).reshape(*x.shape[:-1], groups, -1)


def _gated_forward(x, z, scale, groups, eps):
    gated = _grouped(_gated(x, z), groups)
    reciprocal = jax.lax.rsqrt(jnp.mean(gated * gated, axis=-1, keepdims=True) + eps)
    y = ((gated * reciprocal).reshape(x.shape) * scale).astype(x.dtype)
    reciprocal, y = checkpoint_name(reciprocal, "statistics"), checkpoint_name(y, "readout")
    return y, (x, z, scale, reciprocal, y)


def _gated_backward(groups, eps, kept, dy):
    """As `_backward`. The mean of g n is computed as that of dy y: it reads half the bytes of x, z, dy in float32."""
    x, z, scale, reciprocal, y = kept
    gated, pullback = jax.vjp(_gated, x, z)
    normed = _grouped(gated, groups) * reciprocal
    mean = jnp.mean(_grouped(dy, groups) * _grouped(y, groups), axis=-1, keepdims=True)
    dgated = reciprocal * (_grouped(dy * scale, groups) - normed * mean)
    dscale = jnp.sum(dy * normed.reshape(x.shape), axis=range(x.ndim - 1))
    return *pullback(dgated.reshape(x.shape)), dscale


gated_norm.defvjp(_gated_forward, _gated_backward)


class RMSNorm(nn.Module):
    """`rms_norm` over the last axis with a learned float32 scale [D], which starts at one.

    `axis` is the logical name of the normalised axis. If `centred`, the scale is 1 + the parameter, which starts at 0.
    """

    eps: float = 1e-5
    axis: str = "embed"
    centred: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = parameter(self, "scale", (x.shape[-1],), (self.axis,), zeros if self.centred else ones)
        return rms_norm(x, 1 + scale if self.centred else scale, self.eps)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None = None, eps: float = 1e-5) -> jax.Array:
    """(x - mean) / sqrt(variance + eps) scale + bias, over the last axis of x [..., D] (Ba et al. 2016, 1607.06450).

    The statistics are float32 (float64 for float64); the result has the dtype of x. scale and bias are [D].
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps) * scale
    return (y if bias is None else y + bias).astype(x.dtype)


class LayerNorm(nn.Module):
    """`layer_norm` over the last axis with a learned scale, which starts at one, and with a bias, at zero."""

    eps: float = 1e-5
    bias: bool = True
    axis: str = "embed"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = (x.shape[-1],)
        scale = parameter(self, "scale", size, (self.axis,), ones)
        bias = parameter(self, "bias", size, (self.axis,), zeros) if self.bias else None
        return layer_norm(x, scale, bias, self.eps)


def norm_of(config: Any) -> nn.Module:
    """The norm of the residual stream that `config.norm` names; `config` is config.model."""
    if config.norm == "layer":
        return LayerNorm(config.norm_eps, bias=config.bias)
    return RMSNorm(config.norm_eps, centred=config.norm == "centred")
