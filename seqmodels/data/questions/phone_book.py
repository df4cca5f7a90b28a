"""A phone book with a question for one number, as in "Repeat after me" (Jelassi et al. 2024, arXiv 2402.01032)."""

import dataclasses

import numpy as np

from seqmodels.data.questions.hay import FIRST, LAST, different
from seqmodels.data.questions.question import Asked


@dataclasses.dataclass(frozen=True)
class PhoneBook:
    """Attributes:
    shots: entries that are given again behind the book, before the name whose number is asked for.
    """

    shots: int = 2

    def ask(self, rng: np.random.Generator) -> Asked:
        entries = [f"{name}: {_number(rng)}" for name in different(rng, FIRST, LAST, self.shots + 1, " ")]
        name, number = entries[-1].split(": ")
        book = [entries[i] for i in rng.permutation(len(entries))]
        return Asked("", book, "\n".join(entries[:-1]), f"{name}:", [number], join="\n")

    def hay(self, rng: np.random.Generator, count: int, asked: Asked) -> list[str]:
        said = "".join(asked.needles)
        names = [n for n in different(rng, FIRST, LAST, count + len(asked.needles), " ") if n not in said]
        return [f"{name}: {_number(rng)}" for name in names[:count]]


def _number(rng: np.random.Generator) -> str:
    """Ten digits, of which the first is 6, 7, 8 or 9."""
    return f"{rng.integers(6, 10)}{rng.integers(0, 10**9):09d}"
