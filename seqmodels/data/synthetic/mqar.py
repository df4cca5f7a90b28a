"""Multi-query associative recall (Arora et al. 2023, "Zoology"; 2024, "Based"), as in the Zoology repository."""

import dataclasses

import numpy as np

from seqmodels.data.synthetic.task import Rows, Task, draw, only, refuse_length

FILLER = 0


@dataclasses.dataclass(frozen=True)
class Mqar(Task):
    """Pairs of key and value come first. Then every key comes again, after a gap that is short more often than long.

    Ids: 0 filler, 1 to V/2 - 1 keys, V/2 to V - 1 values. In a row of n tokens with p pairs, all keys differ, and all
    values differ. After the 2 p tokens of the pairs come (n - 2 p) / 2 slots of two tokens. Key i is queried at the
    first token of slot g_i. The g are drawn without replacement, with P(g) proportional to (g + 1)^(a - 1); a = 1 is
    uniform. Loss mask: the p queries. The target is at the query itself, and is the key's value (nothing is shifted;
    the value does not follow). A row shorter than T is padded with filler, which has no targets.

    Attributes:
      vocab: V.
      shapes: (n, p, share) of each kind of row. The kinds occur in proportion to their shares.
      test_shapes: (n, p) of further rows to evaluate a trained model on.
      power: a.
      random_filler: whether the filler is random ids (harder) in place of 0.
    """

    vocab: int = 8192
    shapes: tuple = ((64, 4, 1.0),)
    test_shapes: tuple = ()
    power: float = 0.01
    random_filler: bool = False

    def __post_init__(self) -> None:
        if self.vocab < 4:
            self.refuse("vocab", "at least 4")
        if not self.power > 0:
            self.refuse("power", "greater than 0")
        if not self.shapes or any(len(shape) != 3 or not shape[2] > 0 for shape in self.shapes):
            self.refuse("shapes", "triples of tokens, pairs and a share greater than 0")
        if any(len(shape) != 2 for shape in self.test_shapes):
            self.refuse("test_shapes", "pairs of tokens and pairs")
        for field in ("shapes", "test_shapes"):
            for tokens, pairs, *_ in getattr(self, field):
                if tokens % 2 or pairs < 1 or 4 * pairs > tokens:
                    self.refuse(field, "of an even number of tokens, at least 4 for each of at least one pair")
                if pairs > self.vocab // 2 - 1:
                    self.refuse(field, f"of at most {self.vocab // 2 - 1} pairs, as vocab={self.vocab} has keys")

    @property
    def symbols(self) -> list[str]:
        half = self.vocab // 2
        return ["_", *(f"k{i}" for i in range(1, half)), *(f"v{i}" for i in range(self.vocab - half))]

    def check(self, length: int) -> None:
        longest = max(tokens for tokens, *_ in self.shapes)
        if length < longest:
            refuse_length(length, f"at least {longest}, the longest of config.data.task.shapes")

    def rows(self, rng: np.random.Generator, count: int, length: int) -> Rows:
        share = np.array([share for *_, share in self.shapes])
        kind = rng.choice(len(self.shapes), count, p=share / share.sum())
        read = np.full((count, length), FILLER, np.int32)
        targets = np.zeros_like(read)
        answers = np.zeros(read.shape, bool)
        for i, (tokens, pairs, _) in enumerate(self.shapes):
            mine = np.flatnonzero(kind == i)
            if len(mine):
                read[mine, :tokens], targets[mine, :tokens], answers[mine, :tokens] = self._kind(
                    rng, len(mine), tokens, pairs
                )
        return Rows(read, only(answers, targets), answers)

    def _kind(self, rng, count, tokens, pairs):
        half = self.vocab // 2
        keys = 1 + draw(rng, count, half - 1, pairs)
        values = half + draw(rng, count, self.vocab - half, pairs)
        places = 2 * pairs + 2 * gaps(rng, count, (tokens - 2 * pairs) // 2, pairs, self.power)
        read = np.full((count, tokens), FILLER, np.int32)
        if self.random_filler:
            read = rng.integers(0, self.vocab, read.shape, dtype=np.int32)
        read[:, 0 : 2 * pairs : 2], read[:, 1 : 2 * pairs : 2] = keys, values
        np.put_along_axis(read, places, keys.astype(np.int32), axis=1)
        targets, answers = np.zeros_like(read), np.zeros(read.shape, bool)
        np.put_along_axis(targets, places, values.astype(np.int32), axis=1)
        np.put_along_axis(answers, places, True, axis=1)
        return read, targets, answers

    def tests(self, lengths: tuple[int, ...]) -> dict[str, tuple[Task, int]]:
        return {
            f"{tokens}x{pairs}": (dataclasses.replace(self, shapes=((tokens, pairs, 1.0),), test_shapes=()), tokens)
            for tokens, pairs in self.test_shapes
        }


def gaps(rng: np.random.Generator, count: int, space: int, size: int, power: float) -> np.ndarray:
    """[count, size] int: in each row different g < space, drawn one after another with P(g) ~ (g + 1)^(power - 1).

    The indices of the largest values of log P + Gumbel noise are such a draw (Efraimidis and Spirakis 2006).
    """
    noisy = (power - 1) * np.log(np.arange(1, space + 1)) + rng.gumbel(size=(count, space))
    return np.argsort(-noisy, axis=1)[:, :size]
