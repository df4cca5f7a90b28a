"""Attention Residuals (Kimi Team 2026, arXiv 2603.15031), and their delta form (wdlctc/delta-attention-residuals-code).

A step is a norm and the branches behind it, such as a mixer or an MLP; y_l is the output of step l, y_0 the embedding.
In place of the residual stream x_l = y_0 + ... + y_l, step l + 1 reads

    h = sum_i a_i v_i,    a = softmax_i(w . RMSNorm(v_i)),

with a query w [D] and a norm of its own. The sources v_i are y_0, ..., y_l (form "full"), or y_0 and sums of the y of
consecutive steps, of which the last is still growing ("block"). In form "delta" it reads x_l + h instead, with the
sources of "full". The last norm reads such a mean too, but for "delta", where it reads the residual stream.

Queries start at zero, so a fresh model takes the uniform mean of the sources.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from seqmodels.depth import sources
from seqmodels.depth.attnres_fused import Shared
from seqmodels.depth.connection import Carry, Connection
from seqmodels.depth.scored import Scored
from seqmodels.depth.streams import stored
from seqmodels.layers.parameter import ones, parameter, zeros


def attend(known: sources.Buffered, query: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """sum_i a_i v_i, [B, T, D] float32, of sources [B, T, D] that are there; query and scale of the norm are [D].

    w . RMSNorm(v) is computed as (w scale) . v / rms(v), so that no source is normed in memory.
    """
    product, mean_square = known.products(query * scale)
    logits = product * jax.lax.rsqrt(mean_square + eps)
    there = known.known()[:, None, None]
    return known.mix(jax.nn.softmax(logits, axis=0, where=there))


class AttnRes(Connection):
    """The carry is the sources. The residual stream stays the embedding, but for form "delta".

    Blocks that run one by one keep complete sources in `dtype`, and read them once for the scores of all later steps.

    Attributes:
        options: config.model.attnres.
        width: D.
        steps: number of steps of this block, or 1 for what the last norm reads.
        total: number of steps of the whole model.
        scanned: whether the blocks run in a scan.
        eps: of the norms.
        dtype: of the model's activations.
        implementation: of the operation `attn_residual`, which sources then go through; "": plain sums.
    """

    options: Any
    width: int
    steps: int
    total: int
    scanned: bool
    eps: float
    dtype: DTypeLike
    implementation: str = ""

    @property
    def every(self) -> int:
        """Steps whose outputs make one source."""
        return -(-self.total // self.options.blocks) if self.options.form == "block" else 1

    def setup(self) -> None:
        size = (self.width,)
        self.queries = [parameter(self, f"query_{i}", size, ("embed",), zeros) for i in range(self.steps)]
        self.scales = [parameter(self, f"scale_{i}", size, ("embed",), ones) for i in range(self.steps)]

    def vectors(self) -> list[jax.Array]:
        """For each step the query times the scale of its norm, [D] float32: what a source over its rms is scored by."""
        return [query * scale for query, scale in zip(self.queries, self.scales, strict=True)]

    def start(self, x: jax.Array, blocks: Sequence[Any] = ()) -> Carry:
        """The embedding is the first source."""
        if self.scanned:
            return sources.first(x, 1 + -(-self.total // self.every))
        vectors = jnp.stack([vector for block in (*blocks, self) for vector in block.vectors()])
        if self.implementation:
            return Shared.of(x, vectors, self.every, self.eps, self.dtype, self.implementation)
        return Scored.of(x, vectors, self.every, self.eps, self.dtype)

    def enter(self, x: jax.Array, carry: Carry, step: int) -> tuple[jax.Array, Carry]:
        """The mean of the sources, weighted for this step."""
        if self.scanned:
            h = attend(carry, self.queries[step], self.scales[step], self.eps)
        elif self.implementation:
            h, carry = carry.mean()
        else:
            h = carry.mean()
        if self.options.form == "delta":
            h = x.astype(jnp.float32) + jnp.where(carry.steps > 0, h, 0)  # the first step has no output below it
            return h.astype(x.dtype), carry
        return stored(h, self.dtype), carry

    def leave(self, x: jax.Array, y: jax.Array, carry: Carry, step: int) -> tuple[jax.Array, Carry]:
        """y is a source, or a part of the newest."""
        y = y.astype(x.dtype)
        carry = carry.add(y, self.every) if self.scanned else carry.add(y)
        return x + y if self.options.form == "delta" else x, carry

    def finish(self, x: jax.Array, carry: Carry) -> jax.Array:
        """What the last norm reads."""
        return x if self.options.form == "delta" else self.enter(x, carry, 0)[0]

    def flops(self) -> float:
        """Two products with each source at each step: on average, half of the model's sources are there."""
        return 4.0 * self.width * self.steps * (1 + -(-self.total // self.every)) / 2
