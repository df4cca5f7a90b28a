"""The recurrent block of Griffin (De et al. 2024, arXiv 2402.19427, section 2.3 and 2.4) with its RG-LRU.

r, i = sigmoid(u_t W_r + b_r), sigmoid(u_t W_i + b_i)        W_r and W_i are block-diagonal
log a = -8 r softplus(L),  h_t = a h_{t-1} + sqrt(1 - a^2) (i u_t)
y = (h * gelu(x W_y)) W_out, where u is a short convolution of x W_x

The first token of a document is not scaled by sqrt(1 - a^2), as no state decays to make room for it.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from seqmodels.branch import Branch, State, real
from seqmodels.fields.rglru import RGLRU
from seqmodels.layers.parameter import normal, parameter, residual_std, uniform, zeros
from seqmodels.parallel import linear_scan, short_conv
from seqmodels.sequence import Sequence

SHARPNESS = 8.0  # c of the paper
STEEPEST = 1000.0  # limit of the derivative of the root, as in the authors' code
RADIUS = (0.9, 0.999)  # range of a fresh model's a^(1 / c) at r = 1


@jax.custom_jvp
def bounded_sqrt(x: jax.Array) -> jax.Array:
    """The root of x >= 0, whose derivative is at most STEEPEST."""
    return jnp.sqrt(x)


@bounded_sqrt.defjvp
def _bounded_sqrt_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    return jnp.sqrt(x), dx * jax.lax.rsqrt(jnp.maximum(4 * x, STEEPEST**-2))


def decay_and_scale(r: jax.Array, rate: jax.Array, first: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log a and sqrt(1 - a^2), [B, T, E] float32; the latter is 1 on first tokens.

    Args:
        r: [B, T, E] float32 gate; rate: [E] L; first: [B, T] bool, where a document starts.
    """
    log_a = -SHARPNESS * r * jax.nn.softplus(rate)
    scale = bounded_sqrt(-jnp.expm1(2 * log_a))
    return log_a, jnp.where(first[..., None], 1, scale)


def fresh_rate(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """L such that exp(-softplus(L)) lies uniformly, by area, in the ring with the radii RADIUS."""
    low, high = RADIUS
    square = jax.random.uniform(key, shape, dtype, low**2, high**2)
    return jnp.log(jnp.expm1(-0.5 * jnp.log(square)))


class RgLru(Branch):
    """Griffin's recurrent block. Its options are declared in seqmodels/fields/rglru.py."""

    hidden: int = RGLRU["hidden"]
    heads: int = RGLRU["heads"]
    conv: int = RGLRU["conv"]

    options = RGLRU
    operations = ("linear_scan", "short_conv")
    biased = True

    @property
    def inner(self) -> int:
        """E, the width of the state."""
        return self.hidden or self.width

    @nn.nowrap
    def init_state(self, batch: int, max_length: int | None = None) -> dict[str, jax.Array]:
        """conv [B, W - 1, E] and lru [B, E], float32."""
        conv = jnp.zeros((batch, self.conv - 1, self.inner), jnp.float32)
        return dict(conv=conv, lru=jnp.zeros((batch, self.inner), jnp.float32))

    @nn.nowrap
    def flops(self, length: int) -> float:
        """The decay and its root, the scaled input, and the recurrence."""
        return (2 + 3 + 2 + 2) * self.inner

    @nn.compact
    def __call__(self, x: jax.Array, seq: Sequence, state: State = None) -> tuple[jax.Array, State]:
        """x [B, T, D] to y [B, T, D] and the new state."""
        state = self.init_state(x.shape[0]) if state is None else state
        x = real(x, seq, self.dtype)

        def project(name, x, sizes, axes, init):
            y = x @ self.matrix(f"{name}_proj", sizes, axes, init)
            if not self.bias:
                return y
            return y + parameter(self, f"{name}_bias", sizes[1:], axes[1:], zeros, dtype=self.dtype)

        inward = (self.width, self.inner), ("embed", "inner"), normal(self.width**-0.5)
        u, gate = (checkpoint_name(project(name, x, *inward), "projected") for name in ("in", "gate"))
        taps = parameter(self, "conv_weight", (self.conv, self.inner), ("conv", "inner"), uniform(self.conv**-0.5))
        bias = parameter(self, "conv_bias", (self.inner,), ("inner",), zeros)
        past = dict(initial_state=state["conv"], implementation=self.implementation.get("short_conv"))
        u, conv = short_conv(u, taps, bias, **past, **seq.documents())
        u = checkpoint_name(u, "stream")
        log_a, inputs = self.scaled(u, seq.positions == 0)
        h, lru = linear_scan(
            log_a,
            inputs.astype(self.dtype),
            initial_state=state["lru"],
            implementation=self.implementation.get("linear_scan"),
            **seq.documents(),
        )
        y = checkpoint_name(h, "scan") * jax.nn.gelu(gate, approximate=True)
        outward = (self.inner, self.width), ("inner", "embed"), normal(residual_std(self.layers))
        return project("out", y, *outward), dict(conv=conv, lru=lru)

    @nn.nowrap
    def scaled(self, u: jax.Array, first: jax.Array) -> tuple[jax.Array, jax.Array]:
        """log a and the input sqrt(1 - a^2) i u, [B, T, E] float32, of u [B, T, E]."""
        size = self.inner // self.heads
        blocks = u.reshape(*u.shape[:2], self.heads, size)

        def gate(name):
            shape, axes = (self.heads, size, size), ("heads", "state", "head_dim")
            weight = self.matrix(f"{name}_gate", shape, axes, normal(size**-0.5))
            bias = parameter(self, f"{name}_gate_bias", (self.inner,), ("inner",), zeros)
            number = jnp.einsum("bthi,hij->bthj", blocks, weight).reshape(u.shape)
            return jax.nn.sigmoid(number.astype(jnp.float32) + bias)

        r, i = gate("recurrence"), gate("input")
        rate = parameter(self, "rate", (self.inner,), ("inner",), fresh_rate, group="ssm")
        log_a, scale = decay_and_scale(r, rate, first)
        return log_a, scale * i * u
