"""A stack of causal convolutions with growing dilation and gates, after WaveNet (van den Oord et al. 2016, 1609.03499).

u = convolution of x over the tokens t, t - d, ..., t - (W - 1) d, channel by channel
x <- x + (tanh(u W_f) * sigmoid(u W_g)) W_o        for each dilation d; the branch returns what all of them add

A convolution of all channels is replaced by one of each channel and the matrices of the gates. The state are the tokens
that a later token can see: their number is fixed, and what is further back is forgotten.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from seqmodels.branch import Branch, State, real
from seqmodels.fields.cnn import CNN
from seqmodels.kernels.arrays import shifted
from seqmodels.layers.parameter import normal, parameter, residual_std, uniform
from seqmodels.sequence import Sequence


def dilated_conv(x: jax.Array, weight: jax.Array, dilation: int, history: jax.Array, positions: jax.Array) -> jax.Array:
    """y_t = sum_k weight[W - 1 - k] x_{t - k d}, channel by channel, over the tokens of t's document.

    Args:
        x: [B, T, D] without padding between tokens; weight: [W, D]; dilation: d.
        history: [B, (W - 1) d, D] float32, the tokens before x.
        positions: [B, T], number of tokens before each one in its document.

    Returns:
        [B, T, D] in the dtype of x.
    """
    y = weight[-1] * x.astype(history.dtype)
    for back in range(1, len(weight)):
        distance = back * dilation
        inside = (positions >= distance)[..., None]
        earlier = shifted(history[:, history.shape[1] - distance :], x)
        y = y + weight[-1 - back] * jnp.where(inside, earlier, 0)
    return y.astype(x.dtype)


class Cnn(Branch):
    """The mixer. Its options are declared in seqmodels/fields/cnn.py."""

    conv: int = CNN["conv"]
    dilations: tuple[int, ...] = CNN["dilations"]

    options = CNN

    @nn.nowrap
    def init_state(self, batch: int, max_length: int | None = None) -> dict[str, jax.Array]:
        """conv_i [B, (W - 1) d, D] float32, the last inputs of the convolution with the i-th dilation d."""
        sizes = {f"conv_{i}": (self.conv - 1) * dilation for i, dilation in enumerate(self.dilations)}
        return {name: jnp.zeros((batch, size, self.width), jnp.float32) for name, size in sizes.items()}

    @nn.compact
    def __call__(self, x: jax.Array, seq: Sequence, state: State = None) -> tuple[jax.Array, State]:
        """x [B, T, D] to y [B, T, D] and the new state."""
        state = self.init_state(x.shape[0]) if state is None else state
        x, positions = real(x, seq, self.dtype), seq.positions
        if seq.mask is not None:  # real tokens to the front: a convolution then never meets padding
            order = jnp.argsort(~seq.mask, axis=1, stable=True)
            x = jnp.take_along_axis(x, order[..., None], axis=1)
            positions = jnp.take_along_axis(positions, order, axis=1)
        y, new = jnp.zeros_like(x), {}
        for i, dilation in enumerate(self.dilations):
            inputs, history = x + y, state[f"conv_{i}"]
            y = y + self.convolve(i, dilation, inputs, history, positions)
            new[f"conv_{i}"] = last_tokens(history, inputs, seq.mask)
        if seq.mask is not None:
            rank = jnp.maximum(jnp.cumsum(seq.mask, axis=1) - 1, 0)
            y = jnp.where(seq.mask[..., None], jnp.take_along_axis(y, rank[..., None], axis=1), 0)
        return y, new

    @nn.nowrap
    def convolve(self, number: int, dilation: int, x: jax.Array, history: jax.Array, positions: jax.Array) -> jax.Array:
        """What one convolution with its gates adds to x [B, T, D]."""
        width, axes = self.width, ("embed", None, "inner")
        taps = parameter(self, f"taps_{number}", (self.conv, width), ("conv", "inner"), uniform(self.conv**-0.5))
        gates = self.matrix(f"gates_{number}", (width, 2, width), axes, normal(width**-0.5))
        out = normal(residual_std(self.layers * len(self.dilations)))
        outward = self.matrix(f"out_{number}", (width, width), ("inner", "embed"), out)
        u = checkpoint_name(dilated_conv(x, taps, dilation, history, positions), "stream")
        f, g = jnp.moveaxis(checkpoint_name(jnp.einsum("btd,dge->btge", u, gates), "projected"), 2, 0)
        return (jnp.tanh(f) * jax.nn.sigmoid(g)) @ outward


def last_tokens(history: jax.Array, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The last R tokens of history [B, R, D] and then x [B, T, D], whose first sum(mask) tokens are real."""
    kept, tokens = history.shape[1], jnp.concatenate([history, x.astype(history.dtype)], axis=1)
    if mask is None:
        return tokens[:, x.shape[1] :]
    count = jnp.sum(mask, axis=1, dtype=jnp.int32)
    return jnp.take_along_axis(tokens, (count[:, None] + jnp.arange(kept))[..., None], axis=1)
