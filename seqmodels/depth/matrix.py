"""DenseSSM for mixers with a matrix state (RetNet, Mamba-2). seqmodels/depth/vector.py is the same for Mamba.

Layer l writes keys k and values v into S_t = a_t S_{t-1} + k_t v_t^T and reads y = q S. "past" are the m layers below:

    read    y^l = q^l S^l + g_V sum_past (g_K q^l) S^i: this layer's query also reads the lower states
    input   k' = norm(k + g_K sum_past k^i), v' = norm(v + g_V sum_past v^i): this layer writes a mixture (DenseRetNet)
    output  y^l = q^l S^l + g_V sum_past q^i S^i: a control, adds the lower layers' own readouts
    rank    S_t = a S_{t-1} + k v^T + sum_past (g_K k^i) (g_V v^i)^T: lower writes, with this layer's decay

g_K and g_V depend on the token. They have one number for each channel of the keys and values of all heads. READ and
RANK run as one linear attention over the heads of all layers. "input" with both gates and norms is the DenseRetNet of
the authors' code.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.depth.fusion import Fusion
from seqmodels.depth.gates import gated
from seqmodels.mixers.matrix import Stream, gate_and_norm, read_states, state_flops
from seqmodels.sequence import Sequence


def flat(x: jax.Array) -> jax.Array:
    """[B, T, H, K] to [B, T, H K]."""
    return x.reshape(*x.shape[:2], -1)


class MatrixFusion(Fusion):
    """See `Fusion`. inner is H V, the channels of all values, and state Hk K, of all keys.

    Attributes:
        shape: [H, K, V] of the state.
    """

    shape: tuple[int, int, int]

    allowed: ClassVar[Mapping[str, tuple[str, ...]]] = dict(
        variant=("read", "input", "output", "rank"), projection=("identity",)
    )

    @nn.nowrap
    def flops(self) -> float:
        """Operations per token of the forward pass in the lower states: READ recomputes them, RANK writes to them."""
        each = {"read": state_flops(self.shape, decays=True), "rank": 2 * math.prod(self.shape)}
        return self.sources * each.get(self.options.variant, 0)

    def __call__(
        self,
        x: jax.Array,
        own: Stream,
        readout: Any,
        sources: tuple[Stream, ...],
        seq: Sequence,
        carried: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, None, Stream]:
        """As `Fusion`, without further state."""
        values, keys = self.gates(x, seq) if sources else (None, None)
        y, state, stream = getattr(self, f"_{self.options.variant}")(own, readout.q, sources, seq, values, keys)
        return gate_and_norm(readout, y), state, None, stream

    def _states(self, streams, queries, seq):
        return read_states(streams, queries, seq, self.implementation.get("linear_attention"))

    def _add(self, y, lower: list[jax.Array], gate):
        """y + g_V sum lower, each [B, T, H, V]. The lower ones are normed first if the config says so."""
        lower = [flat(v) for v in lower]
        lower = [self.gates.norm_channel(v) for v in lower] if self.options.norm else lower
        return y + gated(gate, lower).reshape(y.shape).astype(y.dtype)

    def _read(self, own, q, sources, seq, values, keys):
        count = len(sources)
        query = flat(q)[:, :, None] if keys is None else keys * flat(q)[:, :, None]
        query = jnp.broadcast_to(query, (*q.shape[:2], count, query.shape[-1]))
        queries = [query[:, :, i].reshape(q.shape) for i in range(count)]
        y, state = self._states([own, *sources], [q, *queries], seq)
        return self._add(y[:, :, 0], [y[:, :, 1 + i] for i in range(count)], values), state[:, 0], own

    def _input(self, own, q, sources, seq, values, keys):
        k, v = flat(own.k), flat(own.v)
        if self.options.gate != "channel":
            k = k + gated(keys, [flat(s.k) for s in sources])
            k = self.gates.norm_state(k) if self.options.norm else k
        if self.options.gate != "state":
            v = v + gated(values, [flat(s.v) for s in sources])
            v = self.gates.norm_channel(v) if self.options.norm else v
        fused = own.replace(k=k.reshape(own.k.shape), v=v.reshape(own.v.shape))
        y, state = self._states([fused], [q], seq)
        return y[:, :, 0], state[:, 0], own

    def _output(self, own, q, sources, seq, values, keys):
        y, state = self._states([own], [q], seq)
        y = y[:, :, 0]
        fused = self._add(y, [s.y for s in sources], values) if sources else y  # the bottom only passes its readout up
        return fused, state[:, 0], own.replace(y=y)

    def _rank(self, own, q, sources, seq, values, keys):
        def gate(gates, x, index):
            if gates is None:
                return x
            return (gates[:, :, min(index, gates.shape[2] - 1)] * flat(x)).reshape(x.shape)

        writes = [
            Stream(
                k=gate(keys, s.k, i),
                v=gate(values, s.written(), i),
                log_decay=own.log_decay,
                state=jnp.zeros_like(own.state),
                angle=s.angle,
            )
            for i, s in enumerate(sources)
        ]
        y, state = self._states([own, *writes], [q] * (1 + len(sources)), seq)
        return jnp.sum(y, axis=2), jnp.sum(state, axis=1), own  # linear: the states add up
