"""Induction heads (Olsson et al. 2022; Gu and Dao 2023, section 4.1.2), as in the Hyena repository with one trigger."""

import dataclasses

import numpy as np

from seqmodels.data.synthetic.task import Rows, Task, next_tokens, refuse_length


@dataclasses.dataclass(frozen=True)
class Induction(Task):
    """Random tokens with the trigger at a random place, and again at the end. The answer is the token after the first.

    Ids: 0 to V - 2 random tokens, V - 1 the trigger. The position of the first trigger is uniform on 0 to T - 4. Loss
    mask: the last position. At all other positions the next token is a target, too, for `config.data.loss = "all"`.

    Attributes:
      vocab: V, with the trigger.
    """

    vocab: int = 16

    def __post_init__(self) -> None:
        if self.vocab < 3:
            self.refuse("vocab", "at least 3: two tokens and the trigger")

    @property
    def symbols(self) -> list[str]:
        return [*map(str, range(self.vocab - 1)), "=>"]

    def check(self, length: int) -> None:
        if length < 4:
            refuse_length(length, "at least 4")

    def rows(self, rng: np.random.Generator, count: int, length: int) -> Rows:
        trigger = self.vocab - 1
        read = rng.integers(0, trigger, (count, length), dtype=np.int32)
        place = rng.integers(0, length - 3, (count, 1))
        np.put_along_axis(read, place, trigger, axis=1)
        read[:, -1] = trigger
        answer = np.take_along_axis(read, place + 1, axis=1)[:, 0]
        answers = np.broadcast_to(np.arange(length) == length - 1, read.shape)
        return Rows(read, next_tokens(read, answer), answers)
