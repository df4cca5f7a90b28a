"""Short causal convolution as W shifted multiply-adds, which XLA fuses into one pass over the tokens."""

import jax
import jax.numpy as jnp

from kernels.segments import resets


def supports(platform: str, **facts) -> str | None:
    """Why this backend cannot serve the call; None: it can (it always can)."""
    return None


def short_conv(x, weight, bias, *, activation, initial_state, segment_ids, initial_segment, mask):
    """See `kernels.short_conv.short_conv`. Sums in float32 (float64 for float64 arguments)."""
    if mask is None:
        return convolve(x, weight, bias, activation, initial_state, segment_ids, initial_segment, last=None)

    # Padding is the identity: move the real tokens to the front, convolve them as one sequence, move the results back.
    order = jnp.argsort(~mask, axis=1, stable=True)
    x = jnp.take_along_axis(jnp.where(mask[..., None], x, 0), order[..., None], axis=1)
    if segment_ids is not None:
        segment_ids = jnp.take_along_axis(segment_ids, order, axis=1)
    count = jnp.sum(mask, axis=1, dtype=jnp.int32)
    y, final_state = convolve(x, weight, bias, activation, initial_state, segment_ids, initial_segment, last=count)
    rank = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    y = jnp.take_along_axis(y, rank[..., None], axis=1)
    return jnp.where(mask[..., None], y, 0), final_state


def convolve(x, weight, bias, activation, initial_state, segment_ids, initial_segment, last):
    """The convolution without padding; `last [B]` is the number of tokens after which the final state is taken."""
    length = x.shape[1]
    taps = weight.shape[0]
    dtype = jnp.result_type(x, weight, jnp.float32)
    weight = weight.astype(dtype)
    inputs = before(x, initial_state, taps - 1, dtype)  # [B, W-1 + T, E]
    runs = None if segment_ids is None else run_numbers(segment_ids, initial_segment, taps - 1)

    def tap(k):
        shifted = inputs[:, k : k + length]
        if runs is None or k == taps - 1:
            return shifted
        same = runs[:, k : k + length] == runs[:, taps - 1 :]
        return jnp.where(same[..., None], shifted, 0)

    y = sum(weight[k] * tap(k) for k in range(taps))
    if bias is not None:
        y = y + bias
    if activation == "silu":
        y = jax.nn.silu(y)
    return y.astype(x.dtype), final_history(inputs, runs, taps - 1, last)


def before(x, initial_state, rows, dtype):
    """Put the state's rows [B, W-1, E] (None: zeros) before the tokens."""
    x = x.astype(dtype)
    if initial_state is None:
        return jnp.pad(x, ((0, 0), (rows, 0), (0, 0)))
    return jnp.concatenate([initial_state.astype(dtype), x], axis=1)


def run_numbers(segment_ids, initial_segment, rows):
    """Number [B, W-1 + T] of segment changes up to each row; the state's rows are run 0.

    Runs and not ids are compared, so that a document which comes back after another one starts anew.
    """
    changed = resets(segment_ids, initial_segment, mask=None)
    return jnp.pad(jnp.cumsum(changed, axis=1, dtype=jnp.int32), ((0, 0), (rows, 0)))


def final_history(inputs, runs, rows, last):
    """The last W-1 inputs [B, W-1, E] of the last token's run, zeros where it is shorter."""
    if last is None:
        history = inputs[:, -rows:]
        run = None if runs is None else runs[:, -rows:]
    else:
        index = last[:, None] + jnp.arange(rows)
        history = jnp.take_along_axis(inputs, index[..., None], axis=1)
        run = None if runs is None else jnp.take_along_axis(runs, index, axis=1)
    if run is None:
        return history
    return jnp.where((run == run[:, -1:])[..., None], history, 0)
