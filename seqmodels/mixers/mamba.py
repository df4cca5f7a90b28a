"""Mamba (Gu & Dao 2023, arXiv 2312.00752): a state space model whose step, input and output depend on the token."""

import dataclasses
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from seqmodels.branch import NO_LINKS, Links, State, real
from seqmodels.fields.mamba import MAMBA
from seqmodels.kernels.arrays import computed_once
from seqmodels.kernels.selective_scan import kept
from seqmodels.kernels.selective_scan.kept import Kept
from seqmodels.layers.matmul import matmul, separate_matmuls
from seqmodels.layers.norm import rms_norm
from seqmodels.layers.parameter import Init, ones, parameter, uniform
from seqmodels.mixers.linked import Linked
from seqmodels.parallel import selective_scan, short_conv
from seqmodels.sequence import Sequence

# Operations of the scan per token, channel and state: dt A, (dt x) B, a h + b, and h C summed over the state.
SCAN_FLOPS = 1 + 1 + 2 + 2


@struct.dataclass
class Stream:
    """What a layer writes into its hidden state. From this another layer can recompute the state.

    s_t = exp(dt_t A) s_{t-1} + (dt_t u_t) B_t with dt = softplus(delta dt_proj + dt_bias), from `state` on.

    Attributes:
        u: [B, T, E].
        delta: [B, T, R] low-rank step. Together with dt_proj [R, E] it takes a fraction of the bytes of dt.
        dt_proj: [R, E]; dt_bias: [E] float32; A: [E, N] float32.
        B: [B, T, N].
        state: [B, E, N] float32, before the first token.
        steps: [B, T, 1] float32 factor of dt; None: one.
        y: [B, T, E] the layer's own readout s_t C_t, if DenseSSM's OUTPUT needs it.
        kept: its states at all tokens, for the layer itself and those above it, where `Mamba.keep` was worth it.
    """

    u: jax.Array
    delta: jax.Array
    dt_proj: jax.Array
    dt_bias: jax.Array
    A: jax.Array
    B: jax.Array
    state: jax.Array
    steps: jax.Array | None = None
    y: jax.Array | None = None
    kept: Kept | None = None

    @property
    def dt(self) -> jax.Array:
        """[B, T, E] step before bias and softplus."""
        return matmul(self.delta, self.dt_proj)

    def step(self) -> jax.Array:
        """[B, T, E] float32 step dt."""
        dt = jax.nn.softplus(self.dt.astype(jnp.float32) + self.dt_bias)
        return dt if self.steps is None else self.steps * dt

    def scanned_step(self) -> dict[str, Any]:
        """The step as arguments of `selective_scan`, which takes the softplus itself where no factor is behind it."""
        if self.steps is None:
            return dict(dt=self.dt, dt_bias=self.dt_bias)
        return dict(dt=self.step().astype(self.u.dtype), dt_softplus=False)


@struct.dataclass
class Readout:
    """The read side of a layer: C [B, T, N], D [E], z [B, T, E], and the convolution's new state [B, W - 1, E]."""

    C: jax.Array
    D: jax.Array
    z: jax.Array
    conv: jax.Array


