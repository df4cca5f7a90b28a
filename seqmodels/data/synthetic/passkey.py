"""Passkey retrieval (Mohtashami and Jaggi 2023), with the sentences of the LongMamba repository; one token per word."""

import dataclasses
from typing import ClassVar

import numpy as np

from seqmodels.data.synthetic.task import Rows, Task, next_tokens, refuse_length

HAY = "the grass is green . the sky is blue . the sun is yellow . here we go . there and back again ."
NEEDLE = "the pass key is {key} . remember it . {key} is the pass key ."
QUESTION = "what is the pass key ? the pass key is"
DIGITS = 5  # of keys from 1 to 50,000, with leading zeros

WORDS = [*map(str, range(10)), *dict.fromkeys(f"{HAY} {NEEDLE} {QUESTION}".replace("{key}", ".").split())]


def ids(text: str) -> np.ndarray:
    """[words] int32."""
    return np.array([WORDS.index(word) for word in text.split()], np.int32)


@dataclasses.dataclass(frozen=True)
class Passkey(Task):
    """A number is given once among many words of filler, and the question for it comes at the end.

    A row is filler, the needle, filler, the question, and the first four digits of the key. The filler repeats the same
    sentences; both parts start with the first sentence. Loss mask: the last word of the question and the four digits,
    each with the next digit as target. At all other positions the next word is a target, too, for
    `config.data.loss = "all"`.

    Attributes:
      depth: share of the filler that comes before the needle, 0 to 1; -1 draws it uniformly for each row.
    """

    depth: float = -1.0

    has_depth: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.depth != -1 and not 0 <= self.depth <= 1:
            self.refuse("depth", "from 0 to 1, or -1 for a random one")

    @property
    def symbols(self) -> list[str]:
        return list(WORDS)

    def check(self, length: int) -> None:
        fixed = len(self._needle(0)) + len(ids(QUESTION)) + DIGITS - 1
        if length < fixed:
            refuse_length(length, f"at least {fixed}, the words of the needle and the question")

    def _needle(self, key: int) -> np.ndarray:
        return ids(NEEDLE.format(key=" ".join(f"{key:0{DIGITS}}")))

    def rows(self, rng: np.random.Generator, count: int, length: int) -> Rows:
        keys = rng.integers(1, 50_001, count)
        depths = rng.random(count) if self.depth == -1 else np.full(count, self.depth)
        read = np.empty((count, length), np.int32)
        last = np.array([key % 10 for key in keys], np.int32)
        for row, (key, depth) in enumerate(zip(keys, depths, strict=True)):
            needle, end = self._needle(key), np.concatenate([ids(QUESTION), ids(" ".join(f"{key:0{DIGITS}}"[:-1]))])
            hay = length - len(needle) - len(end)
            before = round(depth * hay)
            sentences = [np.resize(ids(HAY), size) for size in (before, hay - before)]
            read[row] = np.concatenate([sentences[0], needle, sentences[1], end])
        answers = np.broadcast_to(np.arange(length) >= length - DIGITS, read.shape)
        return Rows(read, next_tokens(read, last), answers)
