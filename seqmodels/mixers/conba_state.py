"""Conba's states: Mamba's recurrence, the delayed state and its scaling, by chunks of time.

    s_t = exp(dt_t A) s_{t-1} + (dt_t u_t) B_t + w_t          Mamba's state, and process noise w
    d_t = s_t + F s_{t-tau} + f                               the delayed state
    x_t = d_t * swish(Z d_t + g)                              its scaling
    y_t = x_t C_t                                             the readout; x_{t-1} C_t is the one before token t

The recurrence is linear, and everything after it is computed for each token by itself. So a chunk needs the last states
before it only. The states of one chunk exist at a time; for the backward pass they are computed again.
Inside this file states are [..., N, E], so that the innermost axis is long.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from seqmodels.kernels.arrays import expand_to, join_time, split_time
from seqmodels.kernels.dispatch import platforms
from seqmodels.kernels.segments import forget
from seqmodels.kernels.selective_scan.xla import linear_recurrence
from seqmodels.kernels.short_conv.xla import tokens_in_reach

CHUNK = 64  # tokens whose states are held at a time
UNIT = 1.2784645  # swish(UNIT) = 1


@struct.dataclass
class Plant:
    """What maps inputs to readouts, beside what each token brings.

    Attributes:
        A: [E, N] float32, negative. dt_proj: [R, E] and dt_bias: [E]: the step is softplus(delta dt_proj + dt_bias).
        F: [N, N] and f: [N], of the delayed state.
        Z: [N, N] and g: [N], of the scaling; None with scaling "off".
        delay: tau. scaling: "gate", "literal" or "off". noise: standard deviation of w.
    """

    A: jax.Array
    dt_proj: jax.Array
    dt_bias: jax.Array
    F: jax.Array
    f: jax.Array
    Z: jax.Array | None = None
    g: jax.Array | None = None
    delay: int = struct.field(pytree_node=False, default=1)
    scaling: str = struct.field(pytree_node=False, default="gate")
    noise: float = struct.field(pytree_node=False, default=0.0)


@struct.dataclass
class Memory:
    """What the next token needs of those before it.

    Attributes:
        ssm: [B, E, N] the state s. lag: [B, tau, E, N] the last tau states, oldest first, with zeros where the document
            has fewer; None without a delay. scaled: [B, E, N] the scaled state x; None if nobody asks for readouts
            before the token.
    """

    ssm: jax.Array
    lag: jax.Array | None = None
    scaled: jax.Array | None = None

    def by_name(self) -> dict[str, jax.Array]:
        """The arrays that there are."""
        arrays = dict(ssm=self.ssm, lag=self.lag, scaled=self.scaled)
        return {name: array for name, array in arrays.items() if array is not None}


@struct.dataclass
class Tokens:
    """One array a token, [B, T, ...]: u [E], delta [R], B [N], C [N], and whether a document begins with it."""

    u: jax.Array
    delta: jax.Array
    B: jax.Array
    C: jax.Array
    reset: jax.Array | None = None


def mix(matrix: jax.Array, states: jax.Array) -> jax.Array:
    """matrix [M, N] times states [..., N, E]; in full float32, also where the default is TF32 or bfloat16."""
    return jnp.einsum("mn,...ne->...me", matrix, states, precision="highest")


def rescale(states: jax.Array, Z: jax.Array | None, g: jax.Array | None, scaling: str) -> jax.Array:
    """R of states [..., N, E]: x * swish(Z x + g) ("gate"), swish(Z x + g) ("literal") or x ("off")."""
    if Z is None or g is None or scaling == "off":
        return states
    factor = jax.nn.silu(mix(Z, states) + g[:, None])
    return factor if scaling == "literal" else states * factor


def read(states: jax.Array, C: jax.Array) -> jax.Array:
    """Sum over N of states [..., N, E] times C [..., N]: [..., E]."""
    return jnp.sum(states * C[..., None], axis=-2)


def read_states(
    tokens: Tokens,
    plant: Plant,
    memory: Memory,
    mask: jax.Array | None = None,
    key: jax.Array | None = None,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array | None, Memory]:
    """The readouts of a sequence, by chunks of time.

    Args:
        mask: [B, T], False on padding, which changes nothing.
        key: of the process noise; None: no noise.
        chunk: tokens whose states are held at a time; None: CHUNK. It affects only rounding, and which noise is drawn.

    Returns:
        y [B, T, E] after each token; the readout before it, x_{t-1} C_t, [B, T, E], if the memory has `scaled`, else
        None; and the memory after the last token. All are float32 (float64 for float64 parameters).
    """
    length = tokens.u.shape[1]
    place = Places(mask)
    tokens = jax.tree.map(place.to_front, tokens)
    count = jnp.full(tokens.u.shape[:1], length) if mask is None else jnp.sum(mask, axis=1)
    size = min(chunk or CHUNK, length)
    reach = None if tokens.reset is None else tokens_in_reach(tokens.reset, plant.delay)
    pieces = split_time((tokens, None if reach is None else reach >= plant.delay), size, time_first=True)
    starts = size * jnp.arange(-(-length // size))
    reals = jnp.clip(count - starts[:, None], 0, size)
    carry = _inside(memory)
    body = jax.checkpoint(functools.partial(_chunk, plant, key), prevent_cse=False)
    carry, readouts = jax.lax.scan(body, carry, (pieces, reals, starts // size))
    y, before = jax.tree.map(lambda r: place.back(join_time(r, length, time_first=True)), readouts)
    return y, before, _outside(carry, _last(reach, count, plant.delay))


def _chunk(plant: Plant, key: Any, carry: Any, piece: Any) -> tuple[Any, Any]:
    """One chunk: arrays [Q, B, ...], real tokens first. carry: state, lag [tau, B, N, E], scaled state [B, N, E]."""
    (tokens, within), real, index = piece
    state, lag, scaled = carry
    size, dtype = len(tokens.u), plant.A.dtype
    here = jnp.arange(size)[:, None] < real
    step = jax.nn.softplus((tokens.delta @ plant.dt_proj).astype(dtype) + plant.dt_bias)
    step = jnp.where(here[..., None], step, 0)
    write = (step * tokens.u)[..., None, :] * tokens.B.astype(dtype)[..., None]
    if key is not None:
        noise = jax.random.normal(jax.random.fold_in(key, index), write.shape, dtype)
        write = write + jnp.where(expand_to(here, write.ndim), plant.noise * noise, 0)
    states = recurrence(jnp.exp(step[..., None, :] * plant.A.T), write, state, tokens.reset)
    lagged = states
    if lag is not None:
        history = jnp.concatenate([lag, states])
        lagged = history[:size]
        lagged = lagged if within is None else jnp.where(expand_to(within, lagged.ndim), lagged, 0)
        lag = _rows(history, real, plant.delay)
    x = rescale(states + mix(plant.F, lagged) + plant.f[:, None], plant.Z, plant.g, plant.scaling)
    C, before = tokens.C.astype(dtype), None
    if scaled is not None:
        around = jnp.concatenate([scaled[None], x])
        before = read(forget(around[:-1], tokens.reset), C)
        scaled = _rows(around, real, 1)[0]
    return (states[-1], lag, scaled), (read(x, C), before)


def _rows(history: jax.Array, start: jax.Array, rows: int) -> jax.Array:
    """Rows start, start + 1, ... of history [T, B, ...], for start [B]: [rows, B, ...]."""
    index = start + jnp.arange(rows)[:, None]
    return jnp.take_along_axis(history, expand_to(index, history.ndim), axis=0)


def _last(reach: jax.Array | None, count: jax.Array, delay: int) -> jax.Array | None:
    """[B, tau]: which of the last tau states belong to the document of the last real token. None: all do."""
    if reach is None or not delay:
        return None
    # before the first token, all rows of the memory are in reach
    reach = jnp.take_along_axis(jnp.pad(reach, ((0, 0), (1, 0)), constant_values=delay), count[:, None], axis=1)
    return jnp.arange(delay)[::-1] <= reach


def _inside(memory: Memory) -> tuple[Any, Any, Any]:
    """The memory in the layout of this file."""
    lag = None if memory.lag is None else jnp.moveaxis(memory.lag, 1, 0)
    return jax.tree.map(lambda s: jnp.swapaxes(s, -1, -2), (memory.ssm, lag, memory.scaled))


def _outside(carry: tuple[Any, Any, Any], kept: jax.Array | None) -> Memory:
    """The inverse of `_inside`; states of the lag that are not `kept` are zero."""
    ssm, lag, scaled = jax.tree.map(lambda s: jnp.swapaxes(s, -1, -2), carry)
    if lag is not None:
        lag = jnp.moveaxis(lag, 0, 1)
        lag = lag if kept is None else jnp.where(expand_to(kept, lag.ndim), lag, 0)
    return Memory(ssm, lag, scaled)


class Places:
    """Moves real tokens to the front of their row, and results back to their places. `mask` [B, T] or None."""

    def __init__(self, mask: jax.Array | None) -> None:
        self.mask = mask
        if mask is not None:
            self.order = jnp.argsort(~mask, axis=1, stable=True)
            self.rank = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)

    def to_front(self, x: jax.Array) -> jax.Array:
        """x [B, T, ...] with the real tokens first, in their order."""
        return x if self.mask is None else jnp.take_along_axis(x, expand_to(self.order, x.ndim), axis=1)

    def back(self, x: jax.Array) -> jax.Array:
        """x [B, T, ...] of tokens that are real first, at the tokens' places; zero on padding."""
        if self.mask is None:
            return x
        placed = jnp.take_along_axis(x, expand_to(self.rank, x.ndim), axis=1)
        return jnp.where(expand_to(self.mask, x.ndim), placed, 0)


