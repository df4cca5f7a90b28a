"""A branch in both directions of time: one copy reads forwards, one backwards, and their outputs are added.

y = f(x) + reverse(g(reverse(x))), where f and g have separate parameters. Documents, padding and steps of time are
reversed together with the tokens, so packed documents give the same results as separate ones in both directions.
"""

from typing import ClassVar

import flax.linen as nn
import jax

from seqmodels.branch import Branch, State
from seqmodels.errors import UserError
from seqmodels.sequence import Sequence, reversed_in_time


class Bidirectional(Branch, kw_only=True):
    """`bi:` of the pattern language. `ahead` and `back` are two branches of the same kind."""

    ahead: Branch
    back: Branch

    causal: ClassVar[bool] = False

    @nn.nowrap
    def init_state(self, batch: int, max_length: int | None = None) -> State:
        """Raises UserError: an output depends on all later tokens, so there is no state from token to token."""
        raise UserError(
            "config.model.pattern: 'bi:' reads both directions of time and has no state; such a model can neither "
            "continue a prompt nor read a sequence in pieces"
        )

    def __call__(self, x: jax.Array, seq: Sequence, state: State = None) -> tuple[jax.Array, State]:
        """x [B, T, D], whole sequences, to y [B, T, D]; no state."""
        if state:
            self.init_state(x.shape[0])
        y, _ = self.ahead(x, seq)
        z, _ = self.back(x[:, ::-1], reversed_in_time(seq))
        return y + z[:, ::-1], {}

    @nn.nowrap
    def flops(self, length: int) -> float:
        """Operations of both copies."""
        return self.ahead.flops(length) + self.back.flops(length)

    @nn.nowrap
    def idle_parameters(self) -> int:
        """Of both copies."""
        return self.ahead.idle_parameters() + self.back.idle_parameters()
