"""DenseFormer (Pagliardini et al. 2024, arXiv 2402.02622): after each block, a weighted mean over the depth.

With X_0 the embedding and X_i = Y_{i-1} + block_i(Y_{i-1}) the output of block i, the next block reads

    Y_i = sum_{j <= i} a_{i,j} X_j,

with learned numbers a that are 1 for j = i and 0 for the others in a fresh model, which is thus the plain network.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from seqmodels.depth import sources
from seqmodels.depth.connection import Carry, Connection
from seqmodels.layers.parameter import parameter


def newest(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """An initialiser: one for the first number, which belongs to the newest source, and zero for the others."""
    return jnp.zeros(shape, dtype).at[0].set(1)


class DenseFormer(Connection):
    """The carry is the outputs X of the blocks. The residual stream is Y.

    Attributes:
        width: D.
        steps: number of steps of this block; 0 at the end of the model.
        blocks: number of blocks of the whole model. Each block has a weight for each output, the newest first, and does
            not use those for which there is no output, so that all blocks have parameters of one shape.
        scanned: whether the blocks run in a scan.
    """

    width: int
    steps: int
    blocks: int
    scanned: bool

    def setup(self) -> None:
        if self.steps:
            self.weights = parameter(self, "weights", (self.blocks + 1,), (None,), newest)

    def start(self, x: jax.Array, blocks: Sequence[Any] = ()) -> Carry:
        """The embedding is the first source."""
        return sources.first(x, self.scanned * (self.blocks + 1))

    def leave(self, x: jax.Array, y: jax.Array, carry: Carry, step: int) -> tuple[jax.Array, Carry]:
        """After the block's last step, the weighted sum of all outputs."""
        x, carry = super().leave(x, y, carry, step)
        if step < self.steps - 1:
            return x, carry
        carry = carry.add(x)
        place = carry.count - 1 - jnp.arange(len(carry.known()))  # of each source, counted from the newest
        weights = jnp.where(place >= 0, self.weights[jnp.maximum(place, 0)], 0)
        return carry.mix(weights[:, None, None]).astype(x.dtype), carry

    def flops(self) -> float:
        """A product with each output: on average, half of the model's blocks are below."""
        return 2.0 * self.width * (1 + self.blocks) / 2 if self.steps else 0.0
