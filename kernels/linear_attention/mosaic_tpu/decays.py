"""The decays of a chunk: rows of numbers, computed by XLA, from which the kernels compute the decays."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

if TYPE_CHECKING:
    from seqmodels.kernels.linear_attention.mosaic_tpu import Options

SUBLANES, LANES = 8, 128
ROWS = SUBLANES  # one float32 register; five of the rows are used
STEP, SEEN, KEPT, TOTAL, DOCUMENT = range(5)
NOTHING = -1e30  # logarithm of a decay that counts as zero


def chunk_rows(log_decay: jax.Array, reset: jax.Array | None, read: str, tokens: int) -> jax.Array:
    """Rows [B, G, R, N, ROWS, C] of N chunks, differentiable. The rows are

    - STEP: log decay of the last token that a read sees;
    - SEEN: log decay from the chunk's start to each read;
    - KEPT: log decay from each token to the chunk's end;
    - TOTAL: log decay over the whole chunk;
    - DOCUMENT: number of resets in the chunk up to and including each token.

    SEEN, KEPT and TOTAL are NOTHING where a reset lies between.

    Args:
        log_decay: [B, G, R, T] float32, T = N C; axes of size one are broadcast.
        reset: [B, T] bool or None.
    """

    def chunks(x):
        return x.reshape(*x.shape[:-1], -1, tokens)

    def earlier(x):  # the value of the previous token
        return jnp.concatenate([jnp.zeros_like(x[..., :1]), x[..., :-1]], axis=-1)

    step = chunks(log_decay)
    seen = jnp.cumsum(step, axis=-1)
    total = seen[..., -1:]
    later = jax.lax.cumsum(step, axis=step.ndim - 1, reverse=True)
    kept = jnp.concatenate([later[..., 1:], jnp.zeros_like(later[..., :1])], axis=-1)
    if read == "exclusive":
        step, seen = earlier(step), earlier(seen)
    document = jnp.zeros_like(step)
    if reset is not None:
        document = jnp.cumsum(chunks(reset).astype(step.dtype), axis=-1)[:, None, None]
        last = document[..., -1:]
        seen = jnp.where(document == 0, seen, NOTHING)
        kept = jnp.where(document == last, kept, NOTHING)
        total = jnp.where(last == 0, total, NOTHING)
    rows: Any = jnp.broadcast_arrays(step, seen, kept, total, document)
    rows = jnp.stack(rows, axis=-2)
    return jnp.pad(rows, [(0, 0)] * (rows.ndim - 2) + [(0, ROWS - rows.shape[-2]), (0, 0)])


def places(tokens: int) -> tuple[jax.Array, ...]:
    """Row and column index of each element of [C, C]."""
    return tuple(jax.lax.broadcasted_iota(jnp.int32, (tokens, tokens), axis) for axis in (0, 1))


def of_heads(rows: jax.Array, heads: int) -> list[tuple[jax.Array, jax.Array]]:
    """For each head its rows [ROWS, C], and their transpose [C, ROWS]. `rows` [1, ROWS, C] are shared by all heads."""
    columns = rows.reshape(-1, rows.shape[-1]).T
    each = [(rows[n], columns[:, n * ROWS : (n + 1) * ROWS]) for n in range(rows.shape[0])]
    return each if len(each) == heads else each * heads


def between(tokens: int, options: "Options") -> jax.Array:
    """Where STEP of read i lies between token j and read i: j < i for inclusive reads, j < i - 1 for exclusive ones."""
    i, j = places(tokens)
    return j < (i if options.read == "inclusive" else i - 1)


def decays(
    rows: jax.Array, columns: jax.Array, options: "Options"
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The decays of a chunk, with reads scaled.

    Args:
        rows, columns: [ROWS, C] and its transpose [C, ROWS].

    Returns:
        The decays from token j to read i, D [C, C], zero where the read does not see the token; from the incoming
        state to each read [C, 1]; from each token to the outgoing state [C, 1]; and from the incoming to the outgoing
        state [1, 1].
    """
    tokens = rows.shape[1]
    i, j = places(tokens)
    sums = jnp.where(between(tokens, options), columns[:, STEP : STEP + 1], 0)
    distance = 1
    while distance < tokens:  # sums over the 2, 4, 8, .. tokens up to i
        if distance < SUBLANES:
            sums += jnp.where(i >= distance, pltpu.roll(sums, distance, 0), 0)
        else:  # whole registers
            sums = jnp.concatenate([sums[:distance], sums[distance:] + sums[:-distance]])
        distance *= 2
    visible = j <= i if options.read == "inclusive" else j < i
    if options.packed:
        visible &= columns[:, DOCUMENT : DOCUMENT + 1] == rows[DOCUMENT : DOCUMENT + 1, :]
    D = jnp.where(visible, jnp.exp(sums) * options.scale, 0)
    column = jnp.exp(columns)
    seen, kept = column[:, SEEN : SEEN + 1] * options.scale, column[:, KEPT : KEPT + 1]
    return D, seen, kept, jnp.exp(rows[TOTAL : TOTAL + 1, :1])


def selected(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x where `weight`, broadcast, is not zero; else zero, even if x is infinite or NaN there."""
    return jnp.where(weight == 0, 0, x)


def column_gradients(
    head: int, options: "Options", exponents: jax.Array, seen: jax.Array, kept: jax.Array, total: jax.Array
) -> jax.Array:
    """Gradients of a head's columns, as columns of [C, LANES], from the gradients of the exponents in `decays`."""
    tokens = exponents.shape[0]
    i, _ = places(tokens)
    distance = 1
    while distance < tokens:  # sums over the 2, 4, 8, .. reads from i
        if distance < SUBLANES:
            exponents += jnp.where(i < tokens - distance, pltpu.roll(exponents, tokens - distance, 0), 0)
        else:
            exponents = jnp.concatenate([exponents[:-distance] + exponents[distance:], exponents[-distance:]])
        distance *= 2
    step = jnp.sum(jnp.where(between(tokens, options), exponents, 0), axis=1, keepdims=True)
    token, lane = (jax.lax.broadcasted_iota(jnp.int32, (tokens, LANES), axis) for axis in (0, 1))
    place = lane - head * ROWS
    columns = jnp.where(place == STEP, step, 0) + jnp.where(place == SEEN, seen, 0) + jnp.where(place == KEPT, kept, 0)
    return columns + jnp.where((place == TOTAL) & (token == 0), total, 0)


def product(x: jax.Array, y: jax.Array, axes: tuple[int, int], factors: DTypeLike) -> jax.Array:
    """Product of x and y over one axis of each, with factors of dtype `factors`, summed in float32."""
    exact = None if factors == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    over = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(
        x.astype(factors), y.astype(factors), over, precision=exact, preferred_element_type=jnp.float32
    )
