"""The channel mix of RWKV-4 (Peng et al. 2023, arXiv 2305.13048, eq. 16 to 18): an MLP that sees two tokens.

k, r = mixes of x_t and x_{t-1} times W_k, W_r;  y_t = sigmoid(r_t) (relu(k_t)^2 W_v)
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from seqmodels.branch import Branch, State, real
from seqmodels.fields.rwkv_channel import RWKV_CHANNEL
from seqmodels.layers.parameter import parameter, zeros
from seqmodels.layers.token_shift import mix, ramp, token_shift
from seqmodels.sequence import Sequence


class RwkvChannel(Branch):
    """RWKV-4's channel mix. Its options are declared in seqmodels/fields/rwkv_channel.py."""

    hidden: int = RWKV_CHANNEL["hidden"]

    options = RWKV_CHANNEL
    operations = ("short_conv",)

    @nn.nowrap
    def init_state(self, batch: int, max_length: int | None = None) -> jax.Array:
        """The last token, [B, 1, D] float32."""
        return jnp.zeros((batch, 1, self.width), jnp.float32)

    @nn.compact
    def __call__(self, x: jax.Array, seq: Sequence, state: State = None) -> tuple[jax.Array, State]:
        """x [B, T, D] to y [B, T, D] and the new state."""
        state = self.init_state(x.shape[0]) if state is None else state
        x, hidden = real(x, seq, self.dtype), self.hidden or 4 * self.width
        before, state = token_shift(x, state, seq, self.implementation.get("short_conv"))

        def mixed(name):
            fresh = ramp(1 - self.below / self.layers)
            return mix(x, before, parameter(self, f"mix_{name}", (self.width,), ("embed",), fresh, dtype=self.dtype))

        orthogonal = nn.initializers.orthogonal(max(1.0, hidden / self.width) ** 0.5)
        key = self.matrix("key_proj", (self.width, hidden), ("embed", "mlp"), orthogonal)
        receptance = self.matrix("receptance_proj", (self.width, self.width), ("embed", "inner"), zeros)
        value = self.matrix("value_proj", (hidden, self.width), ("mlp", "embed"), zeros)
        k = checkpoint_name(mixed("key") @ key, "projected")
        r = checkpoint_name(mixed("receptance") @ receptance, "projected")
        return jax.nn.sigmoid(r) * (jnp.square(jax.nn.relu(k)) @ value), state
