"""Copying and selective copying (Arjovsky et al. 2016; Gu and Dao 2023, section 4.1.1), as in the S4 repository.

The model must remember tokens over a delay, and then output them in order. In copying, they are at the start, so a
fixed convolution can solve the task. In selective copying, they are at random places among blanks, so the model must
decide from the content what to remember.
"""

import dataclasses

import numpy as np

from seqmodels.data.synthetic.task import Rows, Task, only, refuse_length

BLANK = 0


@dataclasses.dataclass(frozen=True)
class Copying(Task):
    """M tokens, L blanks, M markers: T = L + 2 M.

    Ids: 0 blank, 1 to A - 2 tokens, A - 1 marker. Loss mask: the M markers; the targets there are the tokens in order.

    Attributes:
      vocab: A. tokens: M.
    """

    vocab: int = 16
    tokens: int = 16

    def __post_init__(self) -> None:
        if self.vocab < 4:
            self.refuse("vocab", "at least 4: two tokens, the blank and the marker")
        if self.tokens < 1:
            self.refuse("tokens", "at least 1")

    @property
    def symbols(self) -> list[str]:
        return ["_", *map(str, range(1, self.vocab - 1)), "?"]

    def check(self, length: int) -> None:
        if length < 2 * self.tokens:
            refuse_length(length, f"at least 2 * config.data.task.tokens, {2 * self.tokens}")

    def places(self, rng: np.random.Generator, count: int, length: int) -> np.ndarray:
        """[count, M] int, increasing: positions of the tokens among the first `length`."""
        return np.broadcast_to(np.arange(self.tokens), (count, self.tokens))

    def rows(self, rng: np.random.Generator, count: int, length: int) -> Rows:
        remembered = rng.integers(1, self.vocab - 1, (count, self.tokens), dtype=np.int32)
        read = np.full((count, length), BLANK, np.int32)
        np.put_along_axis(read, self.places(rng, count, length - self.tokens), remembered, axis=1)
        read[:, -self.tokens :] = self.vocab - 1
        answers = np.broadcast_to(np.arange(length) >= length - self.tokens, read.shape)
        targets = np.zeros_like(read)
        targets[:, -self.tokens :] = remembered
        return Rows(read, only(answers, targets), answers)


@dataclasses.dataclass(frozen=True)
class SelectiveCopying(Copying):
    """Copying with the tokens at random places, in order, among the first L + M. Mamba: L + M = 4096, M = A = 16."""

    def places(self, rng: np.random.Generator, count: int, length: int) -> np.ndarray:
        chosen = np.argpartition(rng.random((count, length)), self.tokens - 1, axis=1)[:, : self.tokens]
        return np.sort(chosen, axis=1)
