"""Numbers with their variance at every position, trained by the likelihood of a normal distribution."""

import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from seqmodels.heads.forecast import known_future
from seqmodels.heads.head import Batch, Head
from seqmodels.layers.matmul import wide_matmul
from seqmodels.layers.parameter import normal, parameter, zeros

SMALLEST = 1e-6  # variance that is added, so that no likelihood grows without end


@struct.dataclass
class GaussianSums:
    """Sums over the numbers that count. Scalars, float32."""

    nats: jax.Array  # sum of -log p(number)
    squared: jax.Array  # sum of squared errors of the means
    count: jax.Array  # number of numbers


class Gaussian(Head):
    """Base: mean and variance of `size` R numbers at every position, [B, T, 2, R] float32.

    A number l of the matrix product becomes the variance exp(l) where l < 0, and l + 1 elsewhere, as in the authors'
    networks for the pendulum (Schirmer et al. 2022, Smith et al. 2023).
    """

    def setup(self) -> None:
        shape, axes, init = (self.width, 2 * self.size), ("embed", "outputs"), normal(self.width**-0.5)
        self.kernel = parameter(self, "kernel", shape, axes, init, dtype=self.dtype, group="head")
        self.bias = parameter(self, "bias", shape[1:], axes[1:], zeros, group="head")

    def __call__(self, hidden: jax.Array, mask: jax.Array | None = None, table: jax.Array | None = None) -> jax.Array:
        """[B, T, D] to [B, T, 2, R] float32. Hidden states where the mask is False may be anything."""
        if mask is not None:
            hidden = jnp.where(mask[..., None], hidden, 0)
        y = (wide_matmul(hidden.astype(self.dtype), self.kernel) + self.bias).reshape(*hidden.shape[:2], 2, self.size)
        raw = y[:, :, 1]
        small = jnp.exp(jnp.minimum(raw, 0))  # elu(l) + 1 is the same, but would round it to multiples of 1e-7
        return jnp.stack([y[:, :, 0], jnp.where(raw < 0, small, raw + 1) + SMALLEST], axis=2)

    def restore(self, predicted: jax.Array, mean: jax.Array | float, deviation: jax.Array | float) -> jax.Array:
        """Means and variances [B, T, 2, R] in the old units."""
        return jnp.stack([predicted[:, :, 0] * deviation + mean, predicted[:, :, 1] * deviation**2], axis=2)

    @staticmethod
    def likelihood(outputs: jax.Array, targets: jax.Array, counts: jax.Array) -> tuple[jax.Array, GaussianSums]:
        """Sum of -log p(target) in nats, and the sums.

        Args:
            outputs: [B, T, 2, R]. targets, counts: [B, T, R]; targets are numbers also where they do not count.
        """
        mean, variance = outputs[:, :, 0], outputs[:, :, 1]
        squares = jnp.where(counts, jnp.square(mean - targets), 0.0)
        each = 0.5 * (math.log(2 * math.pi) + jnp.log(variance) + squares / variance)
        nats = jnp.where(counts, each, 0.0).sum()
        return nats, jax.lax.stop_gradient(GaussianSums(nats, squares.sum(), jnp.sum(counts, dtype=jnp.float32)))

    @staticmethod
    def figures(sums: GaussianSums) -> dict[str, jax.Array]:
        """loss: nats per number. mse: the mean squared error of the means."""
        return {"loss": sums.nats / sums.count, "mse": sums.squared / sums.count}


class NextValue(Gaussian):
    """Mean and variance of the next value of each channel at every position."""

    target: ClassVar[str] = "values"
    causal: ClassVar[bool] = True

    @staticmethod
    def next_of(outputs: jax.Array) -> jax.Array:
        """The mean of the next value [B, T, C] at each position, of outputs [B, T, 2, C]."""
        return outputs[:, :, 0]

    @staticmethod
    def loss(outputs_of: Callable[..., jax.Array], hidden: jax.Array, batch: Batch) -> tuple[jax.Array, GaussianSums]:
        """Sum of -log p(next value) in nats, and the sums.

        Args:
            outputs_of: (hidden, mask) -> [B, T, 2, C] float32.
            hidden: [B, T, D].
            batch: values [B, T, C] float, mask [B, T] bool, and perhaps segment_ids and observed, as of `Forecast`.
        """
        targets, counts = known_future(batch, 1)
        return Gaussian.likelihood(outputs_of(hidden, batch["mask"]), targets[:, :, 0], counts[:, :, 0])


class RegressSteps(Gaussian):
    """Mean and variance of R targets at every position; the blocks may read in both directions."""

    target: ClassVar[str] = "targets"

    @staticmethod
    def loss(outputs_of: Callable[..., jax.Array], hidden: jax.Array, batch: Batch) -> tuple[jax.Array, GaussianSums]:
        """Sum of -log p(target) in nats, and the sums.

        Args:
            outputs_of: (hidden, mask, segment_ids, documents, values, observed) -> [B, T, 2, R] float32.
            hidden: [B, T, D].
            batch: targets [B, T, R] float32, where NaN does not count, mask [B, T] bool, and the arrays of the input.
        """
        targets, units = batch["targets"], [batch[name] for name in ("values", "observed") if name in batch]
        more = (None, 0, *units) if units else ()
        counts = ~jnp.isnan(targets) & batch["mask"][..., None]
        return Gaussian.likelihood(outputs_of(hidden, batch["mask"], *more), jnp.where(counts, targets, 0.0), counts)
