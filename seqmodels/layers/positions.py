"""What tells attention the positions of queries and keys, beside rotations (`layers/rope.py`).

Biases of the scores by distance (kernels/attention/biases.py) with their weights, the decay of xPos, and the
sinusoids that may be added to a model's input.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from seqmodels.kernels.attention.biases import Alibi, Bias, Buckets, Kerple, Sandwich, alibi_slopes
from seqmodels.layers.parameter import normal, parameter

XPOS_GAMMA, XPOS_BASE = 0.4, 512  # decay of the fastest pair, and tokens in which pairs decay by their zeta
SANDWICH_WIDTH = 128


def slopes(module: nn.Module, heads: int) -> jax.Array:
    """ALiBi's slopes [H, 1], which are not trained."""
    return jnp.asarray(alibi_slopes(heads))


def log_rates(module: nn.Module, heads: int) -> jax.Array:
    """KERPLE's r1 and r2 [H, 2], as exponentials of parameters; fresh ones are uniform in (0, 2) and (0, 1)."""

    def init(key, shape, dtype=jnp.float32):
        return jnp.log(jax.random.uniform(key, shape, dtype, 1e-2, 1.0) * jnp.array([2.0, 1.0], dtype))

    return jnp.exp(parameter(module, "kerple", (heads, 2), ("heads", None), init, decay=False))


def bucket_weights(module: nn.Module, heads: int) -> jax.Array:
    """T5's weights [H, buckets] of the buckets of distances."""
    shape = (heads, Buckets().size)
    return parameter(module, "buckets", shape, ("heads", None), normal(0.02), decay=False)


def ratios(module: nn.Module, heads: int) -> jax.Array:
    """Sandwich's factors H / 8h [H, 1] of the heads h = 1..H, the inverse of its compression ratios; not trained."""
    return jnp.asarray(heads / (8 * np.arange(1, heads + 1))[:, None], jnp.float32)


@dataclasses.dataclass(frozen=True)
class Weighted:
    """A bias and its weights [H, size], of which a module declares those that are trained."""

    function: Bias
    weights: Callable[[nn.Module, int], jax.Array]


BIASES = {
    "alibi": Weighted(Alibi(), slopes),
    "kerple": Weighted(Kerple(), log_rates),
    "sandwich": Weighted(Sandwich(SANDWICH_WIDTH), ratios),
    "t5": Weighted(Buckets(), bucket_weights),
}


def zeta(pairs: int) -> np.ndarray:
    """(2i/d + 0.4) / 1.4 for i < d/2: what a pair of channels decays by in 512 tokens, float64."""
    return (np.arange(pairs) / pairs + XPOS_GAMMA) / (1 + XPOS_GAMMA)


def xpos(
    kernel: Callable[..., jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    interleaved: bool = False,
    positions: jax.Array | None = None,
    key_positions: jax.Array | None = None,
    **options: Any,
) -> jax.Array:
    """Attention whose rotated queries and keys decay with their distance: pair i by zeta_i^((t - s) / 512).

    Sun et al. 2023 (arXiv 2212.10554), section 2. zeta^t and zeta^-s by themselves overflow after some 35,000 tokens.
    So positions are counted from the middle of the queries: keys before them only become smaller, and float32 holds
    calls of up to about 33,000 queries after any number of keys.

    Args:
        kernel: `attention`. q: [B, T, H, d]. k, v: [B, S, Hkv, d]. positions and all others: as for `attention`.
    """
    if positions is None:
        positions = jnp.arange(q.shape[1], dtype=jnp.int32)[None].repeat(len(q), 0)
    key_positions = positions if key_positions is None else key_positions
    middle = (jnp.min(positions, axis=1, keepdims=True) + jnp.max(positions, axis=1, keepdims=True)) // 2
    decay = np.log(zeta(q.shape[-1] // 2)) / XPOS_BASE
    decay = np.float32(np.repeat(decay, 2) if interleaved else np.tile(decay, 2))

    def scaled(x, tokens):
        return (x * jnp.exp(tokens[:, :, None, None].astype(jnp.float32) * decay)).astype(x.dtype)

    later = jnp.minimum(key_positions, jnp.max(positions, axis=1, keepdims=True))  # what is in no slot may be anything
    q, k = scaled(q, positions - middle), scaled(k, middle - later)
    return kernel(q, k, v, positions=positions, key_positions=key_positions, **options)


def sinusoids(positions: jax.Array, width: int) -> jax.Array:
    """sin and cos of positions [B, T] times 10000^(-2i/D): [B, T, D] float32, all sines before all cosines.

    Vaswani et al. 2017, arXiv 1706.03762, section 3.5, where they alternate.
    """
    half = width // 2
    angle = positions[..., None].astype(jnp.float32) * np.float32(10_000.0 ** (-np.arange(half) / half))
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
