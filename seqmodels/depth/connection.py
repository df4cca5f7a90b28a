"""The contract of connections across depth: what a block reads from the blocks below it, and what it passes up."""

from collections.abc import Sequence as Seq
from typing import Any

import flax.linen as nn
import jax

from seqmodels.branch import Branch, State
from seqmodels.sequence import Sequence

Carry = Any  # a pytree passed from block to block beside the residual stream, also through the scan over blocks


class Connection(nn.Module):
    """Base of all connections; each block has one. This class is the plain network without further connections.

    A connection sees the input of each step of its block (`enter`). It runs the block's branches (`run`), where it can
    access their hidden states. It sees their output (`leave`). It passes `carry` to the next block. One more, which has
    no block, sees what goes into the last norm (`finish`). It may declare parameters, which are placed beside the
    block's other parameters. It has a state from token to token only if `init_state` returns one.

    A scan over blocks needs a carry of one structure. Blocks at the bottom whose carry still grows are unrolled
    (`seqmodels.backbone.scanned`).
    """

    @nn.nowrap
    def start(self, x: jax.Array, blocks: Seq[Any] = ()) -> Carry:
        """The carry before the first block, of the embedded input x [B, T, D].

        blocks: the connections of the blocks that run one by one, of this class: their parameters are known ahead.
        """
        return ()

    def enter(self, x: jax.Array, carry: Carry, step: int) -> tuple[jax.Array, Carry]:
        """The input of step number `step` of the block, before its norm: [B, T, D]. x is the residual stream.

        The carry that it returns is for `run` and `leave` of this step, and may have another structure.
        """
        return x, carry

    def run(
        self, branch: Branch, x: jax.Array, seq: Sequence, state: State, carry: Carry, own: State
    ) -> tuple[jax.Array, State, Carry, State]:
        """Run the branch on its normed input x [B, T, D].

        Returns:
            y [B, T, D], the branch's new state, the carry, and the connection's state.
        """
        y, state = branch(x, seq, state)
        return y, state, carry, own

    def leave(self, x: jax.Array, y: jax.Array, carry: Carry, step: int) -> tuple[jax.Array, Carry]:
        """The residual stream and the carry after a step whose branches returned y [B, T, D]."""
        return x + y.astype(x.dtype), carry

    def finish(self, x: jax.Array, carry: Carry) -> jax.Array:
        """The input of the last norm [B, T, D], of the residual stream and the carry behind the last block."""
        return x

    @nn.nowrap
    def init_state(self, batch: int) -> State:
        """The connection's own state before the first token; {} if it has none."""
        return {}

    @nn.nowrap
    def flops(self) -> float:
        """Operations per token of the forward pass, beyond two for each parameter."""
        return 0.0
