"""MUDD connections (Xiao et al. 2025, arXiv 2502.12170): each input of a block mixes the outputs of all blocks below.

X_0 is the embedding and X_i the residual stream behind block i. For each way c of block i, such as the queries, keys
and values of attention and the residual stream, the block reads

    R^c = sum_{j < i} a^c_j X_j,    a^c = W2^c GELU(W1 RMSNorm(X_{i-1})) + b^c,

with a norm of its own for each way. The last norm reads such a sum too, of one way, with a hidden layer four times as
wide. W2 is zero, and b one for the newest source and zero for the others, in a fresh model: it is the plain network.

The ways are the residual stream, the block's input, which values are made of, and the inputs that its first branch can
read apart (`Branch.ways`): queries and keys; B with C, and the gates dt and z, of Mamba-2; the gate z of Mamba, which
computes B, C and dt of the convolved x. Where it can read none apart, there are two. All blocks have weights for as
many sources, and hidden layers of one width, so that they can run in a scan. This is our choice, as is that the first
block has them.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from seqmodels.branch import Branch, Links, State
from seqmodels.depth import sources
from seqmodels.depth.connection import Carry, Connection
from seqmodels.depth.streams import combined, stored
from seqmodels.layers.norm import rms_norm
from seqmodels.layers.parameter import normal, parameter, zeros
from seqmodels.sequence import Sequence

ROUNDED = 64  # the hidden layer is a multiple of it wide
END = 4  # times as wide is the hidden layer before the last norm


def newest(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """An initialiser [C, S]: one for the first source, which is the newest, of each way."""
    return jnp.zeros(shape, dtype).at[:, 0].set(1)


@struct.dataclass
class Mixed:
    """What a block's first step reads: `inputs` [B, T, D] of its branch by way, the residual stream, the sources."""

    inputs: dict[str, jax.Array]
    residual: jax.Array
    known: Any


class Mudd(Connection):
    """The carry is the outputs of the blocks: below the newest, or in a scan with it.

    Attributes:
        ways: the inputs of the block's first branch beside its main input.
        width: D.
        steps: number of steps of this block; 0 at the end of the model.
        blocks: number of blocks of the whole model.
        scanned: whether the blocks run in a scan.
        eps: of the norm of X. norm: makes the norm of a way.
        dtype: of the model's activations.
    """

    ways: tuple[str, ...]
    width: int
    steps: int
    blocks: int
    scanned: bool
    eps: float
    norm: Callable[[], nn.Module]
    dtype: DTypeLike

    def setup(self) -> None:
        ways, room = len(self.ways) + 2 if self.steps else 1, self.blocks + 1
        hidden = -(-ways * room // ROUNDED) * ROUNDED * (1 if self.steps else END)
        self.W1 = parameter(
            self, "hidden", (self.width, hidden), ("embed", None), normal(self.width**-0.5), dtype=self.dtype
        )
        self.W2 = parameter(self, "weights", (hidden, ways, room), (None, None, None), zeros, dtype=self.dtype)
        self.bias = parameter(self, "bias", (ways, room), (None, None), newest, decay=False)
        self.norms = {way: self.norm() for way in self.ways}

    def start(self, x: jax.Array, blocks: object = ()) -> Carry:
        """No output below the embedding."""
        return sources.empty(x, self.blocks + 1) if self.scanned else ()

    def mix(self, x: jax.Array, carry: Carry) -> tuple[list[jax.Array], Carry]:
        """R of each way [B, T, D] float32, the residual stream's last, and the carry with x."""
        hidden = jax.nn.gelu(rms_norm(x, None, self.eps).astype(self.dtype) @ self.W1, approximate=False)
        weights = jnp.einsum("btk,kcs->csbt", hidden, self.W2, preferred_element_type=jnp.float32)
        weights = weights + self.bias[:, :, None, None]
        if self.scanned:
            carry = carry.add(x)
            place = carry.count - 1 - jnp.arange(len(carry.known()))  # of each source, counted from the newest
            there = (place >= 0)[:, None, None]
            return [carry.mix(jnp.where(there, w[jnp.maximum(place, 0)], 0)) for w in weights], carry
        streams = (x, *reversed(carry))
        return [combined(w[: len(streams)], streams) for w in weights], (*carry, stored(x, self.dtype))

    def enter(self, x: jax.Array, carry: Carry, step: int) -> tuple[jax.Array, Carry]:
        """The main input of the block, and the others in the carry until `leave`."""
        if step:
            return x, carry
        (main, *others, residual), carry = self.mix(x, carry)
        inputs = {way: stored(other, self.dtype) for way, other in zip(self.ways, others, strict=True)}
        return stored(main, self.dtype), Mixed(inputs, residual.astype(x.dtype), carry)

    def run(
        self, branch: Branch, x: jax.Array, seq: Sequence, state: State, carry: Carry, own: State
    ) -> tuple[jax.Array, State, Carry, State]:
        """Run the branch with its inputs."""
        if not (isinstance(carry, Mixed) and branch.ways and branch.ways == self.ways):
            return super().run(branch, x, seq, state, carry, own)
        inputs = {way: norm(carry.inputs[way]).astype(self.dtype) for way, norm in self.norms.items()}
        y, state = branch(x, seq, state, Links(inputs))  # type: ignore[call-arg]
        return y, state, carry, own

    def leave(self, x: jax.Array, y: jax.Array, carry: Carry, step: int) -> tuple[jax.Array, Carry]:
        """The first step adds to the mixed residual stream."""
        if step == 0:
            x, carry = carry.residual, carry.known
        return super().leave(x, y, carry, step)

    def finish(self, x: jax.Array, carry: Carry) -> jax.Array:
        """What the last norm reads."""
        return self.mix(x, carry)[0][0].astype(x.dtype)

    def flops(self) -> float:
        """A product with each output for each way: on average, half of the model's blocks are below."""
        return 2.0 * self.width * (len(self.ways) + 2) * (1 + self.blocks) / 2 if self.steps else 0.0
