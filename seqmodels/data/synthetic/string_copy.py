"""Copying a string, and looking up what follows a part of it (Jelassi et al. 2024, "Repeat after me", 2402.01032)."""

import dataclasses

import numpy as np

from seqmodels.data.synthetic.task import Rows, Task, only, refuse_length

LETTERS = "abcdefghijklmnopqrstuvwxyz"
START, BAR, END, PAD = "$", "|", ".", "_"
CROWDED = 5  # letters of s for each g that there can be, from which on hardly any stands in s only once


@dataclasses.dataclass(frozen=True)
class StringCopy(Task):
    """A string s of uniform letters, and a question about it.

    ask = "copy": `$ s | s .`, the whole string again.
    ask = "prefix": `$ g | s | a .`. g stands in s once, and a is the `follow` letters behind it: the question is known
      before the string.
    ask = "suffix": `$ s | g | a .`: the question comes after the string.

    The string's length is uniform from `shortest` to what fits into T tokens; the rest is padding. Loss mask: where the
    letters after the last `|` and the `.` are predicted.

    Attributes:
      ask: see above.
      letters: how many letters there are. shortest: fewest letters of s; 0: as many as fit.
      gram: letters of g. follow: letters of a.
    """

    ask: str = "copy"
    letters: int = 26
    shortest: int = 1
    gram: int = 2
    follow: int = 2

    def __post_init__(self) -> None:
        if self.ask not in ("copy", "prefix", "suffix"):
            self.refuse("ask", "'copy', 'prefix' or 'suffix'")
        if not 2 <= self.letters <= len(LETTERS):
            self.refuse("letters", f"from 2 to {len(LETTERS)}")
        for field in ("gram", "follow"):
            if getattr(self, field) < 1:
                self.refuse(field, "at least 1")
        if self.shortest < 0:
            self.refuse("shortest", "at least 0")

    @property
    def symbols(self) -> list[str]:
        return [*LETTERS[: self.letters], START, BAR, END, PAD]

    @property
    def fewest(self) -> int:
        """Letters that s has at least."""
        return max(self.shortest, 1 if self.ask == "copy" else self.gram + self.follow)

    def longest(self, length: int) -> int:
        """Most letters of s in a row whose last token is before the `.`."""
        return (length - 2) // 2 if self.ask == "copy" else length - 3 - self.gram - self.follow

    def check(self, length: int) -> None:
        if self.longest(length) < self.fewest:
            least = 2 * self.fewest + 2 if self.ask == "copy" else self.fewest + self.gram + self.follow + 3
            refuse_length(length, f"at least {least}, for a string of {self.fewest} letters and the question")
        if self.ask != "copy" and self.longest(length) > (most := CROWDED * self.letters**self.gram):
            why = f"a string has {self.longest(length)} letters, and with over {most} almost no part of it is unique"
            self.refuse("gram", f"larger, or config.seq_len smaller: {why}")

    def rows(self, rng: np.random.Generator, count: int, length: int) -> Rows:
        longest = self.longest(length)
        read = np.full((count, length), self.symbols.index(PAD), np.int32)
        targets, answers = np.zeros_like(read), np.zeros(read.shape, bool)
        for row, size in enumerate(rng.integers(self.fewest if self.shortest else longest, longest + 1, count)):
            question, answer = self._row(rng, int(size))
            text = np.array([self.symbols.index(c) for c in question + answer], np.int32)
            read[row, : len(text) - 1], targets[row, : len(text) - 1] = text[:-1], text[1:]
            answers[row, len(question) - 1 : len(text) - 1] = True
        return Rows(read, only(answers, targets), answers)

    def tests(self, lengths: tuple[int, ...]) -> dict[str, tuple[Task, int]]:
        return {str(n): (dataclasses.replace(self, shortest=0), n) for n in lengths}

    def _row(self, rng: np.random.Generator, size: int) -> tuple[str, str]:
        """The row up to the last `|`, and the answer with the `.`."""
        while True:
            s = "".join(LETTERS[i] for i in rng.integers(0, self.letters, size))
            if self.ask == "copy":
                return f"{START}{s}{BAR}", s + END
            place = int(rng.integers(0, size - self.gram - self.follow + 1))
            g = s[place : place + self.gram]
            if s.find(g) == s.rfind(g):
                first, second = (g, s) if self.ask == "prefix" else (s, g)
                return f"{START}{first}{BAR}{second}{BAR}", s[place + self.gram :][: self.follow] + END
