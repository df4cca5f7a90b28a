"""RetNet (Sun et al. 2023, arXiv 2307.08621): attention without a softmax, with a fixed decay for each head.

    S_t = gamma S_{t-1} + k_t v_t^T,  o_t = q_t S_t,  y = (norm_head(o) * gate) W_o,  q and k rotated by position

The parallel, recurrent and chunkwise forms are one function, `kernels.linear_attention`. With `activation="silu"`, with
weights in the norm, and without an MLP after it, this is the block of DenseRetNet (He et al. 2024, arXiv 2403.00818,
the authors' code).
"""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from seqmodels.branch import NO_LINKS, Links, State, real
from seqmodels.fields.retnet import RETNET
from seqmodels.layers.norm import rms_norm
from seqmodels.layers.parameter import Init, normal, ones, parameter, uniform
from seqmodels.mixers.linked import Linked
from seqmodels.mixers.matrix import Stream, gate_and_norm, read_states, state_flops
from seqmodels.sequence import Sequence

ACTIVATIONS = {"identity": lambda x: x, "silu": jax.nn.silu}
ROTATION_BASE = 10_000.0


def octaves(heads: int) -> np.ndarray:
    """1 - gamma of each head: 2^-5, 2^-6, ... (equation 8; torchscale, DenseRetNet)."""
    return 2.0 ** (-5 - np.arange(heads))


def spread(heads: int) -> np.ndarray:
    """1 - gamma of each head: geometric from 1/32 to 1/512 for any number of heads (section 3.1, the experiments)."""
    return np.exp(np.linspace(np.log(1 / 32), np.log(1 / 512), heads))


SCHEDULES = {"octaves": octaves, "spread": spread}


def log_decay(heads: int, schedule: str) -> jax.Array:
    """log gamma, [H] float32."""
    return jnp.asarray(np.log1p(-SCHEDULES[schedule](heads)), jnp.float32)


