"""Mamba-3 (ICLR 2026, arXiv 2603.15569), one input and output a head: trapezoidal steps and rotating states.

    S_t = a_t S_{t-1} + (1 - lambda_t) dt_t a_t k_{t-1} x_{t-1}^T + lambda_t dt_t k_t x_t^T,  y_t = q_t S_t + D x_t
    q_t, k_t: C_t, B_t, normed, biased, and rotated by angles that are the running sums of dt_t theta_t

A token's key is written twice, at its own time and at the next token's time. Both writes become one if the key is
scaled by s_t = lambda_t dt_t + (1 - lambda_{t+1}) dt_{t+1}, without the second term for a document's last token. So
`kernels.linear_attention` computes the recurrence unchanged. But s_t depends on the next token, so a query must not
read its own token's key with this scale. Instead it reads the state before its token, decayed once more, and adds its
own token separately.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from seqmodels.branch import Branch, State, real
from seqmodels.fields.mamba3 import MAMBA3
from seqmodels.kernels.segments import resets
from seqmodels.layers.norm import rms_norm
from seqmodels.layers.parameter import ones, parameter, uniform
from seqmodels.layers.rope import rotate_pairs
from seqmodels.mixers.mamba import init_dt_bias
from seqmodels.mixers.matrix import state_flops
from seqmodels.parallel import linear_attention
from seqmodels.sequence import Sequence

SLOWEST_DECAY = 1e-4  # -A is at least this


def heavy_tail(x: jax.Array) -> jax.Array:
    """1 + x for x >= 0, else 1 / (1 - x): positive, and approaches zero more slowly than softplus."""
    return jnp.where(x >= 0, 1 + x, 1 / (1 - jnp.minimum(x, 0)))


A_ACTIVATIONS = {"heavy_tail": heavy_tail, "softplus": jax.nn.softplus}


def wrapped(angle: jax.Array) -> jax.Array:
    """The same angle in [-pi, pi)."""
    return jnp.mod(angle + jnp.pi, 2 * jnp.pi) - jnp.pi


def angles(turn: jax.Array, start: jax.Array, reset: jax.Array | None) -> jax.Array:
    """Running sums of `turn` [B, T, H, R] over a document, as angles in [-pi, pi), from `start` [B, H, R] on.

    reset [B, T] is True on tokens that begin a document. The sums are computed in a tree, and partial sums are wrapped,
    so that the rounding error does not grow with the length.
    """
    reset = jnp.zeros(turn.shape[:2], bool) if reset is None else reset
    turn = turn.at[:, 0].add(jnp.where(reset[:, 0, None, None], 0, start))

    def join(left, right):
        fresh = right[1]
        return wrapped(jnp.where(fresh, right[0], left[0] + right[0])), left[1] | fresh

    return wrapped(jax.lax.associative_scan(join, (turn, reset[:, :, None, None]), axis=1)[0])


def at_next(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """x [B, T, H] at the next real token, or zero if there is none."""
    after = jnp.concatenate([x[:, 1:], jnp.zeros_like(x[:, :1])], axis=1)
    if mask is None:
        return after
    length = mask.shape[1]
    index = jnp.where(mask, jnp.arange(length), length)
    following = jax.lax.cummin(index, axis=1, reverse=True)  # this token or the next real one
    following = jnp.concatenate([following[:, 1:], jnp.full_like(following[:, :1], length)], axis=1)
    padded = jnp.concatenate([x, jnp.zeros_like(x[:, :1])], axis=1)
    return jnp.take_along_axis(padded, following[..., None], axis=1)


def at_last(x: jax.Array, before: jax.Array, mask: jax.Array | None) -> jax.Array:
    """x [B, T, ...] at the last real token, or `before` [B, ...] if there is none."""
    if mask is None:
        return x[:, -1].astype(before.dtype)
    last = jnp.max(jnp.where(mask, jnp.arange(1, mask.shape[1] + 1), 0), axis=1)
    every = jnp.concatenate([before[:, None], x.astype(before.dtype)], axis=1)
    return jnp.take_along_axis(every, last.reshape(-1, *[1] * (x.ndim - 1)), axis=1)[:, 0]


class Mamba3(Branch):
    """Mamba-3 mixer, SISO. Its options are declared in seqmodels/fields/mamba3.py."""

    state: int = MAMBA3["state"]
    expand: int = MAMBA3["expand"]
    head_dim: int = MAMBA3["head_dim"]
    groups: int = MAMBA3["groups"]
    rotated: float = MAMBA3["rotated"]
    A_activation: str = MAMBA3["A_activation"]
    norm_eps: float = MAMBA3["norm_eps"]
    dt_min: float = MAMBA3["dt_min"]
    dt_max: float = MAMBA3["dt_max"]
    dt_floor: float = MAMBA3["dt_floor"]
    dt_scale: float = MAMBA3["dt_scale"]

    options = MAMBA3
    operations = ("linear_attention",)
    follows_time = "token"

    @property
    def heads(self) -> int:
        """H, heads of P channels."""
        return self.expand * self.width // self.head_dim

    @property
    def turned(self) -> int:
        """Number of rotated channels of a key, two for each angle."""
        return int(self.state * self.rotated)

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """[H, N, P] of a row's matrix state."""
        return self.heads, self.state, self.head_dim

    def setup(self) -> None:
        width, inner, heads, state = self.width, self.expand * self.width, self.heads, self.state

        project, out = uniform(width**-0.5), uniform((inner * self.layers) ** -0.5)
        dt_bias = init_dt_bias(self.dt_min, self.dt_max, self.dt_floor)
        self.in_proj = self.matrix("in_proj", (width, 2, inner), ("embed", None, "inner"), project)
        self.BC_proj = self.matrix("BC_proj", (width, 2 * self.groups * state), ("embed", "state"), project)
        self.head_proj = self.matrix("head_proj", (width, 3, heads), ("embed", None, "heads"), project)
        self.angle_proj = self.matrix("angle_proj", (width, self.turned // 2), ("embed", "state"), project)
        self.dt_bias = parameter(self, "dt_bias", (heads,), ("heads",), dt_bias, group="ssm")
        self.B_bias = parameter(self, "B_bias", (heads * state,), ("heads",), ones)
        self.C_bias = parameter(self, "C_bias", (heads * state,), ("heads",), ones)
        self.B_norm, self.C_norm = (parameter(self, name, (state,), ("state",), ones) for name in ("B_norm", "C_norm"))
        self.D = parameter(self, "D", (heads,), ("heads",), ones, group="ssm")
        self.out_proj = self.matrix("out_proj", (inner, width), ("inner", "embed"), out)

    @nn.nowrap
    def init_state(self, batch: int, max_length: int | None = None) -> dict[str, jax.Array]:
        """ssm [B, H, N, P]; the last token's angle [B, H, R / 2], rotated key [B, H, N], value [B, H, P]; float32."""
        heads, state, head_dim = self.state_shape
        shapes = dict(ssm=(heads, state, head_dim), angle=(heads, self.turned // 2), key=(heads, state))
        shapes["value"] = (heads, head_dim)
        return {name: jnp.zeros((batch, *shape), jnp.float32) for name, shape in shapes.items()}

    def __call__(self, x: jax.Array, seq: Sequence, state: State = None) -> tuple[jax.Array, State]:
        """x [B, T, D] to y [B, T, D] and the new state."""
        batch, length, _ = x.shape
        state = self.init_state(batch) if state is None else state
        mask = seq.mask
        x = real(x, seq, self.dtype)
        z, u = jnp.moveaxis(jnp.einsum("btd,dce->btce", x, self.in_proj), 2, 0)
        z, u = (checkpoint_name(v, "projected") for v in (z, u))
        u = u.reshape(batch, length, self.heads, self.head_dim)
        B, C = jnp.moveaxis((x @ self.BC_proj).reshape(batch, length, 2, self.groups, -1), 2, 0)

        # Steps, decays and angles are always float32, because the state depends on their sums over time.
        wide = dict(preferred_element_type=jnp.float32)
        numbers = jnp.einsum("btd,dch->btch", x, self.head_proj, **wide)
        theta = jnp.pi * jnp.tanh(jnp.einsum("btd,dr->btr", x, self.angle_proj, **wide))
        dt = seq.stretch(self.dt_scale) * jax.nn.softplus(numbers[:, :, 0] + self.dt_bias)
        log_decay = -dt * jnp.maximum(A_ACTIVATIONS[self.A_activation](numbers[:, :, 1]), SLOWEST_DECAY)
        share = jax.nn.sigmoid(numbers[:, :, 2])  # lambda: share of a token's step for its own input
        dt = dt if mask is None else jnp.where(mask[..., None], dt, 0)

        reset = resets(**seq.documents())
        angle = angles(dt[..., None] * theta[:, :, None], state["angle"], reset)
        q, k = self._turned(C, self.C_norm, self.C_bias, angle), self._turned(B, self.B_norm, self.B_bias, angle)
        late = (1 - share) * dt  # weight of the previous token's write, at this token
        late = late if reset is None else jnp.where(reset[..., None], 0, late)
        again = at_next(late, mask)  # weight of this token's write, at the next token
        y, ssm = linear_attention(
            (jnp.exp(log_decay)[..., None] * q).astype(self.dtype),
            ((share * dt + again)[..., None] * k).astype(self.dtype),
            u,
            log_decay,
            read="exclusive",
            initial_state=state["ssm"] + self._late_write(late, state, mask),
            implementation=self.implementation.get("linear_attention"),
            **seq.documents(),
        )
        own = self.D + share * dt * jnp.sum(q * k, axis=-1)
        y = y.astype(jnp.float32) + own[..., None] * u
        y = (y.reshape(z.shape) * jax.nn.silu(z.astype(jnp.float32))).astype(self.dtype)
        values = dict(ssm=ssm, angle=at_last(angle, state["angle"], mask), key=at_last(k, state["key"], mask))
        values["value"] = at_last(u, state["value"], mask)
        return y @ self.out_proj, values

    @nn.nowrap
    def flops(self, length: int) -> float:
        """Operations of the matrix state."""
        return state_flops(self.state_shape, decays=True)

    def _turned(self, x, scale, bias, angle):
        """B or C [B, T, G, N], normed, with the heads' biases added, and rotated: [B, T, H, N] float32."""
        x = rms_norm(x.astype(jnp.float32), scale, self.norm_eps)
        x = jnp.repeat(x, self.heads // self.groups, axis=2) + bias.reshape(self.heads, self.state)
        return jnp.concatenate([rotate_pairs(x[..., : self.turned], angle), x[..., self.turned :]], axis=-1)

    def _late_write(self, late, state, mask):
        """[B, H, N, P]: the first real token's write of the key and value of the token before it, kept in the state.

        `late` is zero if the first real token begins a document, and on padding.
        """
        weight = late[:, 0]
        if mask is not None:
            first = jnp.argmax(mask, axis=1)
            weight = jnp.take_along_axis(late, first[:, None, None], axis=1)[:, 0]
        return weight[..., None, None] * state["key"][..., None] * state["value"][..., None, :]
