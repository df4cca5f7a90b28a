"""Mamba (Gu & Dao 2023, arXiv 2312.00752): a state space model whose step, input and output depend on the token."""

import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.core import FrozenDict
from jax.ad_checkpoint import checkpoint_name

from seqmodels.errors import UserError
from seqmodels.layers.norm import rms_norm
from seqmodels.parallel import selective_scan, short_conv
from seqmodels.sequence import Sequence

NORMS = ("none", "rms", "learned")


@struct.dataclass
class Stream:
    """What a layer writes into its hidden state: enough for another layer to compute that state again.

    s_t = exp(dt_t A) s_{t-1} + (dt_t u_t) B_t with dt = softplus(delta dt_proj + dt_bias), from `state` on.

    Attributes:
        u: [B, T, E].
        delta: [B, T, R] low-rank step; with dt_proj [R, E] a fraction of dt's bytes.
        dt_proj: [R, E]; dt_bias: [E] float32; A: [E, N] float32.
        B: [B, T, N].
        state: [B, E, N] float32, before the first token.
        y: [B, T, E] the layer's own readout s_t C_t, where DenseSSM's OUTPUT asks for it.
    """

    u: jax.Array
    delta: jax.Array
    dt_proj: jax.Array
    dt_bias: jax.Array
    A: jax.Array
    B: jax.Array
    state: jax.Array
    y: jax.Array | None = None

    @property
    def dt(self) -> jax.Array:
        """[B, T, E] step before bias and softplus."""
        return self.delta @ self.dt_proj

    def step(self) -> jax.Array:
        """[B, T, E] float32 step dt."""
        return jax.nn.softplus(self.dt.astype(jnp.float32) + self.dt_bias)


@struct.dataclass
class Readout:
    """The read side of a layer: C [B, T, N], D [E], z [B, T, E], and the convolution's new state [B, W - 1, E]."""

    C: jax.Array
    D: jax.Array
    z: jax.Array
    conv: jax.Array


