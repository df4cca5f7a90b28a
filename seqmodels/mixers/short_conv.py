"""A causal convolution over the last tokens, channel by channel: what `model.short_conv` adds to a mixer's input.

A mixer then sees x + y with y_t = sum_{k < W} taps[W-1-k] x_{t-k}, so that a token's query, key and value know the
tokens just before it. Zoology (Arora et al. 2023, arXiv 2312.04927) gives its baselines such a convolution; as a
residual branch without an activation it is the Canon layer A of Allen-Zhu 2025 (arXiv 2512.17351).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.branch import Branch, State, real
from seqmodels.layers.parameter import parameter, uniform
from seqmodels.parallel import short_conv
from seqmodels.sequence import Sequence


class ShortConv(Branch):
    """The convolution alone; the block adds its input. `taps` is W, the tokens that it sees, its own included."""

    taps: int = 4

    operations = ("short_conv",)

    @nn.nowrap
    def init_state(self, batch: int, max_length: int | None = None) -> jax.Array:
        """[B, W - 1, D] float32: the last real inputs of the document."""
        return jnp.zeros((batch, self.taps - 1, self.width), jnp.float32)

    @nn.compact
    def __call__(self, x: jax.Array, seq: Sequence, state: State = None) -> tuple[jax.Array, State]:
        """x [B, T, D] to y [B, T, D] and the new state."""
        shape, init = (self.taps, self.width), uniform(self.taps**-0.5)  # torch's Conv1d, whose fan-in is W
        return short_conv(
            real(x, seq, self.dtype),
            parameter(self, "taps", shape, ("conv", "embed"), init),
            initial_state=state,
            implementation=self.implementation.get("short_conv"),
            **seq.documents(),
        )
