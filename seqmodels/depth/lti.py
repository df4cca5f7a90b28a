"""DenseSSM for mixers whose system is the same for all tokens (S4, S4D, H3). vector.py is the same for Mamba.

Layer l has the system A^l, B^l, C^l, whose input is x^l and whose state is h^l. "past" are the m layers below:

    read    y^l = C^l h^l + g_E sum_past P^T C^l h^i: this layer's readout also reads the lower states
    output  y^l = C^l h^l + g_E sum_past C^i h^i: a control, adds the lower layers' own readouts

g_E [E] depends on the token, and stands behind the states; so READ is a convolution of each lower input x^i with a
cross kernel, which has this layer's readout and the lower layer's system (both real parts, as in the mixers):

    C^l (A^i)^k B^i,   k = 0, 1, ..

A gate of each number of state (g_N) could not stand behind them, and RANK, INPUT and CARRY write what depends on the
token: these have no such kernels, and are refused.
"""

from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.depth.fusion import Fusion
from seqmodels.depth.gates import gated
from seqmodels.mixers.lti import Readout, Stream, read_state
from seqmodels.sequence import Sequence


class LtiFusion(Fusion):
    """See `Fusion`; inner and state are E and N / 2.

    Attributes:
        read_flops: operations per token of reading the state of one lower layer.
    """

    read_flops: float

    allowed: ClassVar[Mapping[str, tuple[str, ...]]] = dict(variant=("read", "output"), gate=("channel", "none"))

    @nn.nowrap
    def flops(self) -> float:
        """Operations per token of the forward pass in the lower states, which READ runs again."""
        return self.sources * self.read_flops * (self.options.variant == "read")

    def __call__(
        self,
        x: jax.Array,
        own: Stream,
        readout: Readout,
        sources: tuple[Stream, ...],
        seq: Sequence,
        carried: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, None, Stream]:
        """As `Fusion`, without further state."""
        gate = self.gates(x, seq)[0] if sources else None
        y, state, stream = getattr(self, f"_{self.options.variant}")(own, readout, sources, seq, gate)
        return readout.gated(y.astype(own.x.dtype)), state, None, stream

    def _read_state(self, stream, c, skip, seq):
        return read_state(stream, c, skip, seq, self.implementation.get("long_conv"))

    def _sum(self, gate, lower):
        return gated(gate, [self.gates.norm_channel(v) for v in lower] if self.options.norm else lower)

    def _read(self, own, readout, sources, seq, gate):
        query = readout.C
        if self.options.projection == "linear":
            query = jnp.einsum("nm,ne->me", self.gates.P.astype(query.dtype), query)
        y, state = self._read_state(own, readout.C, readout.D, seq)
        lower = [self._read_state(source, query, None, seq)[0] for source in sources]
        return y + self._sum(gate, lower), state, own

    def _output(self, own, readout, sources, seq, gate):
        y, state = self._read_state(own, readout.C, None, seq)
        fused = y + readout.D * own.x
        fused = fused + self._sum(gate, [source.y for source in sources]) if sources else fused
        return fused, state, own.replace(y=y)
