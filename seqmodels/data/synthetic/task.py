"""Base of synthetic tasks: settings, and rows that are a pure function of a random generator."""

import dataclasses
from typing import ClassVar, NamedTuple, NoReturn

import numpy as np

from seqmodels.errors import UserError

NOTHING = -1  # target at positions without a prediction


class Rows(NamedTuple):
    """Rows of a task.

    tokens: [n, T] int32, what the model reads.
    targets: [n, T] int32, the id that the model should predict after reading a token, or NOTHING. They are already
      shifted.
    answers: [n, T] bool, the loss mask: True at the positions of the task's answers, which all have a target.
      Targets at other positions are the next tokens.
    allowed: [n, T, V] bool, the ids that count as right at each answer, if these are not only the target. The target
      is then drawn uniformly from them.
    source: [n, K] int32, what a row was made from, if rows from the same are to be on one side of the splits; else
      the same rows are.
    """

    tokens: np.ndarray
    targets: np.ndarray
    answers: np.ndarray
    allowed: np.ndarray | None = None
    source: np.ndarray | None = None

    @property
    def origin(self) -> np.ndarray:
        """[n, K] int32, what decides the side of the splits."""
        return self.tokens if self.source is None else self.source

    def take(self, kept: np.ndarray) -> "Rows":
        """The rows of these numbers."""
        return joined([self], kept)


def joined(pieces: list[Rows], kept: np.ndarray | slice = slice(None)) -> Rows:
    """Rows of one task one after the other, those of the numbers `kept`."""
    fields = {name: [getattr(rows, name) for rows in pieces] for name in Rows._fields}
    return Rows(**{name: np.concatenate(parts)[kept] for name, parts in fields.items() if parts[0] is not None})


@dataclasses.dataclass(frozen=True)
class Task:
    """Settings of a task; subclasses add fields, which come from `config.data.task`.

    Attributes:
      has_depth: whether the task has a field `depth`: the position of the hidden item, as a share of the row's length.
      has_horizon: whether every answer depends on all tokens before it: the number of tokens after which a model begins
        to fail is then its horizon.
      objective: name of the head that the rows are for. With "next_token" an answer is read at its place, with
        "rebuild" all are read behind the row.
      by_tokens: whether `Rows.source` is None: rows are held out of training by their tokens.
    """

    has_depth: ClassVar[bool] = False
    has_horizon: ClassVar[bool] = False
    objective: ClassVar[str] = "next_token"
    by_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Raises UserError for settings that do not fit."""

    @property
    def symbols(self) -> list[str]:
        """A name for each token id, without spaces."""
        raise NotImplementedError

    def check(self, length: int) -> None:
        """Raises UserError if the task has no rows of `length` tokens."""

    def rows(self, rng: np.random.Generator, count: int, length: int) -> Rows:
        """`count` rows of `length` tokens, a length that `check` accepts."""
        raise NotImplementedError

    def tests(self, lengths: tuple[int, ...]) -> dict[str, tuple["Task", int]]:
        """Further tests of a trained model besides its own task: name -> task and length of a row in tokens."""
        return {str(length): (self, length) for length in lengths}

    def refuse(self, field: str, allowed: str) -> NoReturn:
        """Raises UserError for a field of this task."""
        raise UserError(f"config.data.task.{field}={getattr(self, field)!r}: must be {allowed}")


def refuse_length(length: int, allowed: str) -> NoReturn:
    """Raises UserError for a length of rows."""
    raise UserError(f"config.seq_len={length}: must be {allowed}")


def next_tokens(tokens: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Targets [n, T] of rows [n, T]: the next tokens, and `last` [n] after the end."""
    return np.concatenate([tokens[:, 1:], last[:, None]], axis=1)


def only(answers: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """int32 targets at the answers, NOTHING elsewhere."""
    return np.where(answers, targets, NOTHING).astype(np.int32)


def draw(rng: np.random.Generator, count: int, choices: int, size: int) -> np.ndarray:
    """[count, size] int: in each row, different numbers below `choices`, in random order."""
    numbers = rng.random((count, choices))
    first = np.argpartition(numbers, size - 1, axis=1)[:, :size]  # the smallest, but not in random order
    order = np.argsort(np.take_along_axis(numbers, first, axis=1), axis=1)
    return np.take_along_axis(first, order, axis=1)
