"""Converts parameters of unrolled blocks to those of a scan over super-blocks (`model.scan_blocks`), and back.

Both ways the leaves are views, which are made into arrays when `np.asarray` asks for them. So a model that is larger
than memory can be converted one parameter after another.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Stacked:
    """The same parameter of several blocks [repeats, ...], or with an index a part of it."""

    rows: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole."""
        return len(self.rows), *np.shape(self.rows[0])

    @property
    def dtype(self) -> np.dtype:
        """That of a row."""
        return self.rows[0].dtype

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        rows = self.rows[index[0]]
        return np.stack([np.asarray(row)[index[1:]] for row in rows])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.stack([np.asarray(row, dtype) for row in self.rows])


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """One row of a stacked parameter."""

    leaf: Any
    row: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a row."""
        return np.shape(self.leaf)[1:]

    @property
    def dtype(self) -> np.dtype:
        """That of the stack."""
        return self.leaf.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.leaf[self.row], dtype)


def stack_views(params: Mapping, size: int, unrolled: int = 0) -> dict:
    """Moves each `block_i` into `blocks/block_j`, whose leaves are `Stacked`, one row for each super-block.

    Args:
        size: blocks in a super-block.
        unrolled: number of blocks at the bottom that stay unrolled, the first result of `seqmodels.backbone.scanned`.
    """
    count = sum(name.startswith("block_") for name in params)
    rows = range(unrolled, count, size)
    blocks = {
        f"block_{j}": jax.tree.map(lambda *leaves: Stacked(leaves), *(params[f"block_{i + j}"] for i in rows))
        for j in range(size)
    }
    scanned = {f"block_{i}" for i in range(unrolled, count)}
    return {**{name: tree for name, tree in params.items() if name not in scanned}, "blocks": blocks}


def unstack_views(params: Mapping) -> dict:
    """The inverse of `stack_views`, with a `Row` for each leaf of a block that was stacked; others stay as they are."""
    if "blocks" not in params:
        return dict(params)
    rest = {name: tree for name, tree in params.items() if name != "blocks"}
    unrolled = sum(name.startswith("block_") for name in rest)
    size = len(params["blocks"])
    repeats = np.shape(jax.tree.leaves(params["blocks"])[0])[0]
    for row in range(repeats):
        for j in range(size):
            block = jax.tree.map(lambda leaf, row=row: Row(leaf, row), params["blocks"][f"block_{j}"])
            rest[f"block_{unrolled + row * size + j}"] = block
    return rest


def stack(params: Mapping, size: int, unrolled: int = 0) -> dict:
    """As `stack_views`, with arrays."""
    return _stored(stack_views(params, size, unrolled), Stacked)


def unstack(params: Mapping) -> dict:
    """As `unstack_views`, with arrays."""
    return _stored(unstack_views(params), Row)


def _stored(params: Mapping, view: type) -> dict:
    return jax.tree.map(lambda leaf: np.asarray(leaf) if isinstance(leaf, view) else leaf, params)
