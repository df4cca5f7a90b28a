"""DenseSSM: layers that use the hidden states of the layers below (He et al. 2024, arXiv 2403.00818), for Mamba.

matrix.py is the same for mixers whose state is a matrix, and lti.py for those whose system is the same for all tokens.

Let s^l be layer l's own state, and "past" the m layers below that have a state. The published text and figures do not
say where the lower states enter, and no code of DenseMamba was published. So each interpretation has a name:

    read    y^l = s^l C^l + sum_past g_E (s^i P^T (g_N C^l)): this layer's query also reads the lower states
    input   u' = u + g_E sum_past u^i, B' = B + g_N sum_past P B^i: this layer writes a mixture, as in DenseRetNet
    output  y^l = s^l C^l + g_E sum_past s^i C^i: a control, adds the lower layers' own readouts
    rank    s_t = a s_{t-1} + (dt u) B + sum_past (g_E dt^i u^i) (g_N P B^i): lower writes, with this layer's decay
    carry   h_t = a h_{t-1} + (dt u) B + sum_past g_E g_N P s^i, y = h C: adds the lower states at every token

g_E [E] and g_N [N] depend on the token. READ runs as one grouped selective scan, which recomputes the lower states. A
grouped scan holds three lower states; each further one has a scan of its own.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.depth.fusion import Fusion
from seqmodels.depth.gates import gated
from seqmodels.kernels.selective_scan.coupled import carry_scan, rank_scan
from seqmodels.kernels.selective_scan.kept import read
from seqmodels.mixers.mamba import SCAN_FLOPS, Readout, Stream, skip_and_gate, stack
from seqmodels.parallel import selective_scan
from seqmodels.sequence import Sequence

GROUPS = 4  # most states of one grouped scan: the GPU kernels cannot hold more in registers

# Operations per token and state element for each lower state. READ scans the state again and reads it; CARRY scans it,
# gates it twice and adds it; RANK writes it, by a product and a sum. INPUT and OUTPUT do not touch the lower states.
FLOPS = {"read": SCAN_FLOPS, "carry": 4 + 2 + 1, "rank": 2, "input": 0, "output": 0}


def queries(C: jax.Array, gate_state: jax.Array | None, projection: jax.Array | None, sources: int) -> jax.Array:
    """P^T (g_N C), the query that reads each lower state: [B, T, m, N]."""
    query = C[:, :, None] if gate_state is None else gate_state * C[:, :, None]
    if projection is not None:
        query = query @ projection
    return jnp.broadcast_to(query, (*C.shape[:2], sources, C.shape[-1]))


class VectorFusion(Fusion):
    """See `Fusion`; inner and state are E and N."""

    @nn.nowrap
    def flops(self) -> float:
        """Operations per token of the forward pass in the lower states."""
        return self.sources * FLOPS[self.options.variant] * self.inner * self.state

    @nn.nowrap
    def init_state(self, batch: int) -> jax.Array | None:
        """CARRY's extra state [B, E, N] float32: the part of the state that the layers below added. Else None."""
        if self.options.variant != "carry":
            return None
        return jnp.zeros((batch, self.inner, self.state), jnp.float32)

    def __call__(
        self,
        x: jax.Array,
        own: Stream,
        readout: Readout,
        sources: tuple[Stream, ...],
        seq: Sequence,
        carried: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array | None, Stream]:
        """As `Fusion`; y [B, T, E] has skip and gate, and `carried` is CARRY's extra state."""
        channel, state = self.gates(x, seq) if sources else (None, None)
        P = self.gates.P if sources and self.options.projection == "linear" else None
        fuse = getattr(self, f"_{self.options.variant}")
        return fuse(own, readout, sources, seq, channel, state, P, carried)

    def _scan(self, seq, C, **arrays):
        return selective_scan(
            **arrays, C=C, implementation=self.implementation.get("selective_scan"), **seq.documents()
        )

    def _plain(self, stream, C, seq, **options):
        groups = dict(u=stream.u, A=stream.A, B=stream.B, **stream.scanned_step())
        return self._scan(seq, C, **groups, initial_state=stream.state, **options)

    def _read(self, own, readout, sources, seq, channel, state, P, carried):
        query = queries(readout.C, state, P, len(sources))
        if own.kept is not None:
            lower = [read(s.kept, 1 + i, query[:, :, i]) for i, s in enumerate(sources)]
            lower = [self.gates.norm_channel(v) for v in lower] if self.options.norm else lower
            y = read(own.kept, 0, readout.C) + gated(channel, lower)
            return skip_and_gate(y, own.u, readout), own.kept.last, None, own
        if self.options.norm:
            y, new = self._plain(own, readout.C, seq)
            lower = [self._plain(s, query[:, :, i], seq)[0] for i, s in enumerate(sources)]
            y = y + gated(channel, [self.gates.norm_channel(v) for v in lower])
            return skip_and_gate(y, own.u, readout), new, None, own
        C = jnp.concatenate([readout.C[:, :, None], query], axis=2)
        if len(sources) < GROUPS:
            options = dict(D=readout.D, z=readout.z, weights=channel)
            y, new = self._scan(seq, C, **stack([own, *sources]), **options)
            return y, new[:, 0], None, own
        near, far = slice(GROUPS - 1), slice(GROUPS - 1, None)
        shared = channel is None or channel.shape[2] == 1
        streams = stack([own, *sources[near]])
        y, new = self._scan(seq, C[:, :, :GROUPS], **streams, weights=channel if shared else channel[:, :, near])
        lower = [self._plain(s, query[:, :, GROUPS - 1 + i], seq)[0] for i, s in enumerate(sources[far])]
        y = y + gated(channel if shared else channel[:, :, far], lower)
        return skip_and_gate(y, own.u, readout), new[:, 0], None, own

    def _input(self, own, readout, sources, seq, channel, state, P, carried):
        keys = [s.B if P is None else s.B @ P.T for s in sources]
        u = own.u + gated(channel, [s.u for s in sources]) if self.options.gate != "state" else own.u
        B = own.B + gated(state, keys) if self.options.gate != "channel" else own.B
        if self.options.norm:
            u = self.gates.norm_channel(u) if self.options.gate != "state" else u
            B = self.gates.norm_state(B) if self.options.gate != "channel" else B
        y, new = self._plain(own.replace(u=u, B=B), readout.C, seq)
        return skip_and_gate(y, own.u, readout), new, None, own

    def _output(self, own, readout, sources, seq, channel, state, P, carried):
        y, new = self._plain(own, readout.C, seq)
        lower = [self.gates.norm_channel(s.y) if self.options.norm else s.y for s in sources]
        fused = y + gated(channel, lower) if lower else y  # the bottom layer only passes its readout up
        return skip_and_gate(fused, own.u, readout), new, None, own.replace(y=y)

    def _rank(self, own, readout, sources, seq, channel, state, P, carried):
        keys = jnp.stack([s.B if P is None else s.B @ P.T for s in sources], axis=2)
        values = jnp.stack([s.step() * s.u for s in sources], axis=2)
        keys = keys if state is None else state * keys
        values = values if channel is None else channel * values
        writes = jnp.concatenate([(own.step() * own.u)[:, :, None], values], axis=2)
        keys = jnp.concatenate([own.B[:, :, None], keys], axis=2)
        y, new = rank_scan(own.step(), own.A, writes, keys, readout.C, own.state, **seq.documents())
        return skip_and_gate(y, own.u, readout), new, None, own

    def _carry(self, own, readout, sources, seq, channel, state, P, carried):
        streams = (own, *sources)
        ones = jnp.ones((*own.u.shape[:2], 1, 1), self.dtype)
        channel = ones if channel is None else channel
        state = ones if state is None else state
        y, new, carried = carry_scan(
            jnp.stack([s.u for s in streams], axis=2),
            jnp.stack([s.step() for s in streams], axis=2),
            jnp.stack([s.A for s in streams]),
            jnp.stack([s.B for s in streams], axis=2),
            readout.C,
            channel,
            state,
            P,
            jnp.stack([s.state for s in streams], axis=1),
            self.init_state(own.u.shape[0]) if carried is None else carried,
            **seq.documents(),
        )
        return skip_and_gate(y, own.u, readout), new, carried, own
