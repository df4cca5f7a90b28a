"""Short causal convolution, one token after another: the definition that every other backend is tested against."""

import jax
import jax.numpy as jnp

from seqmodels.kernels.segments import previous_segment


def supports(platform: str, **facts: object) -> str | None:
    """Why this backend cannot serve the call; None: it can (it always can)."""
    return None


def short_conv(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    *,
    activation: str | None,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    initial_segment: jax.Array | None,
    mask: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """See `kernels.short_conv.short_conv`. Computes in the widest dtype of its arguments, including float64."""
    batch, length, channels = x.shape
    taps = weight.shape[0]
    dtype = jnp.result_type(x, weight, jnp.float32)
    if initial_state is None:
        initial_state = jnp.zeros((batch, taps - 1, channels), dtype)
    if mask is None:
        mask = jnp.ones((batch, length), bool)
    if segment_ids is None:
        segment_ids = jnp.zeros((batch, length), jnp.int32)
        initial_segment = None
    if initial_segment is None:  # the state belongs to the document of the first real token
        initial_segment = previous_segment(segment_ids, None, mask)[:, 0]

    def step(carry, token):
        history, segment = carry
        x_t, segment_t, real = token
        same = segment_t == segment
        window = jnp.concatenate([jnp.where(same[:, None, None], history, 0), x_t[:, None]], axis=1)
        y_t = jnp.einsum("bwe,we->be", window, weight.astype(dtype), precision="highest")
        if bias is not None:
            y_t = y_t + bias
        if activation == "silu":
            y_t = jax.nn.silu(y_t)
        history = jnp.where(real[:, None, None], window[:, 1:], history)
        segment = jnp.where(real, segment_t, segment)
        return (history, segment), jnp.where(real[:, None], y_t, 0)

    tokens = (jnp.where(mask[..., None], x, 0).astype(dtype), segment_ids, mask)
    carry = (initial_state.astype(dtype), initial_segment)
    (history, _), y = jax.lax.scan(step, carry, jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), tokens))
    return jnp.swapaxes(y, 0, 1).astype(x.dtype), history
