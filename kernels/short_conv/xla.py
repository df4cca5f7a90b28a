"""Short causal convolution as W shifted multiply-adds, which XLA fuses into one pass over the tokens.

Only x is saved for the backward pass, in its own dtype; the sum before the activation is recomputed. Every shift is a
`lax.pad` with negative padding at the other end. XLA can fuse such a pad; a concatenation would be a copy in memory.
"""

import functools
from typing import Protocol

import jax
import jax.numpy as jnp

from seqmodels.kernels.segments import resets

CHUNK = 16  # tokens in the first stage of the sums for the weights' gradients; from 32 on XLA reduces differently


class Convolution(Protocol):
    """y [B, T, E] of x without padding, from a state [B, W - 1, E] or zeros; `reach` as of `tokens_in_reach`."""

    def __call__(
        self,
        activation: str | None,
        x: jax.Array,
        weight: jax.Array,
        bias: jax.Array | None,
        state: jax.Array | None,
        reach: jax.Array | None,
        /,
    ) -> jax.Array: ...


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
    """See `kernels.short_conv.short_conv`. Sums in float32 (float64 for float64 arguments)."""
    return convolve_real(_convolve, x, weight, bias, activation, initial_state, segment_ids, initial_segment, mask)


def convolve_real(
    kernel: Convolution,
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    activation: str | None,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    initial_segment: jax.Array | None,
    mask: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The convolution of the real tokens; `kernel` is `_convolve` or a function like it."""
    documents = segment_ids, initial_segment
    if mask is None:
        return convolve(kernel, x, weight, bias, activation, initial_state, *documents, last=None)

    # Padding has no effect: move the real tokens to the front, convolve them as one sequence, move the results back.
    order = jnp.argsort(~mask, axis=1, stable=True)
    x = jnp.take_along_axis(jnp.where(mask[..., None], x, 0), order[..., None], axis=1)
    if segment_ids is not None:
        segment_ids = jnp.take_along_axis(segment_ids, order, axis=1)
    count = jnp.sum(mask, axis=1, dtype=jnp.int32)
    documents = segment_ids, initial_segment
    y, final_state = convolve(kernel, x, weight, bias, activation, initial_state, *documents, last=count)
    rank = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    y = jnp.take_along_axis(y, rank[..., None], axis=1)
    return jnp.where(mask[..., None], y, 0), final_state


def convolve(
    kernel: Convolution,
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    activation: str | None,
    initial_state: jax.Array | None,
    segment_ids: jax.Array | None,
    initial_segment: jax.Array | None,
    last: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The convolution without padding. `last` [B] is the number of tokens after which the final state is taken."""
    rows = weight.shape[0] - 1
    dtype = jnp.result_type(x, weight, jnp.float32)
    reset = resets(segment_ids, initial_segment, mask=None)
    reach = None if reset is None else tokens_in_reach(reset, rows)
    state = None if initial_state is None else initial_state.astype(dtype)
    y = kernel(activation, x, weight, bias, state, reach)
    if state is None:
        state = jnp.zeros((x.shape[0], rows, x.shape[2]), dtype)
    return y, final_history(x, state, reach, last)


def tokens_in_reach(reset: jax.Array, rows: int) -> jax.Array:
    """[B, T]: how many earlier inputs of its own document each token sees, at most W - 1, the state's rows included."""
    index = jnp.arange(reset.shape[1], dtype=jnp.int32)
    start = jax.lax.cummax(jnp.where(reset, index, -rows), axis=1)
    return jnp.minimum(index - start, rows)


def final_history(x: jax.Array, state: jax.Array, reach: jax.Array | None, last: jax.Array | None) -> jax.Array:
    """The last W-1 inputs [B, W-1, E] of the last token's document, zeros where it has fewer."""
    rows = state.shape[1]
    if last is None:
        history = jnp.concatenate([state, x[:, -rows:].astype(state.dtype)], axis=1)[:, -rows:]
        reach = None if reach is None else reach[:, -1:]
    else:
        index = last[:, None] + jnp.arange(rows)  # into the state's rows followed by the tokens
        old = jnp.take_along_axis(state, jnp.minimum(index, rows - 1)[..., None], axis=1)
        new = jnp.take_along_axis(x, jnp.maximum(index - rows, 0)[..., None], axis=1)
        history = jnp.where((index < rows)[..., None], old, new.astype(state.dtype))
        if reach is not None:  # before the first token, all rows of the state are in reach
            reach = jnp.take_along_axis(jnp.pad(reach, ((0, 0), (1, 0)), constant_values=rows), last[:, None], axis=1)
    return history if reach is None else _within(history, reach, jnp.arange(rows)[::-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(activation, x, weight, bias, state, reach):
    """y [B, T, E]. state [B, W - 1, E] float32 or None; reach [B, T] as of `tokens_in_reach`, or None."""
    total = _sum(x, weight, bias, state, reach)
    return (jax.nn.silu(total) if activation == "silu" else total).astype(x.dtype)


def _convolve_fwd(activation, *inputs):
    return _convolve(activation, *inputs), inputs


def _convolve_bwd(activation, inputs, dy):
    x, weight, bias, state, reach = inputs
    rows = weight.shape[0] - 1
    dsum = _sum_gradient(activation, *inputs, dy)
    dstate = None if state is None else state_gradient(activation, *inputs, dy).astype(state.dtype)
    taps = weight.astype(dsum.dtype)
    # This is the only array besides dx that this pass writes. It has the dtype of x; without the barrier XLA would
    # write it in float32.
    rounded = jax.lax.optimization_barrier(dsum.astype(x.dtype))
    dx = taps[rows] * rounded
    for d in range(1, rows + 1):
        later = None if reach is None else _shift(reach, -d, d)
        dx = _add_within(dx, taps[rows - d] * _shift(rounded, -d, d), later, d)
    dsum = rounded.astype(dsum.dtype)
    products = [dsum * x]
    for d in range(1, rows + 1):  # a product with 0 is safe: a non-finite x spoils these sums anyway
        seen = 1 if reach is None else (reach >= d)[..., None].astype(dsum.dtype)
        products.insert(0, dsum * _earlier(x, state, d) * seen)
    *dweight, dbias = _sums([*products, dsum])
    dbias = None if bias is None else dbias.astype(bias.dtype)
    return dx.astype(x.dtype), jnp.stack(dweight).astype(weight.dtype), dbias, dstate, None


_convolve.defvjp(_convolve_fwd, _convolve_bwd)


def _sum(x, weight, bias, state, reach):
    """bias + sum_d weight[W-1-d] x_{t-d}, [B, T, E] float32."""
    rows = weight.shape[0] - 1
    taps = weight.astype(jnp.result_type(x, weight, jnp.float32))
    total = taps[rows] * x
    for d in range(1, rows + 1):
        total = _add_within(total, taps[rows - d] * _earlier(x, state, d), reach, d)
    return total if bias is None else total + bias


def _sum_gradient(activation, x, weight, bias, state, reach, dy):
    """The gradient of `_sum`'s result, given that of y."""
    if activation is None:
        return dy.astype(jnp.result_type(x, weight, jnp.float32))
    total = _sum(x, weight, bias, state, reach)
    gate = jax.nn.sigmoid(total)
    return dy * gate * (1 + total * (1 - gate))


def state_gradient(
    activation: str | None,
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    state: jax.Array,
    reach: jax.Array | None,
    dy: jax.Array,
) -> jax.Array:
    """The gradient of the state [B, W - 1, E], which only the first W - 1 tokens see."""
    rows = state.shape[1]
    x, dy, reach = x[:, :rows], dy[:, :rows], None if reach is None else reach[:, :rows]
    dsum = _sum_gradient(activation, x, weight, bias, state, reach, dy)
    taps, length = weight.astype(dsum.dtype), x.shape[1]
    return sum(taps[rows - d] * _shift(_within(dsum, reach, d), rows - d, d - length) for d in range(1, rows + 1))


def _sums(arrays):
    """Each array's sum [E] over rows and tokens."""
    return jax.lax.platform_dependent(*arrays, cpu=_sums_apart, default=_sums_together)


def _sums_apart(*arrays):
    """One reduction for each array: a CPU vectorises this, but not `_sums_together`."""
    return [jnp.sum(v, axis=(0, 1)) for v in arrays]


def _sums_together(*arrays):
    """One reduction of all arrays, over a few tokens first: a GPU or TPU then reads shared inputs only once."""
    batch, length, channels = arrays[0].shape
    chunk = min(CHUNK, length)
    arrays = [_shift(v, 0, -length % chunk).reshape(batch, -1, chunk, channels) for v in arrays]
    return _reduce(_reduce(arrays, (2,)), (0, 1))


def _reduce(arrays, axes):
    """The arrays' sums over these axes, as one operation."""
    zeros = [jnp.zeros((), v.dtype) for v in arrays]
    return jax.lax.reduce(arrays, zeros, lambda x, y: [a + b for a, b in zip(x, y, strict=True)], axes)


def _earlier(x, state, distance):
    """The input `distance` tokens before each token, [B, T, E], from x or, before its start, from the state."""
    earlier = _shift(x, distance, -distance)
    if state is not None:
        rows, length = state.shape[1], x.shape[1]
        earlier = earlier + _shift(state, distance - rows, length - distance)
    return earlier


def _add_within(total, term, reach, distance):
    """total + term where a token sees the input `distance` tokens earlier, else total.

    This is not total + where(.., term, 0): XLA would write the zeros to memory once for all layers, and every layer
    would read them.
    """
    added = total + term
    return added if reach is None else jnp.where((reach >= distance)[..., None], added, total)


def _within(x, reach, distance):
    """x where a token sees the input `distance` tokens earlier, else 0."""
    return x if reach is None else jnp.where((reach >= distance)[..., None], x, 0)


def _shift(x, before, after):
    """x [B, T, ...] with `before` and `after` rows of zeros added. A negative number removes rows."""
    others = [(0, 0, 0)] * (x.ndim - 2)
    return jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (before, after, 0), *others))
