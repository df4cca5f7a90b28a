"""DenseSSM for mixers with a matrix state (RetNet, Mamba-2), as seqmodels/dense.py has it for Mamba.

Layer l writes keys k and values v into S_t = a_t S_{t-1} + k_t v_t^T and reads y = q S. "past" are the m layers below:

    read    y^l = q^l S^l + g_V sum_past (g_K q^l) S^i: the lower states, read by this layer's query
    input   k' = norm(k + g_K sum_past k^i), v' = norm(v + g_V sum_past v^i): what is written is mixed (DenseRetNet)
    output  y^l = q^l S^l + g_V sum_past q^i S^i: a control, the lower layers' own readouts
    rank    S_t = a S_{t-1} + k v^T + sum_past (g_K k^i) (g_V v^i)^T: kept with this layer's decay

g_K and g_V depend on the token and have a number for each channel of all heads' keys and values. READ and RANK are one
linear attention, with the heads of all layers side by side. "input" with both gates and norms is what the authors'
DenseRetNet does.
"""

import jax
import jax.numpy as jnp

from seqmodels.dense import DenseFusion, gated
from seqmodels.errors import UserError
from seqmodels.mixers.matrix import Stream, finish, read
from seqmodels.sequence import Sequence


def flat(x: jax.Array) -> jax.Array:
    """[B, T, H, K] to [B, T, H K]."""
    return x.reshape(*x.shape[:2], -1)


class MatrixFusion(DenseFusion):
    """Fuses a layer with the streams of the layers below it; `inner` is H V and `state` is Hk K. No "carry", no P."""

    def __post_init__(self):
        super().__post_init__()
        if self.variant == "carry":
            raise UserError("model.dense.variant is 'carry'; allowed with a matrix state: read, input, output, rank")
        if self.projection != "identity":
            raise UserError(f"model.dense.projection is {self.projection!r}; allowed with a matrix state: identity")

    def __call__(self, x, own: Stream, readout, sources: tuple[Stream, ...], seq: Sequence, carried=None):
        """As DenseFusion: y as the mixer's `project` takes it, the layer's own new state, None, the layer's stream."""
        if seq.mask is not None:
            x = jnp.where(seq.mask[..., None], x, 0)
        values, keys = self.gates(x) if sources else (None, None)
        y, state, stream = getattr(self, f"_{self.variant}")(own, readout.q, sources, seq, values, keys)
        return finish(readout, y), state, None, stream

    def _states(self, streams, queries, seq):
        return read(streams, queries, seq, self.implementation.get("linear_attention"))

    def _add(self, y, lower: list[jax.Array], gate):
        """y + g_V sum lower, each [B, T, H, V], normed first where the config says so."""
        lower = [flat(v) for v in lower]
        lower = [self.norm_channel(v) for v in lower] if self.norm else lower
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
        if self.gate != "channel":
            k = k + gated(keys, [flat(s.k) for s in sources])
            k = self.norm_state(k) if self.norm else k
        if self.gate != "state":
            v = v + gated(values, [flat(s.v) for s in sources])
            v = self.norm_channel(v) if self.norm else v
        fused = own.replace(k=k.reshape(own.k.shape), v=v.reshape(own.v.shape))
        y, state = self._states([fused], [q], seq)
        return y[:, :, 0], state[:, 0], own

    def _output(self, own, q, sources, seq, values, keys):
        y, state = self._states([own], [q], seq)
        y = y[:, :, 0]
        fused = self._add(y, [s.y for s in sources], values) if sources else y  # the bottom only hands its readout up
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
        return jnp.sum(y, axis=2), jnp.sum(state, axis=1), own  # one state, which is the sum: the recurrence is linear
