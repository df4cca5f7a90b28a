"""The sequential variant of Conba: the paper's loop as it is written (Xu & Lin 2024, eqs 1-11 and figure 1).

    e_t = h(x_{t-1} C_t) - r u_t                               error of the readout before the token
    v_t = exp(dt_t A) x_{t-1} + (dt_t (u_t - gamma K_t e_t)) B_t + w_t
    x_t = R(f_d(v_t))                                          delayed state and dynamic scaling, inside the loop
    out = (h(x_t C_t) + D u_t) silu(z_t)

Its options are the functions f_d, h and R, and how the gain K adapts (conba_loop.py). The loop is nonlinear, so time is
not parallel. conba.py is the form for training; this one is for comparisons with the paper.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.branch import NO_LINKS, Links, State
from seqmodels.fields.conba_seq import CONBA_SEQ
from seqmodels.kernels.segments import resets
from seqmodels.layers.parameter import Init, parameter, zeros
from seqmodels.mixers.conba import declare_scaling, identity
from seqmodels.mixers.conba_gain import Controller
from seqmodels.mixers.conba_loop import Loop, Mlp, Tokens, run
from seqmodels.mixers.mamba import Mamba
from seqmodels.sequence import Sequence

HIDDEN = 4  # inner width of the MLPs, as a multiple of N or P


def both_signs(spread: float) -> Init:
    """[4N, N]: the rows of I and of -I, then normal ones. As swish(x) - swish(-x) = x, a fresh MLP is the identity."""

    def init(key, shape, dtype=jnp.float32):
        hidden, size = shape
        one = jnp.eye(size, dtype=dtype)
        rest = jax.random.normal(key, (hidden - 2 * size, size), dtype)
        return jnp.concatenate([one, -one, spread * rest])

    return init


def differences(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """[N, 4N]: I, -I and zeros, for `both_signs`."""
    one = jnp.eye(shape[0], dtype=dtype)
    return jnp.concatenate([one, -one, jnp.zeros((shape[0], shape[1] - 2 * shape[0]), dtype)], axis=1)


class ConbaSeq(Mamba):
    """Sequential Conba mixer. Its options are declared in seqmodels/fields/conba_seq.py."""

    norms: str = CONBA_SEQ["norms"]
    norm_eps: float = CONBA_SEQ["norm_eps"]
    fd: str = CONBA_SEQ["fd"]
    h: str = CONBA_SEQ["h"]
    scaling: str = CONBA_SEQ["scaling"]
    control: str = CONBA_SEQ["control"]
    rule: str = CONBA_SEQ["rule"]
    stability: str = CONBA_SEQ["stability"]
    head_dim: int = CONBA_SEQ["head_dim"]
    gain: str = CONBA_SEQ["gain"]
    process_noise: float = CONBA_SEQ["process_noise"]
    observation_noise: float = CONBA_SEQ["observation_noise"]

    options = CONBA_SEQ
    operations = ("short_conv",)
    follows_time = "rate"
    link = ""

    @property
    def draws_by_row(self) -> bool:
        """Whether there is noise."""
        return self.observation_noise > 0 or self.process_noise > 0

    @property
    def heads(self) -> int:
        """H, heads of control."""
        return self.inner // self.head_dim

    def setup(self) -> None:
        super().setup()
        size = self.state
        self.F, self.fd_mlp, self.h_mlp = None, None, None
        if self.fd == "linear":
            self.F = parameter(self, "F", (size, size), ("state", None), identity, decay=False, group="ssm")
            self.f = parameter(self, "f", (size,), ("state",), zeros, group="ssm")
        if self.fd == "mlp":
            self.fd_mlp = self.mlp("fd", size, "state")
        if self.h == "mlp":
            self.h_mlp = self.mlp("h", self.head_dim, "head_dim")
        self.Z, self.g = declare_scaling(self, self.scaling, size)
        if self.control != "off":
            self.controller = Controller(self.inner, self.head_dim, self.gain, self.rule, self.dtype)

    def mlp(self, name: str, size: int, axis: str) -> Mlp:
        """W2 swish(W1 x + b1) + b2 with 4 size inner channels; a fresh one is the identity."""
        wide = HIDDEN * size

        def vector(part: str, length: int, axis: str | None) -> jax.Array:
            return parameter(self, f"{name}_{part}", (length,), (axis,), zeros, group="ssm")

        def matrix(part: str, shape: tuple[int, int], axes: tuple[str | None, str | None], init: Init) -> jax.Array:
            return parameter(self, f"{name}_{part}", shape, axes, init, decay=False, group="ssm")

        return Mlp(
            matrix("in", (wide, size), (None, axis), both_signs(size**-0.5)),
            vector("in_bias", wide, None),
            matrix("out", (size, wide), (axis, None), differences),
            vector("out_bias", size, axis),
        )

    @nn.nowrap
    def init_state(self, batch: int, max_length: int | None = None) -> dict[str, jax.Array]:
        """Zeros, float32; their size does not depend on max_length.

        conv [B, W - 1, E]; ssm [B, E, N], the state x; gain [B, H, P, P], the learned part of the gain, transposed.
        With rule="mit" also the error [B, H, P] and the sensitivity [B, E, N] of the last token.
        """
        state = dict(super().init_state(batch))
        if self.control != "off":
            state["gain"] = jnp.zeros((batch, self.heads, self.head_dim, self.head_dim), jnp.float32)
            if self.rule == "mit":
                state["error"] = jnp.zeros((batch, self.heads, self.head_dim), jnp.float32)
                state["sensitivity"] = jnp.zeros_like(state["ssm"])
        return state

    def __call__(
        self, x: jax.Array, seq: Sequence, state: State = None, links: Links = NO_LINKS
    ) -> tuple[jax.Array, State]:
        """x [B, T, D] to y [B, T, D] and the new state."""
        old = self.init_state(x.shape[0]) if state is None else state
        stream, readout = self.stream_and_readout(x, seq, old, links)
        u = stream.u
        step, log_memory, reference = None, None, None
        if self.control != "off":
            step, log_memory = self.controller.rates(u)
            reference = self.controller.reference * u
        random = self.has_rng("dropout")
        noise = None
        if self.observation_noise and random:
            noise = self.observation_noise * jax.random.normal(self.make_rng("dropout"), u.shape, jnp.float32)
        key = self.make_rng("dropout") if self.process_noise and random else None
        reset = resets(**seq.documents())
        tokens = Tokens(u, stream.delta, stream.B, readout.C, reference, step, log_memory, noise, reset, seq.mask)
        memory = {name: value for name, value in old.items() if name != "conv"}
        y, memory = run(tokens, self.loop(stream), memory, key)
        y = (y + readout.D * u) * jax.nn.silu(readout.z.astype(jnp.float32))
        return self.project(y), dict(conv=readout.conv, **memory)

    def loop(self, stream: Any) -> Loop:
        """The parameters of the loop."""
        control = dict(base=self.controller.base, authority=self.controller.authority) if self.control != "off" else {}
        return Loop(
            stream.A, stream.dt_proj, stream.dt_bias,
            F=self.F, f=None if self.F is None else self.f, fd=self.fd_mlp, h=self.h_mlp, Z=self.Z, g=self.g, **control,
            scaling=self.scaling, rule=self.rule, stability=self.stability, noise=self.process_noise,
        )  # fmt: skip

    @nn.nowrap
    def flops(self, length: int) -> float:
        """Operations of the state, of f_d, h and R on it, and of the gain, less the two counted for each parameter."""
        size, wide = self.state, 2 * HIDDEN
        matrices = (self.scaling != "off") + {"identity": 0, "linear": 1, "mlp": wide}[self.fd]
        total = super().flops(length) + matrices * 2 * size * size * (self.inner - 1)
        if self.h == "mlp":
            total += wide * 2 * self.head_dim**2 * (self.heads - 1)
        # Of the gain: its readout, what is read along the key, the product with K_base, the decay, and the update.
        return total if self.control == "off" else total + (2 + 2 + 2 + 1 + 2) * self.inner * self.head_dim
