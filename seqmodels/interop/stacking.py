"""Converts parameters of unrolled blocks to those of a scan over super-blocks (`model.scan_blocks`), and back."""

from collections.abc import Mapping

import jax
import numpy as np


def stack(params: Mapping, size: int, unrolled: int = 0) -> dict:
    """Moves each `block_i` into `blocks/block_j`, whose leaves [repeats, ...] have one row for each super-block.

    Args:
        size: blocks in a super-block.
        unrolled: number of blocks at the bottom that stay unrolled, the first result of `seqmodels.backbone.scanned`.
    """
    count = sum(name.startswith("block_") for name in params)
    rows = range(unrolled, count, size)
    blocks = {
        f"block_{j}": jax.tree.map(lambda *leaves: np.stack(leaves), *(params[f"block_{i + j}"] for i in rows))
        for j in range(size)
    }
    scanned = {f"block_{i}" for i in range(unrolled, count)}
    return {**{name: tree for name, tree in params.items() if name not in scanned}, "blocks": blocks}


def unstack(params: Mapping) -> dict:
    """The inverse of `stack`. Parameters that are not stacked stay as they are."""
    if "blocks" not in params:
        return dict(params)
    rest = {name: tree for name, tree in params.items() if name != "blocks"}
    unrolled = sum(name.startswith("block_") for name in rest)
    size = len(params["blocks"])
    repeats = len(jax.tree.leaves(params["blocks"])[0])
    for row in range(repeats):
        for j in range(size):
            block = jax.tree.map(lambda leaf, row=row: np.asarray(leaf[row]), params["blocks"][f"block_{j}"])
            rest[f"block_{unrolled + row * size + j}"] = block
    return rest