def init_A_log(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
    """log(1..N) in every channel (S4D-real): [E, N]."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=dtype)), shape)


def init_dt_bias(smallest: float, largest: float, floor: float) -> Init:
    """softplus^-1 of a step that is log-uniform in [smallest, largest], and at least `floor`."""

    def init(key, shape, dtype=jnp.float32):
        log_step = jax.random.uniform(key, shape, dtype, math.log(smallest), math.log(largest))
        step = jnp.maximum(jnp.exp(log_step), floor)
        return step + jnp.log(-jnp.expm1(-step))

    return init


class Mamba(Linked):
    """Mamba mixer. Its options are declared in seqmodels/fields/mamba.py."""

    state: int = MAMBA["state"]
    expand: int = MAMBA["expand"]
    conv: int = MAMBA["conv"]
    dt_rank: int = MAMBA["dt_rank"]
    norms: str = MAMBA["norms"]
    norm_eps: float = MAMBA["norm_eps"]
    dt_min: float = MAMBA["dt_min"]
    dt_max: float = MAMBA["dt_max"]
    dt_floor: float = MAMBA["dt_floor"]
    dt_scale: float = MAMBA["dt_scale"]

    options = MAMBA
    operations: ClassVar[tuple[str, ...]] = ("selective_scan", "short_conv")
    ways: ClassVar[tuple[str, ...]] = ("z",)
    valued = True
    link = "vector"
    follows_time: ClassVar[str] = "token"

    @property
    def inner(self) -> int:
        """E, channels of the hidden stream."""
        return self.expand * self.width

    @property
    def stream_sizes(self) -> tuple[int, int]:
        """Channels of the input and of its key: the widths of DenseSSM's gates."""
        return self.inner, self.state

    @property
    def rank(self) -> int:
        """R, rank of the step."""
        return self.dt_rank or -(-self.width // 16)

    def setup(self) -> None:
        width, inner, rank, state = self.width, self.inner, self.rank, self.state

        tap, dt_bias = uniform(self.conv**-0.5), init_dt_bias(self.dt_min, self.dt_max, self.dt_floor)
        out = uniform((inner * self.layers) ** -0.5)
        self.in_proj = self.matrix("in_proj", (width, 2, inner), ("embed", None, "inner"), uniform(width**-0.5))
        self.conv_weight = parameter(self, "conv_weight", (self.conv, inner), ("conv", "inner"), tap)
        self.conv_bias = parameter(self, "conv_bias", (inner,), ("inner",), tap)
        self.x_proj = self.matrix("x_proj", (inner, rank + 2 * state), ("inner", None), uniform(inner**-0.5))
        self.dt_proj = self.matrix("dt_proj", (rank, inner), ("rank", "inner"), uniform(rank**-0.5))
        self.dt_bias = parameter(self, "dt_bias", (inner,), ("inner",), dt_bias, group="ssm")
        # No weight decay: it would pull every A towards -1, and A = -1 is not simpler than any other value.
        self.A_log = parameter(self, "A_log", (inner, state), ("inner", "state"), init_A_log, decay=False, group="ssm")
        self.D = parameter(self, "D", (inner,), ("inner",), ones, group="ssm")
        self.out_proj = self.matrix("out_proj", (inner, width), ("inner", "embed"), out)
        if self.norms == "learned":
            self.norm_scales = tuple(
                parameter(self, f"{name}_norm", (size,), (axis,), ones)
                for name, size, axis in (("delta", rank, "rank"), ("B", state, "state"), ("C", state, "state"))
            )

    @nn.nowrap
    def init_state(self, batch: int, max_length: int | None = None) -> dict[str, jax.Array]:
        """conv [B, W - 1, E] and ssm [B, E, N], float32; their size does not depend on max_length."""
        return dict(
            conv=jnp.zeros((batch, self.conv - 1, self.inner), jnp.float32),
            ssm=jnp.zeros((batch, self.inner, self.state), jnp.float32),
        )

    def stream_and_readout(
        self, x: jax.Array, seq: Sequence, state: State = None, links: Links = NO_LINKS
    ) -> tuple[Stream, Readout]:
        """Everything before the scan: projection, convolution, and the token's step, input and output matrices."""
        if state is None:
            state = self.init_state(x.shape[0])
        x = real(x, seq, self.dtype)
        if x.shape[1] == 1 and not links.inputs:  # for one token, copying the weights' halves would cost the most
            a, z = jnp.moveaxis(jnp.einsum("btd,dce->btce", x, self.in_proj), 2, 0)
        else:
            gated = links.of("z", x, seq, self.dtype)
            a, z = separate_matmuls((x, gated), (self.in_proj[:, 0], self.in_proj[:, 1]))
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
        delta, B, C = jnp.split(matmul(u, self.x_proj), [self.rank, self.rank + self.state], axis=-1)
        if self.norms != "none":
            scales = self.norm_scales if self.norms == "learned" else (None, None, None)
            delta, B, C = (rms_norm(v, s, self.norm_eps) for v, s in zip((delta, B, C), scales, strict=True))
        u, delta, B = (checkpoint_name(v, "stream") for v in (u, delta, B))  # for model.remat
        C, u = checkpoint_name(C, "projected"), links.value(u)
        A = -jnp.exp(self.A_log)
        steps, stretch = None, seq.stretch(self.dt_scale)
        if isinstance(stretch, jax.Array):
            steps = stretch
        elif stretch != 1:  # dt enters as dt A and dt B alone
            A, B = stretch * A, stretch * B
        stream = Stream(u, delta, self.dt_proj, self.dt_bias, A, B, state["ssm"], steps)
        return stream, Readout(C, self.D, z, conv)

    def keep(self, stream: Stream, seq: Sequence, readers: int) -> Stream:
        """The stream with its states, where a CPU had better read than scan them again: selective_scan/kept.py."""
        if self.implementation.get("selective_scan") not in (None, "", "xla") or not kept.worth(stream.u, stream.A):
            return stream
        arrays = dict(u=stream.u, A=stream.A, B=stream.B, initial_state=stream.state, **stream.scanned_step())
        states = kept.keep(**arrays, queries=1 + readers, **seq.documents())
        return dataclasses.replace(stream, kept=states)

    def scan(self, stream: Stream, readout: Readout, seq: Sequence) -> tuple[jax.Array, jax.Array]:
        """y [B, T, E], skip and gate included, and the new ssm state: the layer without dense links."""
        if stream.kept is not None:
            return skip_and_gate(kept.read(stream.kept, 0, readout.C), stream.u, readout), stream.kept.last

        def scan(stream, readout, documents):
            return selective_scan(
                stream.u,
                A=stream.A,
                B=stream.B,
                C=readout.C,
                D=readout.D,
                z=readout.z,
                **stream.scanned_step(),
                initial_state=stream.state,
                implementation=self.implementation.get("selective_scan"),
                **documents,
            )

        # dt is as large as u, and one low-rank product computes it. So the backward pass recomputes it.
        keep = jax.checkpoint_policies.save_only_these_names("scan")
        return jax.checkpoint(scan, policy=keep)(stream, readout, seq.documents())

    @nn.nowrap
    def flops(self, length: int) -> float:
        """The scan's operations, less the two counted for each element of A."""
        return (SCAN_FLOPS - 2) * self.inner * self.state

    def project(self, y: jax.Array) -> jax.Array:
        """[B, T, E] to [B, T, D]."""
        # A CPU would compute y by columns for the gradient of out_proj, ten times as slowly as it then turns y
        return matmul(computed_once(y.astype(self.dtype)), self.out_proj)

    @nn.nowrap
    def new_state(self, readout: Readout, ssm: jax.Array) -> dict[str, jax.Array]:
        """The mixer's state after the tokens."""
        return dict(conv=readout.conv, ssm=ssm)


def skip_and_gate(y: jax.Array, u: jax.Array, readout: Readout) -> jax.Array:
    """(y + D u) silu(z), [B, T, E] in u's dtype: what the scan does when it writes y itself."""
    y = (y + readout.D * u) * jax.nn.silu(readout.z.astype(jnp.float32))
    return y.astype(u.dtype)


def stack(streams: list[Stream]) -> dict[str, Any]:
    """The streams as groups of one selective scan: u, dt [B, T, G, E], A [G, E, N], B [B, T, G, N], ..."""
    steps: dict[str, Any] = dict(dt=side_by_side(streams), dt_bias=jnp.stack([s.dt_bias for s in streams]))
    if streams[0].steps is not None:  # as `Stream.scanned_step`
        steps = dict(dt=jnp.stack([s.step().astype(s.u.dtype) for s in streams], axis=2), dt_softplus=False)
    return dict(
        steps,
        u=jnp.stack([s.u for s in streams], axis=2),
        A=jnp.stack([s.A for s in streams]),
        B=jnp.stack([s.B for s in streams], axis=2),
        initial_state=jnp.stack([s.state for s in streams], axis=1),
    )


def side_by_side(streams: list[Stream]) -> jax.Array:
    """The steps of G streams before bias and softplus, [B, T, G, E], as one product.

    The deltas side by side, [B, T, G R], times the matrices dt_proj on the diagonal of [G R, G, E]. So the product
    writes what the scan reads, and its gradient is read where the scan wrote it. Products of each stream would be
    copied together and apart. R is small, so the zeros cost nothing beside these bytes.
    """
    G = len(streams)
    own = jnp.eye(G, dtype=bool)[:, None, :, None]  # a stream's rows and columns
    projections = jnp.where(own, jnp.stack([s.dt_proj for s in streams])[:, :, None], 0)  # [G, R, G, E]
    delta = jnp.concatenate([s.delta for s in streams], axis=-1)
    return jnp.einsum("btr,rge->btge", delta, projections.reshape(-1, *projections.shape[2:]))
