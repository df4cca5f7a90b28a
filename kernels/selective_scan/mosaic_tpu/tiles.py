"""What both kernels do with a tile of tokens."""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

LANES, SUBLANES = 128, 8
TILE = 16  # tokens that are loaded together: the rows of a bfloat16 tile
FORGET = 1e33  # step after which nothing is left of a state
LOG2_E = math.log2(math.e)


def spread(columns, wide):
    """Repeats each column of [G, N, L] over the lanes of [G, T, N, LANES]."""
    groups, tokens, state, _ = wide.shape
    lanes = columns.shape[-1]

    def body(i, _):
        for g in range(groups):
            tile = pltpu.roll(columns[g], jax.lax.rem(lanes - i * TILE, lanes), 1)
            for t in range(TILE):
                wide[g, i * TILE + t] = jnp.broadcast_to(tile[:, t : t + 1], (state, LANES))
        return 0

    jax.lax.fori_loop(0, tokens // TILE, body, 0)


def steps(x, group, tile, softplus):
    """Steps of a tile [TILE, E], and their derivative by what they were made from."""
    raw = x["dt"][group, tile, :].astype(jnp.float32)
    if not softplus:
        return raw, 1
    raw = raw + x["bias"][group]
    small = jnp.exp(-jnp.abs(raw))
    return jnp.maximum(raw, 0) + jnp.log1p(small), jnp.where(raw >= 0, 1, small) / (1 + small)


def write_rows(x, scratch, tile, softplus):
    """Keeps a tile's steps, and what they write into the state, as float32, of which single rows can be read."""
    for g in range(x["u"].shape[0]):
        step, _ = steps(x, g, tile, softplus)
        scratch["write"][g, tile, :] = step * x["u"][g, tile, :].astype(jnp.float32)
        if x["reset"] is not None:
            step = jnp.where(x["reset"][tile, :] > 0, FORGET, step)
        scratch["step"][g, tile, :] = step


def sigmoid(x):
    return 1 / (1 + jnp.exp(-x))


def widen(x, width):
    """[N, LANES] to [N, width] by repetition: the same registers, several times."""
    return jnp.concatenate([x] * (width // LANES), axis=1)


def fold_lanes(x):
    """[N, width] to [N, LANES], summed."""
    return sum(x[:, lane : lane + LANES] for lane in range(0, x.shape[1], LANES))


def fold_rows(x):
    """[rows, width] to [SUBLANES, width], summed."""
    return sum(x[row : row + SUBLANES] for row in range(0, x.shape[0], SUBLANES))


def sum_rows(parts):
    """A tile [len(parts), width] whose row t is the sum over the rows of parts[t], [SUBLANES, width]."""
    if len(parts) > SUBLANES:
        return jnp.concatenate([sum_rows(parts[i : i + SUBLANES]) for i in range(0, len(parts), SUBLANES)], axis=0)
    row = jax.lax.broadcasted_iota(jnp.int32, parts[0].shape, 0)
    for distance in (1, 2, 4):  # each round joins two parts into one, in which each has half of the rows
        upper = (row & distance) != 0
        parts = [
            jnp.where(upper, high, low) + pltpu.roll(jnp.where(upper, low, high), distance, 0)
            for low, high in zip(parts[::2], parts[1::2], strict=True)
        ]
    return parts[0]
