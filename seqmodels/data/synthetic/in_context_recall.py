"""In-context recall of the MAD suite (Poli et al. 2024, arXiv 2403.17844, appendix B), plain and with noise."""

import dataclasses

import numpy as np

from seqmodels.data.synthetic.task import Rows, Task, next_tokens, refuse_length


@dataclasses.dataclass(frozen=True)
class InContextRecall(Task):
    """Pairs of key and value from a random map. Keys come again, and each time the value is asked.

    Ids: of the first V - N symbols the first half are keys and the others values; the last N are noise. Every row has
    a map of its own, whose values may be equal. A pair is a uniform key with its value, or, with probability `noise`,
    two uniform symbols of noise. T is odd: pairs, and a last key, which is uniform among the keys shown. Loss mask: the
    keys that were shown before. At all other positions the next token is a target, too, for `config.data.loss = "all"`,
    as MAD trains.

    Attributes:
      vocab: V. noise_vocab: N. noise: share of the pairs that are noise.
    """

    vocab: int = 16
    noise_vocab: int = 0
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self.noise_vocab < 0 or self.vocab - self.noise_vocab < 2:
            self.refuse("noise_vocab", f"from 0 to config.data.task.vocab - 2, {self.vocab - 2}")
        if not 0 <= self.noise < 1:
            self.refuse("noise", "at least 0 and less than 1")
        if self.noise and not self.noise_vocab:
            self.refuse("noise_vocab", "at least 1 with noise")

    @property
    def keys(self) -> int:
        """Number of keys."""
        return (self.vocab - self.noise_vocab) // 2

    @property
    def values(self) -> int:
        """Number of values."""
        return self.vocab - self.noise_vocab - self.keys

    @property
    def symbols(self) -> list[str]:
        kinds = (("k", self.keys), ("v", self.values), ("n", self.noise_vocab))
        return [f"{letter}{i}" for letter, size in kinds for i in range(size)]

    def check(self, length: int) -> None:
        if length < 3 or not length % 2:
            refuse_length(length, "odd and at least 3: pairs, and the last key")

    def rows(self, rng: np.random.Generator, count: int, length: int) -> Rows:
        pairs, real = length // 2, self.keys + self.values
        values = rng.integers(self.keys, real, (count, self.keys), dtype=np.int32)  # of each key
        shown = rng.integers(0, self.keys, (count, pairs), dtype=np.int32)
        noisy = rng.random((count, pairs)) < self.noise
        noisy[np.arange(count), rng.integers(0, pairs, count)] = False  # one pair at least
        there = (shown[..., None] == np.arange(self.keys)) & ~noisy[..., None]
        so_far = np.cumsum(there, axis=1) - there
        again = np.take_along_axis(so_far, shown[..., None], axis=2)[..., 0] > 0
        last = np.where(there.any(axis=1), rng.random((count, self.keys)), -1).argmax(axis=1)[:, None]

        read = np.empty((count, length), np.int32)
        read[:, 0:-1:2], read[:, 1::2], read[:, -1:] = shown, np.take_along_axis(values, shown, axis=1), last
        hidden = np.append(np.repeat(noisy, 2, axis=1), np.zeros((count, 1), bool), axis=1)
        read = np.where(hidden, rng.integers(real, max(self.vocab, real + 1), read.shape, dtype=np.int32), read)
        answers = np.zeros(read.shape, bool)
        answers[:, 0:-1:2], answers[:, -1] = again & ~noisy, True
        return Rows(read, next_tokens(read, np.take_along_axis(values, last, axis=1)[:, 0]), answers)
