"""Conba, the mixer of MixCon (Xu & Lin 2024, ECAI, doi 10.3233/FAIA240593): Mamba, whose readout a controller corrects.

    s_t = exp(dt_t A) s_{t-1} + (dt_t u_t) B_t + w_t           Mamba's recurrence, with the norms of Jamba
    x_t = R(s_t + F s_{t-tau} + f)                             delayed state, scaled by R(d) = d * swish(Z d + g)
    y_t = x_t C_t + D u_t + v_t
    c_t = gamma K_t e_t,  e_t = y_t - r u_t                    the gain K adapts to the errors (conba_gain.py)
    out = (y_t - c_t) silu(z_t)

The paper feeds R back into the recurrence. Here the recurrence is linear and R is applied to what it returns, so time
is parallel (conba_state.py). docs/mixcon.md says what is the paper's, what is inferred, and what is our choice. A fresh
layer is Jamba's Mamba: F, f, Z, r, gamma and K are 0, and swish(g) = 1.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.branch import NO_LINKS, Links, State
from seqmodels.fields.conba import CONBA
from seqmodels.kernels.segments import resets
from seqmodels.layers.parameter import Init, ones, parameter, zeros
from seqmodels.mixers.conba_folded import init_folded, read_folded
from seqmodels.mixers.conba_gain import Controller
from seqmodels.mixers.conba_state import UNIT, Memory, Plant, Tokens, read_states
from seqmodels.mixers.mamba import Mamba, Readout, Stream
from seqmodels.sequence import Sequence


def identity(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """The identity matrix."""
    return jnp.eye(shape[0], shape[1], dtype=dtype)


def declare_scaling(module: nn.Module, scaling: str, state: int) -> tuple[jax.Array | None, jax.Array | None]:
    """Z [N, N] and g [N] of the scaling R; None with scaling "off".

    A fresh gate is 1. A fresh literal R is swish(x + 1), which is nearly linear in x > 0.
    """
    if scaling == "off":
        return None, None
    matrix: Init = identity if scaling == "literal" else zeros
    bias: Init = ones if scaling == "literal" else nn.initializers.constant(UNIT)
    decay = scaling != "literal"  # of a gate: it pulls Z to 0, which is no scaling
    Z = parameter(module, "Z", (state, state), ("state", None), matrix, decay=decay, group="ssm")
    return Z, parameter(module, "g", (state,), ("state",), bias, group="ssm")


class Conba(Mamba):
    """Conba mixer. Its options are declared in seqmodels/fields/conba.py."""

    norms: str = CONBA["norms"]
    norm_eps: float = CONBA["norm_eps"]
    delay: int = CONBA["delay"]
    scaling: str = CONBA["scaling"]
    control: str = CONBA["control"]
    sweeps: int = CONBA["sweeps"]
    rule: str = CONBA["rule"]
    state_eval: str = CONBA["state_eval"]
    head_dim: int = CONBA["head_dim"]
    gain: str = CONBA["gain"]
    process_noise: float = CONBA["process_noise"]
    observation_noise: float = CONBA["observation_noise"]

    options = CONBA
    operations = ("selective_scan", "short_conv", "delta_rule", "linear_scan")
    follows_time = "rate"  # the delays of states and errors count tokens
    link = ""  # DenseSSM would read Mamba's state, and not the scaled one

    @property
    def draws_by_row(self) -> bool:
        """Whether there is noise."""
        return self.observation_noise > 0 or self.process_noise > 0

    @property
    def heads(self) -> int:
        """H, heads of control."""
        return self.inner // self.head_dim

    @property
    def passes(self) -> int:
        """Times that the recurrence runs: once, and once more for every sweep of feedback."""
        return 1 + self.sweeps if self.control == "input" else 1

    def setup(self) -> None:
        super().setup()
        size = self.state
        self.F = parameter(self, "F", (size, size), ("state", None), zeros, group="ssm")
        self.f = parameter(self, "f", (size,), ("state",), zeros, group="ssm")
        self.Z, self.g = declare_scaling(self, self.scaling, size)
        if self.control != "off":
            self.controller = Controller(
                self.inner, self.head_dim, self.gain, self.rule, self.dtype, self.implementation.get("delta_rule")
            )

    @nn.nowrap
    def init_state(self, batch: int, max_length: int | None = None) -> dict[str, jax.Array]:
        """Zeros, float32; their size does not depend on max_length.

        conv [B, W - 1, E]; ssm [B, E, N]; lag [B, tau, E, N], the last states, oldest first; gain [B, H, P, P], the
        learned part of the gain, transposed. With control="input" there is an axis for the passes behind B: one gain
        and one scaled state [B, m, E, N] for each sweep, and one more ssm and lag. With state_eval="folded" the lag is
        one state, and the arrays of the last tau tokens (conba_folded.py).
        """
        passes = (self.passes,) if self.control == "input" else ()
        state = super().init_state(batch)
        state["ssm"] = jnp.zeros((batch, *passes, self.inner, self.state), jnp.float32)
        if self.delay and self.state_eval == "folded":
            state |= init_folded(batch, self.delay, self.inner, self.state, self.rank)
        elif self.delay:
            state["lag"] = jnp.zeros((batch, *passes, self.delay, self.inner, self.state), jnp.float32)
        if self.control == "input":
            state["scaled"] = jnp.zeros((batch, self.sweeps, self.inner, self.state), jnp.float32)
        if self.control != "off":
            sweeps = (self.sweeps,) if self.control == "input" else ()
            state["gain"] = jnp.zeros((batch, *sweeps, self.heads, self.head_dim, self.head_dim), jnp.float32)
        return state

    def __call__(
        self, x: jax.Array, seq: Sequence, state: State = None, links: Links = NO_LINKS
    ) -> tuple[jax.Array, State]:
        """x [B, T, D] to y [B, T, D] and the new state."""
        old = self.init_state(x.shape[0]) if state is None else state
        stream, readout = self.stream_and_readout(x, seq, old, links)
        noise = self.noise(stream.u.shape)
        if self.control == "input":
            y, new = self.fed_back(stream, readout, seq, old, noise)
        else:
            y, new = self.open_loop(stream, readout, seq, old)
            y = y + noise
        if self.control == "output":
            correction, new["gain"] = self.controller(y, stream.u, seq, old["gain"])
            y = y - correction
        y = y * jax.nn.silu(readout.z.astype(jnp.float32))
        return self.project(y), dict(conv=readout.conv, **new)

    def noise(self, shape: tuple[int, ...]) -> jax.Array | float:
        """Observation noise, in training: that is, where there is a random stream for dropout. Elsewhere 0."""
        if not self.observation_noise or not self.has_rng("dropout"):
            return 0.0
        return self.observation_noise * jax.random.normal(self.make_rng("dropout"), shape, jnp.float32)

    def process_key(self) -> jax.Array | None:
        """Random key of the process noise, in training. None: no noise."""
        return self.make_rng("dropout") if self.process_noise and self.has_rng("dropout") else None

    def plant(self, stream: Stream) -> Plant:
        """The parameters of the states' path."""
        return Plant(
            stream.A, stream.dt_proj, stream.dt_bias, self.F, self.f, self.Z, self.g,
            delay=self.delay, scaling=self.scaling, noise=self.process_noise,
        )  # fmt: skip

    def open_loop(
        self, stream: Stream, readout: Readout, seq: Sequence, old: State
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """y [B, T, E] float32 with the skip, without control, and the new states by name."""
        if self.state_eval == "folded":
            implementation = self.implementation.get("selective_scan")
            return read_folded(stream, readout, self.plant(stream), seq, old, implementation)
        memory = Memory(old["ssm"], old.get("lag"))
        y, _, memory = self.read(stream.u, stream, readout, seq, memory, self.process_key())
        return y, memory.by_name()

    def read(
        self, u: jax.Array, stream: Stream, readout: Readout, seq: Sequence, memory: Memory, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None, Memory]:
        """`read_states` for the input u [B, T, E] of the recurrence; y with the skip."""
        tokens = Tokens(u, stream.delta, stream.B, readout.C, resets(**seq.documents()))
        implementation = self.implementation.get("linear_scan")
        y, before, memory = read_states(
            tokens, self.plant(stream), memory, seq.mask, key, implementation=implementation
        )
        return y + readout.D * stream.u, before, memory

    def fed_back(
        self, stream: Stream, readout: Readout, seq: Sequence, old: State, noise: jax.Array | float
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Feedback into the recurrence by sweeps: each pass takes the correction that the pass before it found.

        A token's error is that of the readout before it. So pass j is exact for the first j tokens of a document.
        """
        key, u, new = self.process_key(), stream.u, []
        for i in range(self.passes):
            memory = Memory(
                old["ssm"][:, i],
                old["lag"][:, i] if self.delay else None,
                old["scaled"][:, i] if i < self.sweeps else None,
            )
            y, before, memory = self.read(u, stream, readout, seq, memory, key)
            new.append(memory.by_name())
            if before is not None:
                correction, gain = self.controller(before + noise, stream.u, seq, old["gain"][:, i])
                u, new[-1]["gain"] = stream.u - correction, gain
        names = [name for name in old if name != "conv"]
        return y + noise, {name: jnp.stack([s[name] for s in new if name in s], axis=1) for name in names}

    @nn.nowrap
    def flops(self, length: int) -> float:
        """Operations of states, their mixing by F and Z, and gains, less the two counted for each parameter."""
        size = self.inner * self.state
        mixed = 1 + (self.scaling != "off")
        mixing = mixed * 2 * self.state * (size - self.state)
        if self.state_eval == "folded":  # the token is mixed, and not its state; a delay is one scan more
            scans = 1 + (self.delay > 0)
            return scans * (super().flops(length) + 2 * size) - 2 * size
        total = self.passes * (super().flops(length) + 2 * size + mixing) - 2 * size
        if self.control == "off":
            return total
        # Of each gain: its readout, what is read along the key, the product with K_base, the decay, and the update.
        return total + max(1, self.passes - 1) * (2 + 2 + 2 + 1 + 2) * self.inner * self.head_dim
