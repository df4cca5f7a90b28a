"""Fuzzy in-context recall of the MAD suite (Poli et al. 2024, arXiv 2403.17844, appendix B)."""

import dataclasses

import numpy as np

from seqmodels.data.synthetic.task import Rows, Task, only, refuse_length

Motif = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class FuzzyRecall(Task):
    """Recall whose keys and values are motifs of several symbols, of different lengths.

    Ids: of the first V - 1 symbols the first half are for keys and the others for values; V - 1 is padding. Every row
    has a map of its own from motifs to motifs. A motif has different symbols, in any order; its length is uniform, and
    so is the motif among those of its length. A row is padding, pairs of key and value as long as they fit, and one of
    the keys shown, uniformly, with its value less the last symbol. Loss mask: all symbols of the value of a key that
    was shown before, each asked at the symbol before it.

    Of MAD's rows only the key that is asked last is certain to be there twice, too.

    Attributes:
      vocab: V. longest: most symbols of a motif. shortest: fewest symbols of a key. A trained model is measured on rows
        with shortest = longest, too, as MAD's test is.
    """

    vocab: int = 16
    longest: int = 3
    shortest: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.longest <= (self.vocab - 1) // 2:
            self.refuse("longest", f"from 1 to {(self.vocab - 1) // 2}, as vocab={self.vocab} has symbols for keys")
        if not 1 <= self.shortest <= self.longest:
            self.refuse("shortest", f"from 1 to config.data.task.longest, {self.longest}")

    @property
    def symbols(self) -> list[str]:
        keys = (self.vocab - 1) // 2
        return [*(f"k{i}" for i in range(keys)), *(f"v{i}" for i in range(self.vocab - 1 - keys)), "_"]

    def check(self, length: int) -> None:
        if length < 4 * self.longest:
            refuse_length(length, f"at least {4 * self.longest}, 4 * config.data.task.longest")

    def rows(self, rng: np.random.Generator, count: int, length: int) -> Rows:
        read = np.full((count, length), self.vocab - 1, np.int32)
        targets, answers = np.zeros_like(read), np.zeros(read.shape, bool)
        for row in range(count):
            text, asked = self._row(rng, length + 1)
            read[row, -len(text) + 1 :] = text[:-1]
            targets[row, -len(text) + 1 :] = text[1:]
            answers[row, -len(text) + 1 :] = asked[1:]
        return Rows(read, only(answers, targets), answers)

    def tests(self, lengths: tuple[int, ...]) -> dict[str, tuple[Task, int]]:
        hard = dataclasses.replace(self, shortest=self.longest)
        return super().tests(lengths) | {f"{n}, longest keys": (hard, n) for n in lengths}

    def _row(self, rng: np.random.Generator, room: int) -> tuple[list[int], list[bool]]:
        """A row with its last symbol, of at most `room` symbols, and which of them are asked."""
        keys = (self.vocab - 1) // 2
        known: dict[Motif, Motif] = {}
        text: list[int] = []
        asked: list[bool] = []

        def show(key: Motif) -> None:
            again = key in known
            value = known.setdefault(key, self._motif(rng, 1, keys, self.vocab - 1))
            text.extend(key + value)
            asked.extend([False] * len(key) + [again] * len(value))

        while not text or len(text) + 4 * self.longest <= room:  # this pair and the last one fit
            show(self._motif(rng, self.shortest, 0, keys))
        show(list(known)[rng.integers(len(known))])
        return text, asked

    def _motif(self, rng: np.random.Generator, shortest: int, first: int, end: int) -> Motif:
        """Different symbols from `first` to `end`, in any order."""
        size = rng.integers(shortest, self.longest + 1)
        return tuple(int(x) for x in first + rng.permutation(end - first)[:size])
