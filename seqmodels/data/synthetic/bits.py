"""Rows of random bits with one answer at the end, or one at every bit: the base of parity and majority."""

import dataclasses
from typing import ClassVar

import numpy as np

from seqmodels.data.synthetic.task import Rows, Task, only, refuse_length

END, PAD = 2, 3


@dataclasses.dataclass(frozen=True)
class Bits(Task):
    """Uniform bits. Ids: 0 and 1 the bits, and the answers; 2 the end, 3 padding.

    ask = "last": from `shortest` to T - 1 bits, uniformly many, then the end, then padding. Loss mask: the end.
    ask = "every": T bits. Loss mask: every bit, whose target is the answer to the bits so far, itself included.

    Attributes:
      ask: "last" or "every".
      shortest: fewest bits of a row; 0 makes all rows T - 1 bits long.
    """

    has_horizon: ClassVar[bool] = True

    ask: str = "last"
    shortest: int = 0

    def __post_init__(self) -> None:
        if self.ask not in ("last", "every"):
            self.refuse("ask", "'last' or 'every'")
        if self.shortest < 0 or (self.shortest and self.ask == "every"):
            self.refuse("shortest", "at least 0, and 0 with ask='every', which asks at all lengths anyway")

    @property
    def symbols(self) -> list[str]:
        return ["0", "1", "=", "_"]

    def check(self, length: int) -> None:
        if length <= max(self.shortest, 1):
            refuse_length(length, f"at least {max(self.shortest, 1) + 1}: config.data.task.shortest bits and the end")

    def running(self, bits: np.ndarray) -> np.ndarray:
        """[n, k] bits to the answer after each."""
        raise NotImplementedError

    def rows(self, rng: np.random.Generator, count: int, length: int) -> Rows:
        bits = rng.integers(0, 2, (count, length), dtype=np.int32)
        running = self.running(bits).astype(np.int32)
        if self.ask == "every":
            return Rows(bits, running, np.ones(bits.shape, bool))
        sizes = rng.integers(self.shortest or length - 1, length, (count, 1))
        return Rows(*with_answer(bits, sizes, np.take_along_axis(running, sizes - 1, axis=1), END, PAD))

    def tests(self, lengths: tuple[int, ...]) -> dict[str, tuple[Task, int]]:
        return {str(n): (dataclasses.replace(self, shortest=0), n) for n in lengths}


def with_answer(text: np.ndarray, sizes: np.ndarray, answer: np.ndarray, end: int, pad: int) -> tuple:
    """Rows that consist of a text of any length, the end, at which the answer is the target, and padding.

    Args:
      text: [n, T] int. Of row i, the first sizes[i] tokens count; sizes[i] is less than T.
      sizes, answer: [n, 1] int.

    Returns: tokens, targets and answers, as `Rows` has them.
    """
    place = np.arange(text.shape[1])
    tokens = np.where(place < sizes, text, np.where(place == sizes, end, pad)).astype(np.int32)
    answers = place == sizes
    return tokens, only(answers, answer), answers
