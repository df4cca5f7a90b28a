"""Compression of the MAD suite (Poli et al. 2024, arXiv 2403.17844, appendix B): a row into one hidden state."""

import dataclasses
from typing import ClassVar

import numpy as np

from seqmodels.data.synthetic.task import Rows, Task, refuse_length


@dataclasses.dataclass(frozen=True)
class Compression(Task):
    """Uniform symbols and a marker. All of the row must be found in the hidden state of the marker.

    The head `rebuild` (seqmodels/heads/rebuild.py) decodes it. Ids: 0 to V - 2 the symbols, V - 1 the marker, the last
    token of every row. Loss mask: all positions, that of the marker too, as in MAD's code; the target is the token.

    Attributes:
      vocab: V, with the marker.
    """

    vocab: int = 16

    objective: ClassVar[str] = "rebuild"

    def __post_init__(self) -> None:
        if self.vocab < 3:
            self.refuse("vocab", "at least 3: two symbols and the marker")

    @property
    def symbols(self) -> list[str]:
        return [*map(str, range(self.vocab - 1)), "!"]

    def check(self, length: int) -> None:
        if length < 2:
            refuse_length(length, "at least 2: a symbol and the marker")

    def rows(self, rng: np.random.Generator, count: int, length: int) -> Rows:
        tokens = rng.integers(0, self.vocab - 1, (count, length), dtype=np.int32)
        tokens[:, -1] = self.vocab - 1
        return Rows(tokens, tokens.copy(), np.ones(tokens.shape, bool))
