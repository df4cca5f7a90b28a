"""Mamba-2 (Dao & Gu 2024, arXiv 2405.21060): a matrix state for each head, whose decay is a number for each token."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.core import FrozenDict
from jax.ad_checkpoint import checkpoint_name

from seqmodels.errors import UserError
from seqmodels.layers.matmul import wide_matmul
from seqmodels.layers.norm import gated_norm
from seqmodels.mixers.mamba import init_dt_bias, uniform
from seqmodels.mixers.matrix import Stream, finish, read
from seqmodels.parallel import short_conv
from seqmodels.sequence import Sequence


@struct.dataclass
class Readout:
    """The read side of a layer.

    Attributes:
        q: [B, T, G, N], the paper's C.
        x: [B, T, H, P] and D [H] float32, of the skip.
        z: [B, T, E] gate; scale [E] float32, of the norm behind it, in `groups` groups with epsilon `eps`.
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

    def finish(self, y: jax.Array) -> jax.Array:
        """norm((y + D x) silu(z)), the norm over the channels of a group: y [B, T, H, P] to [B, T, E]."""
        y = checkpoint_name((y + self.D[:, None] * self.x).astype(self.x.dtype), "readout")
        return gated_norm(y.reshape(self.z.shape), self.z, self.scale, self.groups, self.eps)


