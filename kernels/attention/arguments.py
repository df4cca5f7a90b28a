"""Arguments of an implementation of attention: arrays of numbers, arrays that describe tokens, static options."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqmodels.kernels.attention.biases import Bias
from seqmodels.kernels.attention.masks import Mask


class Inputs(NamedTuple):
    """Arrays of numbers, which have gradients, except `gates`; see `kernels.attention.attention`."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    bias_weights: jax.Array | None = None
    gates: jax.Array | None = None
    key_gates: jax.Array | None = None

    @property
    def accumulator(self) -> jnp.dtype:
        """Dtype of scores and sums: float32, or float64 if an argument is."""
        return jnp.result_type(self.q, self.k, self.v, jnp.float32)


class Side(NamedTuple):
    """The tokens of one side, queries or keys.

    Attributes:
        position: [B or 1, T] int32, a numpy array if it is known before compilation.
        segment: [B, T] int32, or None.
        real: [B or 1, T] bool, False on tokens that are left out, or None.
    """

    position: jax.Array | np.ndarray
    segment: jax.Array | None = None
    real: jax.Array | np.ndarray | None = None


class Tokens(NamedTuple):
    """Arrays that say which keys a query sees; see `kernels.attention.attention`."""

    segment_ids: jax.Array | None = None
    key_segment_ids: jax.Array | None = None
    key_mask: jax.Array | None = None
    positions: jax.Array | None = None
    key_positions: jax.Array | None = None

    def queries(self, length: int) -> Side:
        """The queries, `length` of them."""
        known = np.arange(length, dtype=np.int32)[None]
        return Side(known if self.positions is None else self.positions, self.segment_ids)

    def keys(self, length: int) -> Side:
        """The keys, `length` of them."""
        known = np.arange(length, dtype=np.int32)[None]
        return Side(known if self.key_positions is None else self.key_positions, self.key_segment_ids, self.key_mask)


class Options(NamedTuple):
    """Static options; see `kernels.attention.attention`."""

    mask: Mask
    scale: float
    softcap: float | None = None
    bias: Bias | None = None

    def scores(
        self,
        products: jax.Array,
        i: jax.Array,
        j: jax.Array,
        gates: jax.Array | None,
        key_gates: jax.Array | None,
        bias_weights: jax.Array | None,
    ) -> jax.Array:
        """Scores from the products q_t . k_s: scaled, then capped, then with biases.

        Args:
            products: [B, Hkv, H / Hkv, T, S].
            i, j: [B or 1, T, 1] and [B or 1, 1, S], positions.
            gates, key_gates: [B, Hkv, H / Hkv, T] and [B, Hkv, H / Hkv, S]. bias_weights: [H, size].
        """
        scores = self.scale * products
        if self.softcap is not None:
            scores = self.softcap * jnp.tanh(scores / self.softcap)
        if self.bias is not None and bias_weights is not None:
            head = jax.vmap(self.bias, in_axes=(0, None, None), out_axes=1)
            bias = head(bias_weights.astype(scores.dtype), i, j)  # [B or 1, H, T, S]
            scores = scores + bias.reshape(len(bias), *scores.shape[1:])
        if gates is not None and key_gates is not None:
            scores = scores + (gates[..., :, None] - key_gates[..., None, :]).astype(scores.dtype)
        return scores
