"""Next-token cross-entropy, without ever holding the logits of a whole row."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class LossSums(NamedTuple):
    """Sums over tokens, so that micro-batches add up exactly. Scalars, float32."""

    nats: jax.Array  # sum of -log p(target)
    z_squared: jax.Array  # sum of (log of the softmax's denominator)^2
    count: jax.Array  # number of targets


def token_nats(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """-log p(target) in nats and the log-denominator of the softmax, both float32 and of the shape of targets.

    Args:
      logits: [..., V], any float dtype.
      targets: [...] int32.
    """
    logits = logits.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return log_z - chosen, log_z


def next_token_loss(
    logits_of: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array | None = None,
    chunk: int = 0,
) -> LossSums:
    """Cross-entropy sums of a batch, computed `chunk` tokens of each row at a time.

    Only one chunk's logits [B, chunk, V] live at once: the backward pass makes them again. 0, or a chunk as long as the
    row, computes them all together.

    Args:
      logits_of: hidden [B, t, D] -> logits [B, t, V].
      hidden: [B, T, D].
      targets: [B, T] int32.
      weights: [B, T] float, 0 where a token does not count; None counts all.
    """
    batch, length = targets.shape
    weights = jnp.ones(targets.shape, jnp.float32) if weights is None else weights.astype(jnp.float32)

    def sums(h, y, w):
        nats, log_z = token_nats(logits_of(h), y)
        return LossSums((nats * w).sum(), (log_z**2 * w).sum(), w.sum())

    if not 0 < chunk < length:
        return sums(hidden, targets, weights)

    count = -(-length // chunk)

    def chunks(x):  # [B, T, ...] -> [count, B, chunk, ...], the end padded with tokens of weight 0
        x = jnp.pad(x, ((0, 0), (0, count * chunk - length)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(batch, count, chunk, *x.shape[2:]).swapaxes(0, 1)

    def body(total, piece):
        return jax.tree.map(jnp.add, total, jax.checkpoint(sums)(*piece)), None

    zero = LossSums(*(jnp.zeros((), jnp.float32),) * 3)
    return jax.lax.scan(body, zero, (chunks(hidden), chunks(targets), chunks(weights)))[0]
