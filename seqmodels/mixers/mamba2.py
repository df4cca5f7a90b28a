"""Mamba-2 (Dao & Gu 2024, arXiv 2405.21060): a matrix state for each head, with one decay per token and head."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from seqmodels.branch import NO_LINKS, Links, State, real
from seqmodels.fields.mamba2 import MAMBA2
from seqmodels.layers.matmul import separate_matmuls, wide_matmul
from seqmodels.layers.norm import gated_norm
from seqmodels.layers.parameter import ones, parameter, uniform
from seqmodels.mixers.linked import Linked
from seqmodels.mixers.mamba import init_dt_bias
from seqmodels.mixers.matrix import Stream, gate_and_norm, read_states, state_flops
from seqmodels.parallel import short_conv
from seqmodels.sequence import Sequence


@struct.dataclass
class Readout:
    """The read side of a layer.

    Attributes:
        q: [B, T, G, N], the paper's C.
        x: [B, T, H, P], and D [H] float32: the skip connection.
        z: [B, T, E] gate. scale: [E] float32, of the norm after the gate, with `groups` groups and epsilon `eps`.
        conv: the convolutions' new states.
    """

    q: jax.Array
    x: jax.Array
    D: jax.Array
    z: jax.Array
    scale: jax.Array
    conv: dict[str, jax.Array]
    groups: int = struct.field(pytree_node=False)
    eps: float = struct.field(pytree_node=False)

    def gate_and_norm(self, y: jax.Array) -> jax.Array:
        """norm((y + D x) silu(z)), the norm over the channels of a group: y [B, T, H, P] to [B, T, E]."""
        y = checkpoint_name((y + self.D[:, None] * self.x).astype(self.x.dtype), "readout")
        return gated_norm(y.reshape(self.z.shape), self.z, self.scale, self.groups, self.eps)


def init_A_log(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
    """log of A, one per head, with A uniform in [1, 16], as in the authors' code."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1, 16))


