"""Memorization of the MAD suite (Poli et al. 2024, arXiv 2403.17844, appendix B): one map for all rows."""

import dataclasses
from functools import cached_property

import numpy as np

from seqmodels.data.synthetic.task import Rows, Task, only, refuse_length


@dataclasses.dataclass(frozen=True)
class Memorization(Task):
    """Keys, each with a marker behind it, at which the key's value is asked. The value is nowhere in the row.

    Ids: the first half of the V - 1 symbols are keys and the others values; V - 1 is the marker. Keys are uniform. The
    map from keys to values follows from `map_seed`, and no two keys have the same value. Loss mask: the markers.

    Attributes:
      vocab: V, with the marker. map_seed: seed of the map.
    """

    vocab: int = 256
    map_seed: int = 12345

    def __post_init__(self) -> None:
        if self.vocab < 5:
            self.refuse("vocab", "at least 5: two keys, two values and the marker")
        if self.map_seed < 0:
            self.refuse("map_seed", "at least 0")

    @property
    def keys(self) -> int:
        """Number of keys."""
        return (self.vocab - 1) // 2

    @cached_property
    def map(self) -> np.ndarray:
        """[keys] int32: the value of each key."""
        values = np.random.default_rng(self.map_seed).permutation(np.arange(self.keys, self.vocab - 1, dtype=np.int32))
        return values[: self.keys]

    @property
    def symbols(self) -> list[str]:
        return [*(f"k{i}" for i in range(self.keys)), *(f"v{i}" for i in range(self.vocab - 1 - self.keys)), "=>"]

    def check(self, length: int) -> None:
        if length < 2 or length % 2:
            refuse_length(length, "even and at least 2: keys and markers")

    def rows(self, rng: np.random.Generator, count: int, length: int) -> Rows:
        shown = rng.integers(0, self.keys, (count, length // 2), dtype=np.int32)
        read = np.full((count, length), self.vocab - 1, np.int32)
        read[:, 0::2] = shown
        targets = np.zeros_like(read)
        targets[:, 1::2] = self.map[shown]
        answers = np.broadcast_to(np.arange(length) % 2 == 1, read.shape)
        return Rows(read, only(answers, targets), answers)
