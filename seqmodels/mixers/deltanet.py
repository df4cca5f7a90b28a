"""DeltaNet (Yang et al. 2024, arXiv 2406.06484): each token corrects what the state holds for its key.

S_t = S_{t-1} + beta_t k_t (v_t - k_t^T S_{t-1})^T,  o_t = K^-1/2 q_t S_t,  beta_t = sigmoid(x_t W_beta)
y = norm_head(o) W_o

q, k and v are short convolutions of projections with SiLU; q and k are then divided by their norms. The matrix of the
recurrence, 1 - beta k k^T, has the eigenvalue 1 - beta for k and 1 for all else. With `negative_eigenvalues` beta is
in (0, 2), so the state can also change its sign along k, which tracking parity and permutations needs
(Grazzi et al. 2025, arXiv 2411.12537).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from seqmodels.branch import Branch, State, real
from seqmodels.fields.deltanet import DELTANET
from seqmodels.layers.matmul import wide_matmul
from seqmodels.layers.norm import rms_norm
from seqmodels.layers.parameter import normal, ones, parameter, residual_std, uniform
from seqmodels.mixers.matrix import delta_flops
from seqmodels.parallel import delta_rule, short_conv
from seqmodels.sequence import Sequence

L2_EPS = 1e-6  # inside the root of the norms of q and k, as in flash-linear-attention


class DeltaNet(Branch):
    """DeltaNet mixer. Its options are declared in seqmodels/fields/deltanet.py.

    A subclass may decay the state (`log_decay`), scale the readout (`gate`), and share keys between heads.
    """

    heads: int = DELTANET["heads"]
    key_dim: int = DELTANET["key_dim"]
    value_dim: int = DELTANET["value_dim"]
    conv: int = DELTANET["conv"]
    negative_eigenvalues: bool = DELTANET["negative_eigenvalues"]
    norm_eps: float = DELTANET["norm_eps"]

    options = DELTANET
    operations = ("delta_rule", "short_conv")

    @property
    def key_shape(self) -> tuple[int, int]:
        """[Hk, K] of a token's key."""
        return self.heads, self.key_dim or self.width // self.heads

    @property
    def value_shape(self) -> tuple[int, int]:
        """[H, V] of a token's value."""
        return self.heads, self.value_dim or self.width // self.heads

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """[H, K, V] of a row's matrix state."""
        heads, values = self.value_shape
        return heads, self.key_shape[1], values

    @nn.nowrap
    def init_state(self, batch: int, max_length: int | None = None) -> dict[str, jax.Array]:
        """q_conv, k_conv [B, W - 1, Hk K], v_conv [B, W - 1, H V] and delta [B, H, K, V]; all float32."""
        (groups, keys), (heads, values) = self.key_shape, self.value_shape
        sizes = dict(q_conv=groups * keys, k_conv=groups * keys, v_conv=heads * values)
        past = {name: jnp.zeros((batch, self.conv - 1, size), jnp.float32) for name, size in sizes.items()}
        return dict(past, delta=jnp.zeros((batch, *self.state_shape), jnp.float32))

    @nn.nowrap
    def flops(self, length: int) -> float:
        """Operations of the matrix state."""
        return delta_flops(self.state_shape, decays=False)

    @nn.nowrap
    def log_decay(self, x: jax.Array) -> jax.Array | None:
        """[B, T, H] float32 from x [B, T, D]. None: the state does not decay."""
        return None

    @nn.nowrap
    def gate(self, x: jax.Array) -> jax.Array | None:
        """[B, T, H, V], a factor of the normed readout. None: no gate."""
        return None

    @nn.nowrap
    def by_heads(self, name: str, x: jax.Array, shape: tuple[int, int], axis: str) -> jax.Array:
        """x [B, T, D] projected to [B, T, *shape] by the parameter `name`, whose heads have the logical axis `axis`."""
        weight = self.matrix(name, (self.width, *shape), ("embed", axis, "head_dim"), normal(self.width**-0.5))
        return checkpoint_name(jnp.einsum("btd,dhk->bthk", x, weight), "projected")

    @nn.compact
    def __call__(self, x: jax.Array, seq: Sequence, state: State = None) -> tuple[jax.Array, State]:
        """x [B, T, D] to y [B, T, D] and the new state."""
        state = self.init_state(x.shape[0]) if state is None else state
        x, new = real(x, seq, self.dtype), {}

        def stream(name, shape, axis):
            inputs, size = self.by_heads(f"{name}_proj", x, shape, axis), shape[0] * shape[1]
            taps = parameter(self, f"{name}_conv", (self.conv, size), ("conv", axis), uniform(self.conv**-0.5))
            past = dict(initial_state=state[f"{name}_conv"], implementation=self.implementation.get("short_conv"))
            inputs = inputs.reshape(*x.shape[:2], size)
            y, new[f"{name}_conv"] = short_conv(inputs, taps, activation="silu", **past, **seq.documents())
            return checkpoint_name(y, "stream").reshape(*x.shape[:2], *shape)

        q, k = (unit(stream(name, self.key_shape, "kv_heads")) for name in ("q", "k"))
        v = stream("v", self.value_shape, "heads")
        y, new["delta"] = self.correct(q, k, v, self.step(x), self.log_decay(x), seq, state["delta"])
        y = rms_norm(y, parameter(self, "scale", (v.shape[3],), ("head_dim",), ones), self.norm_eps)
        gate = self.gate(x)
        y = y if gate is None else y * gate
        shape, axes = (*self.value_shape, self.width), ("heads", "head_dim", "embed")
        out = self.matrix("out_proj", shape, axes, normal(residual_std(self.layers)))
        return jnp.einsum("bthv,hvd->btd", y.astype(self.dtype), out), new

    @nn.nowrap
    def step(self, x: jax.Array) -> jax.Array:
        """beta [B, T, H] float32: which share of what the state holds for a key is replaced."""
        weight = self.matrix("beta_proj", (self.width, self.heads), ("embed", "heads"), normal(self.width**-0.5))
        beta = jax.nn.sigmoid(wide_matmul(x, weight))
        return 2 * beta if self.negative_eigenvalues else beta

    @nn.nowrap
    def correct(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        beta: jax.Array,
        log_decay: jax.Array | None,
        seq: Sequence,
        state: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """The recurrence with unit keys: readouts [B, T, H, V] and the new state [B, H, K, V].

        The state is decayed before it is read for the correction, so b is the decayed key.
        """
        shared = jnp.repeat(k, self.heads // k.shape[2], axis=2)
        written = (beta[..., None] * shared).astype(k.dtype)
        seen = k if log_decay is None else (jnp.exp(log_decay)[..., None] * shared).astype(k.dtype)
        return delta_rule(
            q,
            written,
            v,
            None,
            seen,
            log_decay,
            scale=k.shape[3] ** -0.5,
            initial_state=state,
            implementation=self.implementation.get("delta_rule"),
            **seq.documents(),
        )


def unit(x: jax.Array) -> jax.Array:
    """x [..., K] divided by its Euclidean norm, computed in float32; the result has the dtype of x."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + L2_EPS)).astype(x.dtype)
