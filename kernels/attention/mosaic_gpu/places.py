"""Which tiles of rows a block takes, and in which order."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array


class Places(NamedTuple):
    """In which order the blocks take the tiles of rows.

    Each round gives a tile to every block. Every other round goes backwards, since the tiles at the end have less work.

    Attributes:
        batch, heads, tiles: sizes. A row of tiles is that of a head of a sequence.
        blocks: how many there are, as many as tiles at most.
        across: whether the first tiles of all rows come first. Otherwise row by row, so that blocks share what they
            read.
    """

    batch: int
    heads: int
    tiles: int
    blocks: int
    across: bool

    @classmethod
    def of(cls, batch: int, heads: int, visits: np.ndarray, most: int, fewer: bool) -> "Places":
        """The order in which the last block is done first, or nearly.

        Args:
            visits: [N], how many visits each tile makes.
            most: blocks at most.
            fewer: whether it may be less, which nobody knows before.
        """
        sizes = batch, heads, len(visits), min(most, batch * heads * len(visits))
        by_row, across = cls(*sizes, across=False), cls(*sizes, across=True)
        return across if not fewer and 1.05 * across.longest(visits) < by_row.longest(visits) else by_row

    @property
    def all(self) -> int:
        return self.batch * self.heads * self.tiles

    def longest(self, visits: np.ndarray) -> int:
        """The visits of the block that has most of them."""
        around, within = np.divmod(np.arange(self.all), self.blocks)
        block = np.where(around % 2 == 0, within, self.blocks - 1 - within)
        return np.bincount(block, visits[self.row_and_tile(np.arange(self.all))[1]]).max()

    def mine(self, block: Array) -> Array:
        """How many tiles a block has."""
        rounds, rest = divmod(self.all, self.blocks)
        last = block if rounds % 2 == 0 else self.blocks - 1 - block
        return rounds + (last < rest).astype(jnp.int32)

    def place(self, block: Array, n: Array) -> tuple[Array, Array, Array]:
        """Indices in the batch, of the head, and of the tile: a block's n-th tile."""
        within = jnp.where(n % 2 == 0, block, self.blocks - 1 - block)
        row, tile = self.row_and_tile(n * self.blocks + within)
        return row // self.heads, row % self.heads, tile

    def row_and_tile(self, number: Any) -> tuple[Any, Any]:
        if self.across:
            rows = self.batch * self.heads
            return number % rows, number // rows
        return number // self.tiles, number % self.tiles
