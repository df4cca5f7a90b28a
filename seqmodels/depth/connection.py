"""What a block takes from the blocks below it, and what it hands up: the contract of connections across depth."""

from typing import Any

import flax.linen as nn
import jax

from seqmodels.branch import Branch, State
from seqmodels.sequence import Sequence

Carry = Any  # a pytree that is handed from block to block beside the residual stream, through the scan over blocks too


class Connection(nn.Module):
    """One for each block. This one is the plain network: the blocks share the residual stream, and nothing else.

    A connection sees the input of each step of its block (`enter`), runs its branches (`run`), which is where hidden
    states can be reached, and sees their output (`leave`). What it hands up is `carry`. It may declare parameters,
    which stand beside the block's other ones. It has no state from token to token unless `init_state` gives one.

    A scan over blocks needs a carry of one structure. Blocks at the bottom whose carry still grows are unrolled
    (`seqmodels.backbone.scanned`).
    """

    @nn.nowrap
    def start(self, x: jax.Array) -> Carry:
        """The carry before the first block, of the embedded input x [B, T, D]."""
        return ()

    def enter(self, x: jax.Array, carry: Carry, step: int) -> jax.Array:
        """What step number `step` of the block reads, before its norm: [B, T, D]. x is the residual stream."""
        return x

    def run(
        self, branch: Branch, x: jax.Array, seq: Sequence, state: State, carry: Carry, own: State
    ) -> tuple[jax.Array, State, Carry, State]:
        """The branch on its normed input x [B, T, D]: y [B, T, D], its new state, the carry, the connection's state."""
        y, state = branch(x, seq, state)
        return y, state, carry, own

    def leave(self, x: jax.Array, y: jax.Array, carry: Carry, step: int) -> tuple[jax.Array, Carry]:
        """The residual stream and the carry after a step whose branches gave y [B, T, D]."""
        return x + y.astype(x.dtype), carry

    @nn.nowrap
    def init_state(self, batch: int) -> State:
        """The connection's own state before the first token; {} where it has none."""
        return {}

    @nn.nowrap
    def flops(self) -> float:
        """Operations a token of the forward pass, beyond two for each parameter."""
        return 0.0
