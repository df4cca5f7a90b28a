"""Which keys a query sees, as one boolean mask: the rules of causality, windows, documents and empty slots."""

import jax
import jax.numpy as jnp


def visible(
    shape: tuple[int, int],
    *,
    causal: bool,
    window: int | None,
    segment_ids: jax.Array | None,
    key_segment_ids: jax.Array | None,
    key_mask: jax.Array | None,
    positions: jax.Array | None,
    key_positions: jax.Array | None,
) -> jax.Array | None:
    """[B or 1, T, S] bool for `shape` (T, S), True where query t sees key s. None: every query sees every key.

    The other arguments are those of `kernels.attention.attention`.
    """
    queries, keys = shape
    rules = []
    if causal or window is not None:
        rows = jnp.arange(queries)[None] if positions is None else positions
        distance = rows[:, :, None] - (jnp.arange(keys) if key_positions is None else key_positions[:, None, :])
        if causal:
            rules.append(distance >= 0)
        if window is not None:
            rules.append(distance < window)
    if segment_ids is not None and key_segment_ids is not None:
        rules.append(segment_ids[:, :, None] == key_segment_ids[:, None, :])
    if key_mask is not None:
        rules.append(key_mask[:, None, :])
    if not rules:
        return None
    together = rules[0]
    for rule in rules[1:]:
        together = together & rule
    return jnp.broadcast_to(together, (together.shape[0], queries, keys))
