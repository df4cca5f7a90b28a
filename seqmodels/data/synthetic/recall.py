"""Associative recall (Ba et al. 2016), as in the H3 and Hyena repositories: pairs of key and value, and one query."""

import dataclasses

import numpy as np

from seqmodels.data.synthetic.task import Rows, Task, next_tokens, refuse_length


@dataclasses.dataclass(frozen=True)
class AssociativeRecall(Task):
    """Each row has a random map from keys to values. It shows pairs of this map, a marker, and a key shown before.

    Ids: the first half of the V - 1 symbols are keys and the others values; V - 1 is the marker. Pairs are drawn with
    repetition. The last key is uniform among the keys shown. T = 2 pairs + 2. Loss mask: the last position, that of the
    last key. At all other positions the next token is a target, too, for `config.data.loss = "all"`: the value after a
    key that was shown before is predictable.

    Attributes:
      vocab: V, with the marker.
    """

    vocab: int = 21

    def __post_init__(self) -> None:
        if self.vocab < 5:
            self.refuse("vocab", "at least 5: two keys, two values and the marker")

    @property
    def keys(self) -> int:
        """Number of keys."""
        return (self.vocab - 1) // 2

    @property
    def symbols(self) -> list[str]:
        return [*(f"k{i}" for i in range(self.keys)), *(f"v{i}" for i in range(self.vocab - 1 - self.keys)), "=>"]

    def check(self, length: int) -> None:
        if length < 4 or length % 2:
            refuse_length(length, "even and at least 4: pairs, the marker and a key")

    def rows(self, rng: np.random.Generator, count: int, length: int) -> Rows:
        values = rng.integers(self.keys, self.vocab - 1, (count, self.keys), dtype=np.int32)  # of each key
        shown = rng.integers(0, self.keys, (count, length // 2 - 1), dtype=np.int32)
        there = np.zeros((count, self.keys), bool)
        np.put_along_axis(there, shown, True, axis=1)
        asked = np.where(there, rng.random((count, self.keys)), -1).argmax(axis=1)[:, None]
        read = np.empty((count, length), np.int32)
        read[:, 0:-2:2] = shown
        read[:, 1:-2:2] = np.take_along_axis(values, shown, axis=1)
        read[:, -2], read[:, -1:] = self.vocab - 1, asked
        answer = np.take_along_axis(values, asked, axis=1)[:, 0]
        answers = np.broadcast_to(np.arange(length) == length - 1, read.shape)
        return Rows(read, next_tokens(read, answer), answers)
