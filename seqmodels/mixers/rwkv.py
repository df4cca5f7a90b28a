"""The time mix of RWKV-4 (Peng et al. 2023, arXiv 2305.13048): an average over the past whose weights decay.

k, v, r = mixes of x_t and x_{t-1} times W_k, W_v, W_r;  y_t = (sigmoid(r_t) wkv_t) W_o, with wkv as in wkv.py

The channel mix of a block is a branch of its own, channels/rwkv_channel.py.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from seqmodels.branch import Branch, State, real
from seqmodels.fields.rwkv import RWKV
from seqmodels.kernels.segments import resets
from seqmodels.layers.parameter import Init, parameter, zeros
from seqmodels.layers.token_shift import mix, ramp, token_shift
from seqmodels.mixers.wkv import empty, wkv
from seqmodels.sequence import Sequence

# Operations of a token and channel: joining two stretches, about twice, and the readout.
WKV_FLOPS = 2 * 10 + 10


def fresh_decay(height: float) -> Init:
    """log w from -5 to 3 over the channels, as in the authors' code; the higher the block, the more are near -5.

    Args:
        height: of the block in the stack, from 0 (the lowest) to 1 (the highest).
    """

    def init(key, shape, dtype=jnp.float32):
        place = jnp.arange(shape[0], dtype=dtype) / max(shape[0] - 1, 1)
        return -5 + 8 * place ** (0.7 + 1.3 * height)

    return init


def fresh_bonus(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """log 0.3, and half a step up or down in turn, as in the authors' code."""
    zigzag = (jnp.arange(shape[0]) + 1) % 3 - 1
    return jnp.log(0.3) + 0.5 * zigzag.astype(dtype)


class Rwkv(Branch):
    """RWKV-4's time mix. Its options are declared in seqmodels/fields/rwkv.py."""

    hidden: int = RWKV["hidden"]

    options = RWKV
    operations = ("short_conv",)

    @property
    def inner(self) -> int:
        """E, channels of the average."""
        return self.hidden or self.width

    @nn.nowrap
    def init_state(self, batch: int, max_length: int | None = None) -> dict[str, jax.Array]:
        """shift [B, 1, D], the last token; num, den and max [B, E], the sums of wkv.py; all float32."""
        sums = {name: jnp.zeros((batch, self.inner), jnp.float32) for name in ("num", "den", "max")}
        return dict(shift=jnp.zeros((batch, 1, self.width), jnp.float32), **empty(sums))

    @nn.nowrap
    def flops(self, length: int) -> float:
        """Operations of the sums."""
        return WKV_FLOPS * self.inner

    @nn.compact
    def __call__(self, x: jax.Array, seq: Sequence, state: State = None) -> tuple[jax.Array, State]:
        """x [B, T, D] to y [B, T, D] and the new state."""
        state = self.init_state(x.shape[0]) if state is None else state
        x = real(x, seq, self.dtype)
        before, shift = token_shift(x, state["shift"], seq, self.implementation.get("short_conv"))

        def project(name, init, power=1.0, added=0.0):
            fresh = ramp(power * (1 - self.below / self.layers), added)
            share = parameter(self, f"mix_{name}", (self.width,), ("embed",), fresh, dtype=self.dtype)
            weight = self.matrix(f"{name}_proj", (self.width, self.inner), ("embed", "inner"), init)
            return checkpoint_name(mix(x, before, share) @ weight, "projected")

        height = self.below / max(self.layers - 1, 1)
        k = project("key", zeros)
        v = project("value", nn.initializers.orthogonal(), added=0.3 * height)
        r = project("receptance", zeros, power=0.5)
        decay = parameter(self, "decay", (self.inner,), ("inner",), fresh_decay(height), group="ssm")
        bonus = parameter(self, "bonus", (self.inner,), ("inner",), fresh_bonus, group="ssm")
        sums = {name: state[name] for name in ("num", "den", "max")}
        y, sums = wkv(k, v, -jnp.exp(decay), bonus, sums, resets(**seq.documents()), seq.mask)
        y = jax.nn.sigmoid(r) * checkpoint_name(y.astype(self.dtype), "scan")
        out = self.matrix("out_proj", (self.inner, self.width), ("inner", "embed"), zeros)
        return y @ out, dict(shift=shift, **sums)
