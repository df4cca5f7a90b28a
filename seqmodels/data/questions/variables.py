"""Variable tracking, as in RULER (Hsieh et al. 2024, arXiv 2404.06654): which variables have a value, over hops."""

import dataclasses

import numpy as np

from seqmodels.data.questions.hay import noise
from seqmodels.data.questions.question import Asked


@dataclasses.dataclass(frozen=True)
class Variables:
    """Attributes:
    hops: assignments from variable to variable after the first.
    """

    hops: int = 4

    def ask(self, rng: np.random.Generator) -> Asked:
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        names: list[str] = []
        while len(names) <= self.hops:
            name = "".join(letters[i] for i in rng.integers(0, 26, 5))
            names += [name] if name not in names else []
        value = str(rng.integers(10_000, 100_000))
        chain = [f"VAR {new} = {old}." for new, old in zip(names, [value, *(f"VAR {n}" for n in names)], strict=False)]
        introduction = "Remember the assignments of variables that are hidden in the following text."
        question = f"Which variables have the value {value}? There are {len(names)}."
        prefix = f"By the assignments in the text, the variables with the value {value} are:"
        return Asked(introduction, chain, question, prefix, names)

    def hay(self, rng: np.random.Generator, count: int, asked: Asked) -> list[str]:
        return noise(count)