def uniform(bound: float):
    """Uniform on [-bound, bound], as torch.nn.Linear and Conv1d are with bound = fan_in^-1/2."""
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def init_A_log(key, shape, dtype=jnp.float32):
    """log(1..N) in every channel (S4D-real): [E, N]."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=dtype)), shape)


def init_dt_bias(smallest: float, largest: float, floor: float):
    """softplus^-1 of a step that is log-uniform in [smallest, largest], and floor at least."""

    def init(key, shape, dtype=jnp.float32):
        log_step = jax.random.uniform(key, shape, dtype, math.log(smallest), math.log(largest))
        step = jnp.maximum(jnp.exp(log_step), floor)
        return step + jnp.log(-jnp.expm1(-step))

    return init


class Mamba(nn.Module):
    """Mamba mixer.

    Attributes:
        width: D. expand: E / D. state: N. conv: W. dt_rank: R; 0 takes ceil(D / 16).
        norms: RMSNorm of delta, B and C: "none", "rms" (without weights, FalconMamba) or "learned" (Jamba).
        dt_min, dt_max, dt_floor: range of the first steps.
        layers: depth of the model; the output projection starts smaller by its square root.
    """

    width: int
    state: int = 16
    expand: int = 2
    conv: int = 4
    dt_rank: int = 0
    norms: str = "none"
    norm_eps: float = 1e-5
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dt_floor: float = 1e-4
    dtype: jnp.dtype = jnp.float32
    implementation: Mapping[str, str] = FrozenDict()
    layers: int = 1

    operations = ("selective_scan", "short_conv")

    def __post_init__(self):
        super().__post_init__()
        if self.norms not in NORMS:
            raise UserError(f"mamba.norms is {self.norms!r}; allowed: {', '.join(NORMS)}")
        if not 2 <= self.conv <= 8:
            raise UserError(f"mamba.conv is {self.conv}; it must be from 2 to 8")
        for field in ("state", "expand"):
            if getattr(self, field) < 1:
                raise UserError(f"mamba.{field} is {getattr(self, field)}; it must be positive")

    @property
    def inner(self) -> int:
        """E, channels of the hidden stream."""
        return self.expand * self.width

    @property
    def stream_sizes(self) -> tuple[int, int]:
        """Channels of what is written, and of its key: what DenseSSM's gates are as wide as."""
        return self.inner, self.state

    @property
    def rank(self) -> int:
        """R, rank of the step."""
        return self.dt_rank or -(-self.width // 16)

    def setup(self):
        width, inner, rank, state = self.width, self.inner, self.rank, self.state

        def parameter(name, init, shape, *axes):
            return self.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)

        self.in_proj = parameter("in_proj", uniform(width**-0.5), (width, 2, inner), "embed", None, "inner")
        self.conv_weight = parameter("conv_weight", uniform(self.conv**-0.5), (self.conv, inner), "conv", "inner")
        self.conv_bias = parameter("conv_bias", uniform(self.conv**-0.5), (inner,), "inner")
        self.x_proj = parameter("x_proj", uniform(inner**-0.5), (inner, rank + 2 * state), "inner", None)
        self.dt_proj = parameter("dt_proj", uniform(rank**-0.5), (rank, inner), "rank", "inner")
        self.dt_bias = parameter("dt_bias", init_dt_bias(self.dt_min, self.dt_max, self.dt_floor), (inner,), "inner")
        self.A_log = parameter("A_log", init_A_log, (inner, state), "inner", "state")
        self.D = parameter("D", nn.initializers.ones, (inner,), "inner")
        out = uniform((inner * self.layers) ** -0.5)
        self.out_proj = parameter("out_proj", out, (inner, width), "inner", "embed")
        if self.norms == "learned":
            ones = nn.initializers.ones
            self.norm_scales = (
                parameter("delta_norm", ones, (rank,), "rank"),
                parameter("B_norm", ones, (state,), "state"),
                parameter("C_norm", ones, (state,), "state"),
            )

    @nn.nowrap
    def init_state(self, batch: int, max_length: int = 0) -> dict[str, jax.Array]:
        """conv [B, W - 1, E] and ssm [B, E, N], float32; their size does not depend on max_length."""
        return dict(
            conv=jnp.zeros((batch, self.conv - 1, self.inner), jnp.float32),
            ssm=jnp.zeros((batch, self.inner, self.state), jnp.float32),
        )

    def __call__(self, x: jax.Array, seq: Sequence, state=None):
        """x [B, T, D] to y [B, T, D] and the new state."""
        stream, readout = self.write(x, seq, state)
        y, ssm = self.scan(stream, readout, seq)
        return self.project(y), self.new_state(readout, ssm)

    def write(self, x: jax.Array, seq: Sequence, state=None) -> tuple[Stream, Readout]:
        """Everything before the scan: projection, convolution, and the token's step, input and output matrices."""
        if state is None:
            state = self.init_state(x.shape[0])
        x = x.astype(self.dtype)
        if seq.mask is not None:  # padding may hold anything
            x = jnp.where(seq.mask[..., None], x, 0)
        in_proj = self.in_proj.astype(self.dtype)
        if x.shape[1] == 1:  # here copies of the weights' halves would cost the most
            a, z = jnp.moveaxis(jnp.einsum("btd,dce->btce", x, in_proj), 2, 0)
        else:  # Two products: one for both would be cut in two by a copy. The barrier keeps XLA from making them one.
            a, z = x @ in_proj[:, 0], jax.lax.optimization_barrier(x) @ in_proj[:, 1]
        a, z = (checkpoint_name(v, "projected") for v in (a, z))
        u, conv = short_conv(
            a,
            self.conv_weight,
            self.conv_bias,
            activation="silu",
            initial_state=state["conv"],
            implementation=self.implementation.get("short_conv"),
            **seq.documents(),
        )
        delta, B, C = jnp.split(u @ self.x_proj.astype(self.dtype), [self.rank, self.rank + self.state], axis=-1)
        if self.norms != "none":
            scales = self.norm_scales if self.norms == "learned" else (None, None, None)
            delta, B, C = (rms_norm(v, s, self.norm_eps) for v, s in zip((delta, B, C), scales, strict=True))
        u, delta, B = (checkpoint_name(v, "stream") for v in (u, delta, B))  # for model.remat
        C = checkpoint_name(C, "projected")
        A = -jnp.exp(self.A_log)
        stream = Stream(u, delta, self.dt_proj.astype(self.dtype), self.dt_bias, A, B, state["ssm"])
        return stream, Readout(C, self.D, z, conv)

    def scan(self, stream: Stream, readout: Readout, seq: Sequence):
        """y [B, T, E], skip and gate included, and the new ssm state: the layer without dense links."""

        def scan(stream, readout, documents):
            return selective_scan(
                stream.u,
                stream.dt,
                stream.A,
                stream.B,
                readout.C,
                D=readout.D,
                z=readout.z,
                dt_bias=stream.dt_bias,
                initial_state=stream.state,
                implementation=self.implementation.get("selective_scan"),
                **documents,
            )

        # dt is as wide as u, and one thin product away: made again in the backward pass, not kept for it.
        keep = jax.checkpoint_policies.save_only_these_names("scan")
        return jax.checkpoint(scan, policy=keep)(stream, readout, seq.documents())

    def project(self, y: jax.Array) -> jax.Array:
        """[B, T, E] to [B, T, D]."""
        return y.astype(self.dtype) @ self.out_proj.astype(self.dtype)

    @nn.nowrap
    def new_state(self, readout: Readout, ssm: jax.Array) -> dict[str, jax.Array]:
        """The mixer's state after the tokens."""
        return dict(conv=readout.conv, ssm=ssm)


def skip_and_gate(y: jax.Array, u: jax.Array, readout: Readout) -> jax.Array:
    """(y + D u) silu(z), [B, T, E] in u's dtype: what the scan does when it writes y itself."""
    y = (y + readout.D * u) * jax.nn.silu(readout.z.astype(jnp.float32))
    return y.astype(u.dtype)


def stack(streams: list[Stream]) -> dict[str, jax.Array]:
    """The streams as groups of one selective scan: u, dt [B, T, G, E], A [G, E, N], B [B, T, G, N], ..."""
    return dict(
        u=jnp.stack([s.u for s in streams], axis=2),
        dt=jnp.stack([s.dt for s in streams], axis=2),
        A=jnp.stack([s.A for s in streams]),
        B=jnp.stack([s.B for s in streams], axis=2),
        dt_bias=jnp.stack([s.dt_bias for s in streams]),
        initial_state=jnp.stack([s.state for s in streams], axis=1),
    )
