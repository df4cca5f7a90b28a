"""Operations on a tile of tokens that both kernels use."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES, SUBLANES = 128, 8
TILE = 16  # tokens that are loaded together: the rows of a bfloat16 tile
STRIDE = SUBLANES + 1  # rows between parts of sums: with 8, all rows of a load would be in one sublane
FORGET = 1e33  # in place of a step: a document begins, and the state before it is dropped
LOG2_E = math.log2(math.e)


def spread(x: Mapping[str, Any], scratch: Mapping[str, Any]) -> None:
    """Broadcast the columns of B and C [G, N, L] over the lanes, [G, T, N, LANES]; zero the sums of their gradients."""
    groups, tokens, state, _ = scratch["B"].shape
    lanes = x["B"].shape[-1]
    columns = [(g, name) for g in range(groups) for name in "BC"]

    def body(i, _):
        tiles = [pltpu.roll(x[name][g], jax.lax.rem(lanes - i * TILE, lanes), 1) for g, name in columns]
        for t in range(TILE):
            for tile, (g, name) in zip(tiles, columns, strict=True):
                scratch[name][g, i * TILE + t] = jnp.broadcast_to(tile[:, t : t + 1], (state, LANES))
                if f"d{name}" in scratch:
                    scratch[f"d{name}"][g, i * TILE + t] = jnp.zeros((state, LANES), jnp.float32)
        return 0

    jax.lax.fori_loop(0, tokens // TILE, body, 0)


def steps(x: Mapping[str, Any], group: int, tile: pl.Slice, softplus: bool) -> tuple[jax.Array, jax.Array]:
    """Steps of a tile [TILE, E], and their derivatives with respect to dt before bias and softplus."""
    raw = x["dt"][group, tile, :].astype(jnp.float32)
    if not softplus:
        return raw, jnp.ones_like(raw)
    raw = raw + x["bias"][group]
    rest = jnp.log1p(jnp.exp(-jnp.abs(raw)))
    return jnp.maximum(raw, 0) + rest, jnp.exp(jnp.minimum(raw, 0) - rest)  # softplus(raw), sigmoid(raw)


def write_rows(x: Mapping[str, Any], scratch: Mapping[str, Any], tile: pl.Slice, softplus: bool) -> None:
    """Store a tile's steps, and the inputs that it writes into the state, as float32: rows can then be read singly."""
    for g in range(x["u"].shape[0]):
        step, slope = steps(x, g, tile, softplus)
        if "slope" in scratch:
            scratch["dt"][g, tile, :] = step
            scratch["slope"][g, tile, :] = slope
        store_rows(scratch["write"].at[g], tile, step * x["u"][g, tile, :].astype(jnp.float32))
        if x["reset"] is not None:
            step = jnp.where(x["reset"][tile, :] > 0, FORGET, step)
        store_rows(scratch["step"].at[g], tile, step)


def store_rows(ref: Any, tile: pl.Slice, rows: jax.Array) -> None:
    """Store a tile of rows [TILE, width] in a reference [width / LANES, T, LANES], from which `row` reads one row."""
    for column in range(ref.shape[0]):
        ref[column, tile, :] = rows[:, column * LANES : (column + 1) * LANES]


def load_rows(ref: Any, tile: pl.Slice) -> jax.Array:
    """The tile [TILE, width]."""
    return jnp.concatenate([ref[column, tile, :] for column in range(ref.shape[0])], axis=1)


def row(ref: Any, token: jax.Array | int) -> jax.Array:
    """One row, [1, width]. Loads of LANES broadcast it over the sublanes; for a wider load that takes instructions."""
    return jnp.concatenate([ref[column, pl.ds(token, 1), :] for column in range(ref.shape[0])], axis=1)


def forgets(step: jax.Array, packed: bool) -> jax.Array | None:
    """[1, width] bool: whether a document begins at a token, from its row of steps. None if there is one document."""
    return step == FORGET if packed else None


def kept(state: jax.Array, forgets: jax.Array | None) -> jax.Array:
    """The state [N, width], or zeros where a document begins: then the state may be infinite or NaN."""
    return state if forgets is None else jnp.where(forgets, 0, state)


def sigmoid(x: jax.Array) -> jax.Array:
    return jnp.exp2(-jnp.log2(1 + jnp.exp(-x)))  # a third of the instructions of a division


def widen(x: jax.Array, width: int) -> jax.Array:
    """Repeat [N, LANES] to [N, width]: the same registers are used several times."""
    return jnp.concatenate([x] * (width // LANES), axis=1)


def fold_lanes(x: jax.Array) -> Any:
    """Sum [N, width] to [N, LANES]."""
    return sum(x[:, lane : lane + LANES] for lane in range(0, x.shape[1], LANES))


def fold_rows(x: jax.Array) -> Any:
    """Sum [rows, width] to [SUBLANES, width]."""
    return sum(x[row : row + SUBLANES] for row in range(0, x.shape[0], SUBLANES))


def put(part: jax.Array, ref: Any, token: int) -> None:
    """Store a token's part of a sum over states, [SUBLANES, width], in a reference of shape `parts_shape(width)`."""
    for column in range(ref.shape[0]):
        lanes = slice(column * LANES, (column + 1) * LANES)
        ref[column, pl.ds(token * STRIDE, SUBLANES), :] = part[:, lanes]


def take_sums(ref: Any) -> jax.Array:
    """[TILE, width]: the sum over the rows of each token's part. A load reads one row of 8 tokens."""

    def of_column(column, first):
        starts = range(first * STRIDE, first * STRIDE + SUBLANES)
        return sum(ref.at[column][pl.ds(start, SUBLANES, stride=STRIDE), :] for start in starts)

    columns = range(ref.shape[0])
    octets = [jnp.concatenate([of_column(c, first) for c in columns], axis=1) for first in range(0, TILE, SUBLANES)]
    return jnp.concatenate(octets, axis=0)


def parts_shape(width: int) -> tuple[int, int, int]:
    """Shape of the reference that `put` writes and `take_sums` reads."""
    return (width // LANES, TILE * STRIDE, LANES)