def init_A_log(key, shape, dtype=jnp.float32):
    """log of A uniform in [1, 16], one a head, as in the authors' code."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1, 16))


class Mamba2(nn.Module):
    """Mamba-2 mixer.

    Attributes:
        width: D. expand: E / D. head_dim: P = E / H. state: N. groups: G, sets of B and C that the heads share.
        conv: W. dt_min, dt_max, dt_floor: range of the first steps.
        layers: depth of the model; the output projection starts smaller by its square root.
    """

    width: int
    state: int = 16
    expand: int = 2
    head_dim: int = 8
    groups: int = 1
    conv: int = 4
    norm_eps: float = 1e-5
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dt_floor: float = 1e-4
    dtype: jnp.dtype = jnp.float32
    implementation: Mapping[str, str] = FrozenDict()
    layers: int = 1

    operations = ("linear_attention", "short_conv")
    decays = True

    def __post_init__(self):
        super().__post_init__()
        for field in ("state", "expand", "head_dim", "groups"):
            if getattr(self, field) < 1:
                raise UserError(f"mamba2.{field} is {getattr(self, field)}; it must be positive")
        if not 2 <= self.conv <= 8:
            raise UserError(f"mamba2.conv is {self.conv}; it must be from 2 to 8")
        if self.inner % self.head_dim:
            raise UserError(f"mamba2.head_dim is {self.head_dim}; it must divide expand times width, {self.inner}")
        if self.heads % self.groups:
            raise UserError(
                f"mamba2.groups is {self.groups}; it must divide the heads, of which there are {self.heads}"
            )

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
        """Channels of values and of keys, over all heads: what DenseSSM's gates are as wide as."""
        return self.inner, self.groups * self.state

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """[H, N, P] of a row's matrix state."""
        return self.heads, self.state, self.head_dim

    def setup(self):
        width, inner, heads, keys = self.width, self.inner, self.heads, self.groups * self.state

        def parameter(name, init, shape, *axes):
            return self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)

        project, tap = uniform(width**-0.5), uniform(self.conv**-0.5)
        self.in_proj = parameter("in_proj", project, (width, 2, inner), "embed", None, "inner")
        self.BC_proj = parameter("BC_proj", project, (width, 2 * keys), "embed", "state")
        self.dt_proj = parameter("dt_proj", project, (width, heads), "embed", "heads")
        self.conv_weight = parameter("conv_weight", tap, (self.conv, inner), "conv", "inner")
        self.conv_bias = parameter("conv_bias", tap, (inner,), "inner")
        self.BC_conv_weight = parameter("BC_conv_weight", tap, (self.conv, 2 * keys), "conv", "state")
        self.BC_conv_bias = parameter("BC_conv_bias", tap, (2 * keys,), "state")
        self.dt_bias = parameter("dt_bias", init_dt_bias(self.dt_min, self.dt_max, self.dt_floor), (heads,), "heads")
        self.A_log = parameter("A_log", init_A_log, (heads,), "heads")
        self.D = parameter("D", nn.initializers.ones, (heads,), "heads")
        self.scale = parameter("scale", nn.initializers.ones, (inner,), "inner")
        out = uniform((inner * self.layers) ** -0.5)
        self.out_proj = parameter("out_proj", out, (inner, width), "inner", "embed")

    @nn.nowrap
    def init_state(self, batch: int, max_length: int = 0) -> dict[str, jax.Array]:
        """conv [B, W - 1, E] of x, BC_conv [B, W - 1, 2 G N] of B and C, ssm [B, H, N, P]; all float32."""
        past = self.conv - 1
        return dict(
            conv=jnp.zeros((batch, past, self.inner), jnp.float32),
            BC_conv=jnp.zeros((batch, past, 2 * self.groups * self.state), jnp.float32),
            ssm=jnp.zeros((batch, *self.state_shape), jnp.float32),
        )

    def __call__(self, x: jax.Array, seq: Sequence, state=None):
        """x [B, T, D] to y [B, T, D] and the new state."""
        stream, readout = self.write(x, seq, state)
        y, ssm = self.scan(stream, readout, seq)
        return self.project(y), self.new_state(readout, ssm)

    def write(self, x: jax.Array, seq: Sequence, state=None) -> tuple[Stream, Readout]:
        """Everything before the recurrence: projections, convolutions, the token's step, keys and queries."""
        if state is None:
            state = self.init_state(x.shape[0])
        x = x.astype(self.dtype)
        if seq.mask is not None:  # padding may hold anything
            x = jnp.where(seq.mask[..., None], x, 0)
        in_proj = self.in_proj.astype(self.dtype)
        if x.shape[1] == 1:  # here copies of the weights' halves would cost the most
            z, inputs = jnp.moveaxis(jnp.einsum("btd,dce->btce", x, in_proj), 2, 0)
        else:  # products of their own, as in Mamba: XLA would join them, and cut what they give apart by copies
            z, inputs = x @ in_proj[:, 0], jax.lax.optimization_barrier(x) @ in_proj[:, 1]
        apart = jax.lax.optimization_barrier(jax.lax.optimization_barrier(x))
        BC = apart @ self.BC_proj.astype(self.dtype)
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
        u = u.reshape(batch, length, self.heads, self.head_dim)
        # The step and the decay are float32 whatever the rest is: their sums over time are what the state depends on.
        step = jax.nn.softplus(wide_matmul(x, self.dt_proj.astype(self.dtype)) + self.dt_bias)
        stream = Stream(k=B, v=u, log_decay=-jnp.exp(self.A_log) * step, state=state["ssm"], step=step)
        conv_state = dict(conv=past, BC_conv=BC_past)
        return stream, Readout(C, u, self.D, z, self.scale, conv_state, self.groups, self.norm_eps)

    def scan(self, stream: Stream, readout: Readout, seq: Sequence) -> tuple[jax.Array, jax.Array]:
        """The recurrence with skip, gate and norm: y [B, T, E] and the final state [B, H, N, P]."""
        y, ssm = read([stream], [readout.q], seq, self.implementation.get("linear_attention"))
        return finish(readout, y[:, :, 0]), ssm[:, 0]

    def project(self, y: jax.Array) -> jax.Array:
        """[B, T, E] to [B, T, D]."""
        return y.astype(self.dtype) @ self.out_proj.astype(self.dtype)

    @nn.nowrap
    def new_state(self, readout: Readout, ssm: jax.Array) -> dict[str, jax.Array]:
        """The mixer's state after the tokens."""
        return dict(readout.conv, ssm=ssm)
