"""Word problems of groups (Barrington 1989; Merrill et al. 2024, "The illusion of state"): tracking a state exactly."""

import dataclasses
from typing import ClassVar

import numpy as np

from seqmodels.data.synthetic.groups import group_table
from seqmodels.data.synthetic.task import Rows, Task, only, refuse_length


@dataclasses.dataclass(frozen=True)
class WordProblem(Task):
    """Uniform elements g_1 ... g_k of a group. The target at g_t is the product g_1 g_2 ... g_t.

    The word problems of S5 and A5 are complete for NC1. No model of constant depth whose states only decay solves them
    at all lengths. Z60 has as many elements as A5, but is commutative. Ids: 0 to |G| - 1 the elements (0 the identity),
    |G| padding. Loss mask: all k positions. A row is a word and padding; the word's length is uniform on `shortest` to
    T.

    Attributes:
      group: "s3", "s5", "a5", "z60", "a4xz5", ...: see `group_table`.
      shortest: fewest elements; 0 makes all words T long.
    """

    has_horizon: ClassVar[bool] = True

    group: str = "s5"
    shortest: int = 0

    def __post_init__(self) -> None:
        group_table(self.group)
        if self.shortest < 0:
            self.refuse("shortest", "at least 0")

    @property
    def symbols(self) -> list[str]:
        return [*(f"g{i}" for i in range(len(group_table(self.group)))), "_"]

    def check(self, length: int) -> None:
        if length < max(self.shortest, 1):
            refuse_length(length, f"at least {max(self.shortest, 1)}, config.data.task.shortest")

    def rows(self, rng: np.random.Generator, count: int, length: int) -> Rows:
        table = group_table(self.group)
        words = rng.integers(0, len(table), (count, length), dtype=np.int32)
        products = np.empty_like(words)
        product = np.zeros(count, np.int32)
        for t in range(length):
            products[:, t] = product = table[product, words[:, t]]
        sizes = rng.integers(self.shortest or length, length + 1, (count, 1))
        answers = np.arange(length) < sizes
        return Rows(np.where(answers, words, len(table)).astype(np.int32), only(answers, products), answers)

    def tests(self, lengths: tuple[int, ...]) -> dict[str, tuple[Task, int]]:
        return {str(n): (dataclasses.replace(self, shortest=0), n) for n in lengths}
