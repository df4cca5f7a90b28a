"""Conba's states: Mamba's recurrence, the delayed state and its scaling, by chunks of time.

    s_t = exp(dt_t A) s_{t-1} + (dt_t u_t) B_t + w_t          Mamba's state, and process noise w
    d_t = s_t + F s_{t-tau} + f                               the delayed state
    x_t = d_t * swish(Z d_t + g)                              its scaling
    y_t = x_t C_t                                             the readout; x_{t-1} C_t is the one before token t

The recurrence is a linear scan of all E N channels, and everything after it is computed for each token by itself. So a
chunk needs the last states before it only. The states of one chunk exist at a time; for the backward pass they are
computed again. Inside this file states are [..., N, E], so that the innermost axis is long.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from seqmodels.kernels.arrays import expand_to, join_time, shifted, split_time, zero_padding
from seqmodels.kernels.dispatch import platforms
from seqmodels.kernels.segments import forget
from seqmodels.kernels.short_conv.xla import tokens_in_reach
from seqmodels.parallel import linear_scan

CHUNK = 64  # tokens whose states are held at a time, at least
HELD = 2**27  # bytes of these states on an accelerator, where few long chunks are faster
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
    """matrix [M, N] times states [..., N, E]; in full float32, also where the default is TF32 or bfloat16.

    As one product for each token, no state is moved: a product with all of them would first transpose them.
    """
    return jnp.matmul(jnp.broadcast_to(matrix, (*states.shape[:-2], *matrix.shape)), states, precision="highest")


def rescale(states: jax.Array, Z: jax.Array | None, g: jax.Array | None, scaling: str) -> jax.Array:
    """R of states [..., N, E]: x * swish(Z x + g) ("gate"), swish(Z x + g) ("literal") or x ("off")."""
    if Z is None or g is None or scaling == "off":
        return states
    factor = jax.nn.silu(mix(Z, states) + g[:, None])
    return factor if scaling == "literal" else states * factor


def read(states: jax.Array, C: jax.Array) -> jax.Array:
    """Sum over N of states [..., N, E] times C [..., N]: [..., E]."""
    return jnp.sum(states * C[..., None], axis=-2)


def chunk_size(length: int, batch: int, plant: Plant) -> int:
    """Tokens of a chunk: CHUNK on a CPU, else as many as HELD allows; all chunks are about equally long."""
    most = CHUNK
    if platforms() != ("cpu",):
        most = max(most, HELD // (batch * plant.A.size * plant.A.dtype.itemsize))
    return -(-length // -(-length // most))


def read_states(
    tokens: Tokens,
    plant: Plant,
    memory: Memory,
    mask: jax.Array | None = None,
    key: jax.Array | None = None,
    chunk: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array | None, Memory]:
    """The readouts of a sequence, by chunks of time.

    Args:
        mask: [B, T], False on padding, which changes nothing.
        key: of the process noise; None: no noise.
        chunk: tokens whose states are held at a time; None: `chunk_size`. It affects only rounding, and which noise is
            drawn.
        implementation: of `linear_scan`.

    Returns:
        y [B, T, E] after each token; the readout before it, x_{t-1} C_t, [B, T, E], if the memory has `scaled`, else
        None; and the memory after the last token. All are float32 (float64 for float64 parameters).
    """
    batch, length, _ = tokens.u.shape
    place = Places(mask)
    tokens = jax.tree.map(place.to_front, tokens)
    count = jnp.full(batch, length) if mask is None else jnp.sum(mask, axis=1)
    size = min(chunk or chunk_size(length, batch, plant), length)
    reach = None if tokens.reset is None else tokens_in_reach(tokens.reset, plant.delay)
    pieces = split_time((tokens, None if reach is None else reach >= plant.delay), size)
    starts = size * jnp.arange(-(-length // size))
    whole = mask is None and length % size == 0
    reals = None if whole else jnp.clip(count - starts[:, None], 0, size)
    carry = jax.tree.map(lambda s: jnp.swapaxes(s, -1, -2), (memory.ssm, memory.lag, memory.scaled))
    body = jax.checkpoint(functools.partial(_chunk, plant, key, implementation), prevent_cse=False)
    carry, readouts = jax.lax.scan(body, carry, (pieces, reals, starts // size))
    y, before = jax.tree.map(lambda r: place.back(join_time(r, length)), readouts)
    return y, before, _outside(carry, _last(reach, count, plant.delay))


def _chunk(plant: Plant, key: Any, implementation: str | None, carry: Any, piece: Any) -> tuple[Any, Any]:
    """One chunk: arrays [B, Q, ...], real tokens first. carry: state, lag [B, tau, N, E], scaled state [B, N, E].

    The number of real tokens is [B], or None if all are.
    """
    (tokens, within), real, index = piece
    state, lag, scaled = carry
    size, dtype = tokens.u.shape[1], plant.A.dtype
    here = None if real is None else jnp.arange(size) < real[:, None]
    step = jax.nn.softplus((tokens.delta @ plant.dt_proj).astype(dtype) + plant.dt_bias)
    step = zero_padding(step, here)
    write = (step * tokens.u)[..., None, :] * tokens.B.astype(dtype)[..., None]
    if key is not None:
        noise = jax.random.normal(jax.random.fold_in(key, index), write.shape, dtype)
        write = write + zero_padding(plant.noise * noise, here)
    states, state = linear_scan(
        step[..., None, :] * plant.A.T,
        write,
        initial_state=state,
        **_documents(tokens.reset),
        implementation=implementation,
    )
    lagged = states
    if lag is not None:
        lagged = shifted(lag, states)
        lagged = lagged if within is None else jnp.where(expand_to(within, lagged.ndim), lagged, 0)
        lag = _newest(lag, states, real)
    x = rescale(states + mix(plant.F, lagged) + plant.f[:, None], plant.Z, plant.g, plant.scaling)
    C, before = tokens.C.astype(dtype), None
    if scaled is not None:
        before = read(forget(shifted(scaled[:, None], x), tokens.reset), C)
        scaled = _newest(scaled[:, None], x, real)[:, 0]
    return (state, lag, scaled), (read(x, C), before)


def _documents(reset: jax.Array | None) -> dict[str, Any]:
    """segment_ids and initial_segment of documents that begin where `reset` [B, T] is True."""
    if reset is None:
        return {}
    return dict(segment_ids=jnp.cumsum(reset, axis=1), initial_segment=jnp.zeros(len(reset), int))


def _newest(before: jax.Array, x: jax.Array, real: jax.Array | None) -> jax.Array:
    """The last S rows of `before` [B, S, ...] and the first real [B] rows of x [B, T, ...]. None: of all of x.

    These are slices then. XLA would compute the gradient of rows with constant numbers when it compiles, for seconds.
    """
    rows = before.shape[1]
    if real is None:
        return jnp.concatenate([before[:, x.shape[1] :], x[:, max(x.shape[1] - rows, 0) :]], axis=1)
    index = real[:, None] + jnp.arange(rows)
    return jnp.take_along_axis(jnp.concatenate([before, x], axis=1), expand_to(index, x.ndim), axis=1)


def _last(reach: jax.Array | None, count: jax.Array, delay: int) -> jax.Array | None:
    """[B, tau]: which of the last tau states belong to the document of the last real token. None: all do."""
    if reach is None or not delay:
        return None
    # before the first token, all rows of the memory are in reach
    reach = jnp.take_along_axis(jnp.pad(reach, ((0, 0), (1, 0)), constant_values=delay), count[:, None], axis=1)
    return jnp.arange(delay)[::-1] <= reach


def _outside(carry: tuple[Any, Any, Any], kept: jax.Array | None) -> Memory:
    """The memory after a sequence; states of the lag that are not `kept` are zero."""
    ssm, lag, scaled = jax.tree.map(lambda s: jnp.swapaxes(s, -1, -2), carry)
    if lag is not None:
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