def _states(decay, write, state, reset, reverse=False):
    """s_t = decay_t s_{t-1} + write_t: one after the other on a CPU, which is quicker there; else all at once."""

    def sequential(decay, write, state, reset):
        def step(state, token):
            decay, write, reset = token
            state = decay * forget(state, reset) + write
            return state, state

        return jax.lax.scan(step, state, (decay, write, reset), reverse=reverse)[1]

    if platforms() == ("cpu",):  # spares the time to trace the other
        return sequential(decay, write, state, reset)
    associative = functools.partial(linear_recurrence, reverse=reverse)
    return jax.lax.platform_dependent(decay, write, state, reset, cpu=sequential, default=associative)


@jax.custom_vjp
def recurrence(decay: jax.Array, write: jax.Array, state: jax.Array, reset: jax.Array | None) -> jax.Array:
    """s_t = decay_t s_{t-1} + write_t from `state` [B, ...] on, for [T, B, ...]; where reset [T, B], s_t = write_t."""
    return _states(decay, write, state, reset)


def _recurrence_fwd(decay, write, state, reset):
    states = _states(decay, write, state, reset)
    return states, (decay, state, states, reset)


def _recurrence_bwd(kept, dstates):
    """The same recurrence backwards in time; a gradient, too, stays in its document."""
    decay, state, states, reset = kept
    later = jnp.concatenate([decay[1:], jnp.ones_like(decay[:1])])
    ends = None if reset is None else jnp.concatenate([reset[1:], jnp.zeros_like(reset[:1])])
    later = forget(later, ends)  # that of the next document's first token may be NaN
    dwrite = _states(later, dstates, jnp.zeros_like(state), ends, reverse=True)
    before = forget(jnp.concatenate([state[None], states[:-1]]), reset)
    dstate = forget(decay[0] * dwrite[0], None if reset is None else reset[0])
    return dwrite * before, dwrite, dstate, None


recurrence.defvjp(_recurrence_fwd, _recurrence_bwd)
