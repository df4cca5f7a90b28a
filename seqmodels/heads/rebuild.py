"""All tokens of a row from the hidden state of its last one (MAD's auto-encoder: Poli et al. 2024, arXiv 2403.17844).

    h_t = last + sinusoids(t);   h_t = gelu(norm(h_t) W_i + b_i), i = 0, 1;   logits_t = norm(h_t) W + b

The decoder sees one vector and a position. In the authors' code the sinusoids are added to a vector that is not normed;
here it comes from the model's last norm.
"""

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from seqmodels.heads.classify import Classify, ClassifySums
from seqmodels.heads.head import Batch, Head
from seqmodels.layers import pooling
from seqmodels.layers.matmul import wide_matmul
from seqmodels.layers.norm import rms_norm
from seqmodels.layers.parameter import normal, ones, parameter, zeros
from seqmodels.layers.positions import sinusoids

LAYERS = 2  # of the decoder, before the logits


class Rebuild(Head):
    """Logits [B, T, K] of the tokens at all positions; trained by cross-entropy on `targets` [B, T], of which -1 do not
    count. A row is one document.
    """

    target: ClassVar[str] = "targets"
    needs: ClassVar[tuple[str, ...]] = ()

    def setup(self) -> None:
        self.hidden = [self._affine(f"decoder_{i}", self.width, "embed") for i in range(LAYERS)]
        self.last = self._affine("kernel", self.size, "outputs", "bias")

    def _affine(self, name: str, size: int, axis: str, bias: str = "") -> tuple[jax.Array, ...]:
        """Declare the scale of the norm before a matrix, the matrix [D, size] and its bias."""
        kernel = parameter(
            self, name, (self.width, size), ("embed", axis), normal(self.width**-0.5), dtype=self.dtype, group="head"
        )
        scale = parameter(self, f"{name}_norm", (self.width,), ("embed",), ones, group="head")
        return scale, kernel, parameter(self, bias or f"{name}_bias", (size,), (axis,), zeros, group="head")

    def __call__(self, hidden: jax.Array, mask: jax.Array | None = None, table: jax.Array | None = None) -> jax.Array:
        """[B, T, D] to [B, T, K] float32; of the hidden states only the last real one is read."""
        mask = jnp.ones(hidden.shape[:2], bool) if mask is None else mask
        last = pooling.whole("last", hidden, mask)
        h = last[:, None] + sinusoids(jnp.arange(hidden.shape[1])[None], self.width)
        for layer in self.hidden:
            h = jax.nn.gelu(self._apply(layer, h), approximate=False)
        return self._apply(self.last, h)

    def _apply(self, layer: tuple[jax.Array, ...], h: jax.Array) -> jax.Array:
        scale, kernel, bias = layer
        return wide_matmul(rms_norm(h, scale).astype(self.dtype), kernel) + bias

    @staticmethod
    def loss(outputs_of: Callable[..., jax.Array], hidden: jax.Array, batch: Batch) -> tuple[jax.Array, ClassifySums]:
        """Sum of -log p(target) in nats, and the sums over targets.

        Args:
            outputs_of: (hidden, mask) -> logits [B, T, K] float32.
            hidden: [B, T, D].
            batch: targets [B, T] int32; mask [B, T] bool if there is padding.
        """
        return Classify.cross_entropy(outputs_of(hidden, batch.get("mask")), batch["targets"])

    figures = staticmethod(Classify.figures)
