"""Conba's control: a gain for each head, which adapts to the error by a delta rule.

    e_t = y_t - r u_t                                          error: the readout less its reference, [P] in each head
    k_t = e_t / sqrt(|e_t|^2 + 1e-6)
    c_t = gamma (K_base + K_t) e_t                             correction, by the gain before the token
    K_{t+1} = lambda_t K_t + beta_t (I - K_base - K_t) k_t k_t^T

The last line is a step of gradient descent on |(I - K) e|^2 with the normalised step beta, and a leak of the learned
part towards zero: the delta rule. With `rule="published"` it is K_{t+1} = K_t - beta_t e_t e_t^T, as the published code
intends. Its sign is the wrong way round.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from seqmodels.layers.parameter import Init, parameter, zeros
from seqmodels.parallel import delta_rule
from seqmodels.sequence import Sequence

SMALLEST = 1e-6  # of |e|^2, in the normalised error
# beta of a fresh gain: of a normalised step, and the published code's two constants
FRESH_STEP = {"nlms": 1 / (1 + math.e**2), "published": 1e-5, "mit": 1e-4}
FRESH_LEAK = 1e-2, 1e-3  # 1 - lambda of a fresh gain, of the first and the last head


def init_step(rule: str) -> Init:
    """sigmoid^-1 of the fresh step."""
    step = FRESH_STEP[rule]
    return nn.initializers.constant(math.log(step) - math.log1p(-step))


def init_leak(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
    """softplus^-1 of the leak, which goes from one end of FRESH_LEAK to the other, over the heads."""
    leak = jnp.geomspace(*FRESH_LEAK, shape[0], dtype=dtype)
    return leak + jnp.log(-jnp.expm1(-leak))


def unit(e: jax.Array) -> jax.Array:
    """e [..., P] over its length."""
    return e * jax.lax.rsqrt(jnp.sum(e * e, axis=-1, keepdims=True) + SMALLEST)


def adapt(
    e: jax.Array,
    base: jax.Array,
    step: jax.Array,
    log_memory: jax.Array | None,
    state: jax.Array,
    *,
    rule: str,
    dtype: DTypeLike = jnp.float32,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """(K_base + K_t) e_t of every token, by the gain before it, and the gain after the last token.

    Args:
        e: [B, T, H, P] errors. base: [H, P, P].
        step: [B, T, H] beta. log_memory: [B, T, H] log lambda; None: no leak.
        state: [B, H, P, P] float32, the transposed K of the first token.
        rule: "nlms" or "published".
        dtype: of the products.
        **options: of `delta_rule`: documents and implementation.
    """
    step = step[..., None]
    fixed = jnp.einsum("hpq,bthq->bthp", base, e, precision="highest")
    if rule == "published":
        key, value, along = -step * e, e, jnp.zeros_like(e)
        away, log_memory = along, None
    else:
        along = unit(e)
        key, away = step * along, None
        value = along - jnp.einsum("hpq,bthq->bthp", base, along, precision="highest")
    q, key, value, away, along = jax.tree.map(lambda x: x.astype(dtype), (e, key, value, away, along))
    learned, state = delta_rule(
        q, key, value, away, along, log_memory, read="exclusive", initial_state=state, **options
    )
    return fixed + learned, state


class Controller(nn.Module):
    """The parameters of control, and the correction that follows from them.

    Attributes:
        inner: E, channels of the readout; head_dim: P.
        gain: "input": beta and lambda of each token; "scalar": constants of a head.
        rule: "nlms", "published" or "mit". Only "nlms" has a leak.
        dtype: of matrix products. implementation: of `delta_rule`.
    """

    inner: int
    head_dim: int
    gain: str
    rule: str
    dtype: DTypeLike = jnp.float32
    implementation: str | None = None

    @property
    def heads(self) -> int:
        """H."""
        return self.inner // self.head_dim

    def setup(self) -> None:
        heads, size = self.heads, self.head_dim
        self.reference = parameter(self, "reference", (self.inner,), ("inner",), zeros, group="ssm")
        self.authority = parameter(self, "authority", (heads,), ("heads",), zeros)
        self.base = parameter(self, "base", (heads, size, size), ("heads", "head_dim", None), zeros)
        self.step = self.affine("step", init_step(self.rule))
        self.leak = self.affine("leak", init_leak) if self.rule == "nlms" else None

    def affine(self, name: str, init: Any) -> tuple[jax.Array | None, jax.Array]:
        """Weight [E, H], which starts at zero (None with gain "scalar"), and bias [H] of a number for each head."""
        weight = None
        if self.gain == "input":
            shape, axes = (self.inner, self.heads), ("inner", None)
            weight = parameter(self, f"{name}_weight", shape, axes, zeros, dtype=self.dtype)
        return weight, parameter(self, f"{name}_bias", (self.heads,), ("heads",), init)

    def rates(self, u: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """beta and log lambda (None: no leak) of every token, [B, T, H] float32, from u [B, T, E]."""

        def number(weight: jax.Array | None, bias: jax.Array) -> jax.Array:
            if weight is None:
                return jnp.broadcast_to(bias, (*u.shape[:2], self.heads))
            return jnp.einsum("bte,eh->bth", u, weight, preferred_element_type=jnp.float32) + bias

        step = jax.nn.sigmoid(number(*self.step))
        return step, None if self.leak is None else -jax.nn.softplus(number(*self.leak))

    def error(self, y: jax.Array, u: jax.Array) -> jax.Array:
        """e [B, T, H, P] of the readout y [B, T, E] float32."""
        return (y - self.reference * u).reshape(*y.shape[:-1], self.heads, self.head_dim)

    def __call__(self, y: jax.Array, u: jax.Array, seq: Sequence, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The correction gamma K e [B, T, E] float32, and the gain after the tokens.

        Args:
            y: [B, T, E] float32 readout. u: [B, T, E] input of the recurrence.
            state: [B, H, P, P] float32.
        """
        step, log_memory = self.rates(u)
        options: Mapping[str, Any] = dict(dtype=self.dtype, implementation=self.implementation, **seq.documents())
        corrected, state = adapt(self.error(y, u), self.base, step, log_memory, state, rule=self.rule, **options)
        return (self.authority[:, None] * corrected).reshape(y.shape), state