class Mamba2(Linked):
    """Mamba-2 mixer. Its options are declared in seqmodels/fields/mamba2.py."""

    state: int = MAMBA2["state"]
    expand: int = MAMBA2["expand"]
    head_dim: int = MAMBA2["head_dim"]
    groups: int = MAMBA2["groups"]
    conv: int = MAMBA2["conv"]
    norm_eps: float = MAMBA2["norm_eps"]
    dt_min: float = MAMBA2["dt_min"]
    dt_max: float = MAMBA2["dt_max"]
    dt_floor: float = MAMBA2["dt_floor"]
    dt_scale: float = MAMBA2["dt_scale"]

    options = MAMBA2
    operations = ("linear_attention", "short_conv")
    ways: ClassVar[tuple[str, ...]] = ("bc", "dt")
    valued = True
    link = "matrix"
    follows_time = "token"

    @property
    def inner(self) -> int:
        """E, channels of the hidden stream."""
        return self.expand * self.width

    @property
    def heads(self) -> int:
        """H, heads of P channels."""
        return self.inner // self.head_dim

    @property
    def stream_sizes(self) -> tuple[int, int]:
        """Channels of values and of keys, over all heads: the widths of DenseSSM's gates."""
        return self.inner, self.groups * self.state

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """[H, N, P] of a row's matrix state."""
        return self.heads, self.state, self.head_dim

    def setup(self) -> None:
        width, inner, heads, keys = self.width, self.inner, self.heads, self.groups * self.state

        project, tap = uniform(width**-0.5), uniform(self.conv**-0.5)
        dt_bias = init_dt_bias(self.dt_min, self.dt_max, self.dt_floor)
        out = uniform((inner * self.layers) ** -0.5)
        self.in_proj = self.matrix("in_proj", (width, 2, inner), ("embed", None, "inner"), project)
        self.BC_proj = self.matrix("BC_proj", (width, 2 * keys), ("embed", "state"), project)
        self.dt_proj = self.matrix("dt_proj", (width, heads), ("embed", "heads"), project)
        self.conv_weight = parameter(self, "conv_weight", (self.conv, inner), ("conv", "inner"), tap)
        self.conv_bias = parameter(self, "conv_bias", (inner,), ("inner",), tap)
        self.BC_conv_weight = parameter(self, "BC_conv_weight", (self.conv, 2 * keys), ("conv", "state"), tap)
        self.BC_conv_bias = parameter(self, "BC_conv_bias", (2 * keys,), ("state",), tap)
        self.dt_bias = parameter(self, "dt_bias", (heads,), ("heads",), dt_bias, group="ssm")
        self.A_log = parameter(self, "A_log", (heads,), ("heads",), init_A_log, group="ssm")
        self.D = parameter(self, "D", (heads,), ("heads",), ones, group="ssm")
        self.scale = parameter(self, "scale", (inner,), ("inner",), ones)
        self.out_proj = self.matrix("out_proj", (inner, width), ("inner", "embed"), out)

    @nn.nowrap
    def init_state(self, batch: int, max_length: int | None = None) -> dict[str, jax.Array]:
        """conv [B, W - 1, E] of x, BC_conv [B, W - 1, 2 G N] of B and C, ssm [B, H, N, P]; all float32."""
        past = self.conv - 1
        return dict(
            conv=jnp.zeros((batch, past, self.inner), jnp.float32),
            BC_conv=jnp.zeros((batch, past, 2 * self.groups * self.state), jnp.float32),
            ssm=jnp.zeros((batch, *self.state_shape), jnp.float32),
        )

    def stream_and_readout(
        self, x: jax.Array, seq: Sequence, state: State = None, links: Links = NO_LINKS
    ) -> tuple[Stream, Readout]:
        """Everything before the recurrence: projections, convolutions, the token's step, keys and queries."""
        if state is None:
            state = self.init_state(x.shape[0])
        x = real(x, seq, self.dtype)
        keyed, stepped = (links.of(way, x, seq, self.dtype) for way in self.ways)
        if x.shape[1] == 1 and not links.inputs:  # for one token, copying the weights' halves would cost the most
            z, inputs = jnp.moveaxis(jnp.einsum("btd,dce->btce", x, self.in_proj), 2, 0)
            apart = jax.lax.optimization_barrier(jax.lax.optimization_barrier(x))
            BC = apart @ self.BC_proj
        else:
            weights = self.in_proj[:, 0], self.in_proj[:, 1], self.BC_proj
            z, inputs, BC = separate_matmuls((stepped, x, keyed), weights)
        z, inputs, BC = (checkpoint_name(v, "projected") for v in (z, inputs, BC))

        def conv(inputs, weight, bias, past):
            implementation = self.implementation.get("short_conv")
            options = dict(activation="silu", initial_state=past, implementation=implementation)
            return short_conv(inputs, weight, bias, **options, **seq.documents())

        u, past = conv(inputs, self.conv_weight, self.conv_bias, state["conv"])
        BC, BC_past = conv(BC, self.BC_conv_weight, self.BC_conv_bias, state["BC_conv"])
        u, BC = (checkpoint_name(v, "stream") for v in (u, BC))
        batch, length = x.shape[:2]
        B, C = jnp.split(BC.reshape(batch, length, 2 * self.groups, self.state), 2, axis=2)
        u = links.value(u.reshape(batch, length, self.heads, self.head_dim))
        # The step and the decay are always float32, because the state depends on their sums over time.
        step = seq.stretch(self.dt_scale) * jax.nn.softplus(wide_matmul(stepped, self.dt_proj) + self.dt_bias)
        stream = Stream(k=B, v=u, log_decay=-jnp.exp(self.A_log) * step, state=state["ssm"], step=step)
        conv_state = dict(conv=past, BC_conv=BC_past)
        return stream, Readout(C, u, self.D, z, self.scale, conv_state, self.groups, self.norm_eps)

    def scan(self, stream: Stream, readout: Readout, seq: Sequence) -> tuple[jax.Array, jax.Array]:
        """The recurrence with skip, gate and norm: y [B, T, E] and the final state [B, H, N, P]."""
        y, ssm = read_states([stream], [readout.q], seq, self.implementation.get("linear_attention"))
        return gate_and_norm(readout, y[:, :, 0]), ssm[:, 0]

    @nn.nowrap
    def flops(self, length: int) -> float:
        """Operations of the matrix state."""
        return state_flops(self.state_shape, decays=True)

    def project(self, y: jax.Array) -> jax.Array:
        """[B, T, E] to [B, T, D]."""
        return y.astype(self.dtype) @ self.out_proj

    @nn.nowrap
    def new_state(self, readout: Readout, ssm: jax.Array) -> dict[str, jax.Array]:
        """The mixer's state after the tokens."""
        return dict(readout.conv, ssm=ssm)
