"""Needles in a haystack, as in RULER (Hsieh et al. 2024, arXiv 2404.06654): numbers that a text says of some words."""

import dataclasses
import uuid

import numpy as np

from seqmodels.data.questions.hay import ADJECTIVES, NOUNS, different, essay, noise
from seqmodels.data.questions.question import Asked

NEEDLE = "One of the special magic {kind}s for {key} is: {value}."


@dataclasses.dataclass(frozen=True)
class Needles:
    """Attributes:
    haystack: "noise" (five sentences again and again), "essay" (a novel), or "needle" (needles of other keys).
    keys: keys with needles in every text. values: needles of each key. queries: how many keys are asked for.
    kind: "number" (7 digits) or "uuid", of the values; keys: words with a number, UUIDs with UUIDs in the "needle" hay.
    """

    haystack: str = "essay"
    keys: int = 1
    values: int = 1
    queries: int = 1
    kind: str = "number"

    def ask(self, rng: np.random.Generator) -> Asked:
        keys = self._keys(rng, self.keys)
        told = [(key, self._value(rng)) for key in keys for _ in range(self.values)]
        needles = [NEEDLE.format(kind=self.kind, key=key, value=value) for key, value in told]
        asked, kind = keys[: self.queries], self.kind if self.queries * self.values == 1 else f"{self.kind}s"
        names = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])} and {asked[-1]}"
        verb = "is" if self.queries * self.values == 1 else "are"
        return Asked(
            f"Some special magic {self.kind}s are hidden in the following text. Remember them; there is a question.",
            [needles[i] for i in rng.permutation(len(needles))],
            f"What {verb} the special magic {kind} for {names} in the text?",
            f"The special magic {kind} for {names} in the text {verb}",
            [value for key, value in told if key in asked],
        )

    def hay(self, rng: np.random.Generator, count: int, asked: Asked) -> list[str]:
        if self.haystack == "noise":
            return noise(count)
        if self.haystack == "essay":
            return essay(rng, count)
        said = " ".join(asked.needles)
        keys = [key for key in self._keys(rng, count + len(asked.needles)) if f" {key} " not in said]
        return [NEEDLE.format(kind=self.kind, key=key, value=self._value(rng)) for key in keys[:count]]

    def _keys(self, rng: np.random.Generator, count: int) -> list[str]:
        if self.kind == "uuid" and self.haystack == "needle":
            return [_uuid(rng) for _ in range(count)]
        return different(rng, ADJECTIVES, NOUNS, count)

    def _value(self, rng: np.random.Generator) -> str:
        return _uuid(rng) if self.kind == "uuid" else str(rng.integers(1_000_000, 10_000_000))


def _uuid(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))
