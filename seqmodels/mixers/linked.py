"""Base of the branches whose hidden state DenseSSM can access: their computation is split into four parts."""

from typing import Any

import flax.linen as nn
import jax

from seqmodels.branch import NO_LINKS, Branch, Links, State
from seqmodels.sequence import Sequence


class Linked(Branch):
    """A branch that separates what it writes into its state from how it reads the state.

    A subclass sets `link` and defines the methods below. A connection across depth can combine
    the streams of lower layers with the layer's own between `stream_and_readout` and `scan` (`seqmodels.depth`).
    """

    def __call__(
        self, x: jax.Array, seq: Sequence, state: State = None, links: Links = NO_LINKS
    ) -> tuple[jax.Array, State]:
        """x [B, T, D] to y [B, T, D] and the new state: the layer without links of its state."""
        stream, readout = self.stream_and_readout(x, seq, state, links)
        y, state = self.scan(stream, readout, seq)
        return self.project(y), self.new_state(readout, state)

    @property
    def stream_sizes(self) -> tuple[int, int]:
        """Channels of the values and of the keys that are written, over all heads: the widths of the links' gates."""
        raise NotImplementedError

    def stream_and_readout(
        self, x: jax.Array, seq: Sequence, state: State = None, links: Links = NO_LINKS
    ) -> tuple[Any, Any]:
        """Everything before the recurrence: what x [B, T, D] writes into the state, and what reads the state."""
        raise NotImplementedError

    def keep(self, stream: Any, seq: Sequence, readers: int) -> Any:
        """The stream, with its states at all tokens where that makes so many reading layers above it faster."""
        return stream

    def scan(self, stream: Any, readout: Any, seq: Sequence) -> tuple[jax.Array, Any]:
        """The recurrence with skip, gate and norm: y as `project` takes it, and the recurrence's final state."""
        raise NotImplementedError

    def project(self, y: jax.Array) -> jax.Array:
        """The output projection, to [B, T, D]."""
        raise NotImplementedError

    @nn.nowrap
    def new_state(self, readout: Any, state: Any) -> State:
        """The branch's state after the tokens, from the recurrence's final state."""
        raise NotImplementedError
