"""Chunks of 64 tokens: how much each sees of the others."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from seqmodels.kernels.tensor_cores import ACCUMULATOR, COLUMN, ROW, SIDE, along, load

SLOTS = 2  # chunks in shared memory: one in use, one being copied


def decayed(x: Array, vectors: Any, slot: Array | int, reverse: bool, strict: bool) -> Array:
    """x [64, 64] times exp2(row_i - column_j) where i sees j, else zero, even if x is infinite or NaN there.

    Token i sees the tokens before it (with `reverse`, after it), and itself unless `strict`. It does not see those of
    another document, where the decay is exactly zero.
    """
    shape = (SIDE, SIDE)
    row, column = load(vectors.at[slot, 0], ROW), load(vectors.at[slot, 1], COLUMN)
    i = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=ACCUMULATOR)
    j = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=ACCUMULATOR)
    if reverse:
        i, j = j, i
    decay = jnp.exp2(along(row, 0, shape) - along(column, 1, shape))
    return jnp.where((i > j if strict else i >= j) & (decay != 0), x * decay, 0)


def weighted(x: Array, weight: Array) -> Array:
    """x times `weight`, of the same shape or a number; zero where the weight is, even if x is infinite or NaN there."""
    return jnp.where(weight == 0, 0, x * weight)
