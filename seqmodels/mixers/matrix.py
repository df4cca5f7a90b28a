"""Shared parts of mixers with a matrix state: the stream that they write, and how queries read several at once."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from seqmodels.layers.rope import rotate_pairs
from seqmodels.parallel import linear_attention
from seqmodels.sequence import Sequence


@struct.dataclass
class Stream:
    """What a layer writes into its matrix state. From this another layer can recompute the state.

    S_t = exp(log_decay_t) S_{t-1} + k_t (step_t v_t)^T, from `state` on, with k_t rotated by `angle_t` first.

    Attributes:
        k: [B, T, Hk, K] keys before rotation; value head h uses key head h // (H / Hk).
        v: [B, T, H, V] values.
        log_decay: [H] or [B, T, H] float32; None: no decay.
        state: [B, H, K, V] float32, before the first token.
        step: [B, T, H] float32 factor of the values; None: one.
        angle: [B, T, K / 2] float32, rotates channels 2i and 2i + 1 of keys and queries. None: no rotation.
        y: [B, T, H, V] the layer's own readout S_t q_t, if DenseSSM's OUTPUT needs it.
    """

    k: jax.Array
    v: jax.Array
    log_decay: jax.Array | None
    state: jax.Array
    step: jax.Array | None = None
    angle: jax.Array | None = None
    y: jax.Array | None = None

    def turned(self, x: jax.Array) -> jax.Array:
        """Keys or queries [B, T, ..., K], rotated."""
        if self.angle is None:
            return x
        return rotate_pairs(x, self.angle.reshape(*x.shape[:2], *[1] * (x.ndim - 3), -1))

    def written(self) -> jax.Array:
        """[B, T, H, V] values as they are written, that is, times the step."""
        if self.step is None:
            return self.v
        return (self.v * self.step[..., None]).astype(self.v.dtype)


def state_flops(shape: tuple[int, ...], decays: bool) -> float:
    """Operations per token of a matrix state [H, K, V], as the recurrence needs them.

    Per element, k v with its sum takes two, q S summed over the keys takes two, and a decay takes one. The chunked
    matrix products that are run in fact take more operations, at the speed of matrix products.
    """
    return (2 + 2 + decays) * math.prod(shape)


def delta_flops(shape: tuple[int, ...], decays: bool) -> float:
    """Operations per token of a matrix state [H, K, V] under the delta rule.

    Beyond `state_flops`, b S summed over the keys takes two per element, and a times it with the difference takes two.
    """
    return state_flops(shape, decays) + (2 + 2) * math.prod(shape)


def read_states(
    streams: list[Stream], queries: list[jax.Array], seq: Sequence, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Read each stream's state by its query [B, T, Hk, K], in one linear attention over the heads of all streams.

    Returns:
        y [B, T, G, H, V], one readout per stream, and the streams' new states [B, G, H, K, V].
    """
    decays = [s.log_decay for s in streams if s.log_decay is not None]  # of all streams, or of none
    heads = streams[0].v.shape[2]
    y, state = linear_attention(
        jnp.concatenate([s.turned(q) for s, q in zip(streams, queries, strict=True)], axis=2),
        jnp.concatenate([s.turned(s.k) for s in streams], axis=2),
        jnp.concatenate([s.written() for s in streams], axis=2),
        jnp.concatenate(decays, axis=-1) if decays else None,
        initial_state=jnp.concatenate([s.state for s in streams], axis=1),
        implementation=implementation,
        **seq.documents(),
    )
    apart = (len(streams), heads)
    return y.reshape(*y.shape[:2], *apart, -1), state.reshape(state.shape[0], *apart, *state.shape[2:])


def gate_and_norm(readout: Any, y: jax.Array) -> jax.Array:
    """readout.gate_and_norm(y). The backward pass recomputes it, so that no float32 array is saved."""
    kept = jax.checkpoint_policies.save_only_these_names("readout", "statistics")
    return jax.checkpoint(type(readout).gate_and_norm, policy=kept)(readout, y)
