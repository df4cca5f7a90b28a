"""What branches have in common whose hidden state DenseSSM can reach: their work in four parts."""

from typing import Any

import flax.linen as nn
import jax

from seqmodels.branch import Branch, State
from seqmodels.sequence import Sequence


class Linked(Branch):
    """A branch that says what it writes into its state apart from how it reads it.

    A subclass sets `link` ("vector" or "matrix") and defines the methods below. Between the first two, a connection
    across depth can put the streams of lower layers beside the layer's own (`seqmodels.depth`).
    """

    def __call__(self, x: jax.Array, seq: Sequence, state: State = None) -> tuple[jax.Array, State]:
        """x [B, T, D] to y [B, T, D] and the new state: the layer without links."""
        stream, readout = self.stream_and_readout(x, seq, state)
        y, state = self.scan(stream, readout, seq)
        return self.project(y), self.new_state(readout, state)

    @property
    def stream_sizes(self) -> tuple[int, int]:
        """Channels of what is written, and of its keys, over all heads: what the links' gates are as wide as."""
        raise NotImplementedError

    def stream_and_readout(self, x: jax.Array, seq: Sequence, state: State = None) -> tuple[Any, Any]:
        """What x [B, T, D] writes into the state, and what reads it: all that comes before the recurrence."""
        raise NotImplementedError

    def scan(self, stream: Any, readout: Any, seq: Sequence) -> tuple[jax.Array, Any]:
        """The recurrence with skip, gate and norm: y as `project` takes it, and the recurrence's final state."""
        raise NotImplementedError

    def project(self, y: jax.Array) -> jax.Array:
        """The output projection, to [B, T, D]."""
        raise NotImplementedError

    @nn.nowrap
    def new_state(self, readout: Any, state: Any) -> State:
        """The branch's state after the tokens, of the recurrence's final state."""
        raise NotImplementedError