def rotation(positions: jax.Array, keys: int, angles: str = "retnet") -> jax.Array:
    """Angles [B, T, K / 2] float32 of keys at positions [B, T].

    The slowest rotates by exactly 1 / base per token; with `angles="rope"` faster, base^(2 / K - 1).
    """
    frequency = ROTATION_BASE ** -np.linspace(0, 1, keys // 2, endpoint=angles == "retnet")
    return positions[..., None].astype(jnp.float32) * frequency.astype(np.float32)


def row_scale(log_decay: jax.Array, positions: jax.Array) -> jax.Array:
    """sqrt(sum_{s <= t} gamma^{t - s}) = sqrt((1 - gamma^{t + 1}) / (1 - gamma)), [B, T, H] at positions t [B, T]."""
    sums = jnp.expm1((positions[..., None] + 1).astype(jnp.float32) * log_decay) / jnp.expm1(log_decay)
    return jnp.sqrt(sums)


@struct.dataclass
class Readout:
    """The read side of a layer.

    Attributes:
        q: [B, T, H, K] before rotation.
        gate: [B, T, H, V], activated.
        divisor: [B, T, H] float32 `row_scale`, or None.
        scale: [V] float32 of the heads' norm, or None; eps: its epsilon.
    """

    q: jax.Array
    gate: jax.Array
    divisor: jax.Array | None
    scale: jax.Array | None
    eps: float = struct.field(pytree_node=False)

    def gate_and_norm(self, y: jax.Array) -> jax.Array:
        """norm(y / divisor) * gate, the norm over a head's channels: [B, T, H, V] to [B, T, H, V]."""
        y = y.astype(jnp.float32)
        if self.divisor is not None:
            y = y / self.divisor[..., None]
        return rms_norm(y, self.scale, self.eps).astype(self.gate.dtype) * self.gate


def xavier(rows: int, columns: int, gain: float) -> Init:
    """Uniform with the variance gain^2 2 / (rows + columns) (Glorot and Bengio 2010)."""
    return uniform(gain * (6 / (rows + columns)) ** 0.5)


class RetNet(Linked):
    """Retention mixer. Its options are declared in seqmodels/fields/retnet.py."""

    heads: int = RETNET["heads"]
    key_dim: int = RETNET["key_dim"]
    value_dim: int = RETNET["value_dim"]
    schedule: str = RETNET["schedule"]
    angles: str = RETNET["angles"]
    activation: str = RETNET["activation"]
    row_scale: bool = RETNET["row_scale"]
    norm_eps: float = RETNET["norm_eps"]
    norm_weight: bool = RETNET["norm_weight"]
    init_std: float = RETNET["init_std"]

    options = RETNET
    operations = ("linear_attention",)
    ways: ClassVar[tuple[str, ...]] = ("q", "k")
    valued = True
    link = "matrix"
    follows_time = "rate"  # rotations would need the time of each token, and the state does not carry it

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """[H, K, V] of a row's matrix state."""
        head = self.width // self.heads
        return self.heads, self.key_dim or head, self.value_dim or 2 * head

    @property
    def stream_sizes(self) -> tuple[int, int]:
        """Channels of values and of keys, over all heads: the widths of DenseSSM's gates."""
        heads, keys, values = self.state_shape
        return heads * values, heads * keys

    def setup(self) -> None:
        heads, keys, values = self.state_shape

        def xavier_or_normal(rows, columns, gain):
            return normal(self.init_std) if self.init_std else xavier(rows, columns, gain)

        def inward(name, size):
            shape, axes = (self.width, heads, size), ("embed", "heads", "head_dim")
            return self.matrix(name, shape, axes, xavier_or_normal(self.width, heads * size, 2**-2.5))

        self.q_proj, self.k_proj = inward("q_proj", keys), inward("k_proj", keys)
        self.v_proj, self.gate_proj = inward("v_proj", values), inward("gate_proj", values)
        shape, axes = (heads, values, self.width), ("heads", "head_dim", "embed")
        self.out_proj = self.matrix("out_proj", shape, axes, xavier_or_normal(heads * values, self.width, 2**-1))
        if self.norm_weight:
            self.scale = parameter(self, "scale", (values,), ("head_dim",), ones)

    @nn.nowrap
    def init_state(self, batch: int, max_length: int | None = None) -> jax.Array:
        """[B, H, K, V] float32."""
        return jnp.zeros((batch, *self.state_shape), jnp.float32)

    def stream_and_readout(
        self, x: jax.Array, seq: Sequence, state: State = None, links: Links = NO_LINKS
    ) -> tuple[Stream, Readout]:
        """Keys, values, queries and gates."""
        if state is None:
            state = self.init_state(x.shape[0])
        x = real(x, seq, self.dtype)
        heads, keys, _ = self.state_shape
        activate = ACTIVATIONS[self.activation]

        def project(x, weight, activation, name):
            return activation(checkpoint_name(jnp.einsum("btd,dhk->bthk", x, weight), name))

        asked, keyed = (links.of(way, x, seq, self.dtype) for way in self.ways)
        q = project(asked, self.q_proj, activate, "projected")
        k = project(keyed, self.k_proj, activate, "stream") * keys**-0.5
        v = links.value(project(x, self.v_proj, activate, "stream"))
        gate = project(x, self.gate_proj, jax.nn.silu, "projected")
        decay, times = seq.rescale * log_decay(heads, self.schedule), seq.rescale * seq.positions
        divisor = row_scale(decay, seq.positions) if self.row_scale else None
        stream = Stream(k=k, v=v, log_decay=decay, state=state, angle=rotation(times, keys, self.angles))
        return stream, Readout(q, gate, divisor, self.scale if self.norm_weight else None, self.norm_eps)

    def scan(self, stream: Stream, readout: Readout, seq: Sequence) -> tuple[jax.Array, jax.Array]:
        """The recurrence with norm and gate: y [B, T, H, V] and the final state [B, H, K, V]."""
        y, state = read_states([stream], [readout.q], seq, self.implementation.get("linear_attention"))
        return gate_and_norm(readout, y[:, :, 0]), state[:, 0]

    @nn.nowrap
    def flops(self, length: int) -> float:
        """Operations of the matrix state."""
        return state_flops(self.state_shape, decays=True)

    def project(self, y: jax.Array) -> jax.Array:
        """[B, T, H, V] to [B, T, D]."""
        return jnp.einsum("bthv,hvd->btd", y.astype(self.dtype), self.out_proj)

    @nn.nowrap
    def new_state(self, readout: Readout, state: jax.Array) -> jax.Array:
        """The mixer's state after the tokens."""
        return state
