"""What a generator of questions is: text of any length, with one question about it."""

from typing import Any, NamedTuple, Protocol

import numpy as np


class Asked(NamedTuple):
    """A question in parts, of which `hay` is as long as one likes.

    Attributes:
      introduction, question, answer_prefix: texts.
      needles: sentences or lines that must be among the hay, in this order.
      answers: what should be answered; every one of them, if there are several.
      join: what stands between two pieces.
    """

    introduction: str
    needles: list[str]
    question: str
    answer_prefix: str
    answers: list[str]
    join: str = " "


class Task(Protocol):
    """A kind of question."""

    def ask(self, rng: np.random.Generator) -> Asked:
        """A random question."""

    def hay(self, rng: np.random.Generator, count: int, asked: Asked) -> list[str]:
        """`count` sentences or lines that do not change the answer; `UserError` if there are no such lists."""


def line(task: Task, seed: list[int], count: int) -> dict[str, Any]:
    """A question among `count` pieces of hay, as a line of a file of the evaluator `qa`.

    It is a pure function of the seed and the count. The question follows from the seed alone.
    """
    asked = task.ask(np.random.default_rng([*seed, 0]))
    pieces = task.hay(np.random.default_rng([*seed, 1]), count, asked)
    places = np.sort(np.random.default_rng([*seed, 2]).random(len(asked.needles)))  # shares of the hay before each
    for needle, place in zip(reversed(asked.needles), reversed((places * (len(pieces) + 1)).astype(int)), strict=True):
        pieces.insert(int(place), needle)
    context = "\n".join(filter(None, [asked.introduction, asked.join.join(pieces)]))
    return dict(context=context, question=asked.question, answer_prefix=asked.answer_prefix, answers=asked.answers)
