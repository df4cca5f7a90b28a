"""The most frequent words of a list, as in RULER (Hsieh et al. 2024, arXiv 2404.06654)."""

import dataclasses

import numpy as np

from seqmodels.data.questions.hay import ADJECTIVES, NOUNS, different
from seqmodels.data.questions.question import Asked
from seqmodels.errors import UserError


@dataclasses.dataclass(frozen=True)
class CommonWords:
    """A numbered list in random order, in which the common words stand ten times as often as each of the others.

    Attributes:
      common: common words. often, seldom: how often these and the others stand there. Hay is counted in other words.
    """

    common: int = 10
    often: int = 30
    seldom: int = 3

    def ask(self, rng: np.random.Generator) -> Asked:
        words = different(rng, ADJECTIVES, NOUNS, self.common)
        question = f"What are the {self.common} most common words of the list?"
        prefix = f"The {self.common} most common words of the list are:"
        return Asked(
            "Below is a list of words, of which some come more often than others.", [], question, prefix, words
        )

    def hay(self, rng: np.random.Generator, count: int, asked: Asked) -> list[str]:
        others = [w for w in different(rng, ADJECTIVES, NOUNS, count + self.common) if w not in asked.answers][:count]
        words = asked.answers * self.often + others * self.seldom
        return [f"{n}. {words[i]}" for n, i in enumerate(rng.permutation(len(words)), 1)]


@dataclasses.dataclass(frozen=True)
class FrequentWords:
    """Coded words, as often as 1 / rank^power, after dots, which are the most frequent; the next three are asked for.

    Attributes:
      vocabulary: words that are not asked for. power: see above. Hay is counted in places of words.
    """

    vocabulary: int = 50
    power: float = 2.0

    def ask(self, rng: np.random.Generator) -> Asked:
        words: list[str] = []
        while len(words) < 3:
            word = _coded(rng)
            words += [word] if word not in words else []
        prefix = "The three most frequent words, without the dots, are:"
        return Asked("The following text is coded. Find its most frequent words.", [], "Which are they?", prefix, words)

    def hay(self, rng: np.random.Generator, count: int, asked: Asked) -> list[str]:
        words = ["...", *asked.answers, *(_coded(rng) for _ in range(self.vocabulary))]
        share = np.arange(1, len(words) + 1) ** -self.power
        times = np.round(share / share.sum() * count).astype(int)  # as often as expected, so the order is certain
        if times[3] <= times[4]:
            raise UserError(f"of {count} words the first three are not more frequent than the others: make it longer")
        text = np.repeat(np.arange(len(words)), times)
        return [words[i] for i in rng.permutation(text)]


def _coded(rng: np.random.Generator) -> str:
    return "".join("abcdefghijklmnopqrstuvwxyz"[i] for i in rng.integers(0, 26, 6))
