"""ListOps (Nangia and Bowman 2018) as in the Long Range Arena (Tay et al. 2020), read as in the S4 repository."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from seqmodels.data.synthetic.bits import with_answer
from seqmodels.data.synthetic.task import Rows, Task, refuse_length

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")  # ids 10 to 13
CLOSE, END, PAD = 14, 15, 16
OPERATOR_SHARE = 0.25  # share of operators among the nodes above the deepest level
ATTEMPTS = 100_000  # most trees that are drawn to find one of an allowed size


@dataclasses.dataclass(frozen=True)
class ListOps(Task):
    """The value, a digit, of nested minimum, maximum, median (rounded down) and sum modulo 10.

    A node above the deepest level is an operator with probability 1/4; all other nodes are digits. An operator has 2 to
    `arguments` nodes. All choices are uniform. Trees are drawn until one has more than `shortest` and fewer than
    `longest` tokens, where an operator counts as two tokens: itself and its "]". There are no other brackets. After the
    tree come the end and padding. Loss mask: the end, whose target is the value.

    Ids: 0 to 9 digits, 10 to 13 operators, 14 "]", 15 the end, 16 padding.

    Attributes:
      depth: most levels of nodes. arguments: most arguments of an operator. shortest, longest: see above.
    """

    depth: int = 10
    arguments: int = 10
    shortest: int = 500
    longest: int = 2000

    def __post_init__(self) -> None:
        if self.depth < 2:
            self.refuse("depth", "at least 2")
        if self.arguments < 2:
            self.refuse("arguments", "at least 2")
        if self.shortest < 0:
            self.refuse("shortest", "at least 0")
        if self.longest < self.shortest + 2:
            self.refuse("longest", f"at least {self.shortest + 2}, two more than shortest")
        if self.shortest + 1 > (most := self._most_tokens()):
            self.refuse("shortest", f"less than {most}, the tokens of the largest tree of this depth")

    def _most_tokens(self) -> int:
        most = 1
        for _ in range(self.depth - 1):
            most = 2 + self.arguments * most
        return most

    @property
    def symbols(self) -> list[str]:
        return [*map(str, range(10)), *OPERATORS, "]", "=", "_"]

    def check(self, length: int) -> None:
        if length < self.longest:
            refuse_length(length, f"at least config.data.task.longest, {self.longest}")

    def rows(self, rng: np.random.Generator, count: int, length: int) -> Rows:
        text, sizes = np.zeros((count, length), np.int32), np.zeros((count, 1), int)
        results = np.zeros((count, 1), np.int32)
        for row in range(count):
            tokens = self._accepted(rng)
            sizes[row], results[row] = len(tokens), value(tokens)
            text[row, : len(tokens)] = tokens
        return Rows(*with_answer(text, sizes, results, END, PAD))

    def tests(self, lengths: tuple[int, ...]) -> dict[str, tuple[Task, int]]:
        return {}

    def _accepted(self, rng) -> list[int]:
        """Ids of a random tree of an allowed size. Raises: UserError if there is hardly any."""
        for _ in range(ATTEMPTS):
            if self.shortest < len(tokens := self._tree(rng)) < self.longest:
                return tokens
        allowed = f"smaller, as of {ATTEMPTS:,} random trees none has more tokens, and fewer than {self.longest}"
        self.refuse("shortest", f"{allowed}; or longest or depth larger")

    def _tree(self, rng) -> list[int]:
        """Ids of a random tree. The tree is cut off as soon as it is too long to be accepted."""
        numbers: Iterator[float] = iter(())

        def random() -> float:  # drawing them one by one would be slow
            nonlocal numbers
            if (number := next(numbers, None)) is None:
                numbers = iter(rng.random(256).tolist())
                number = next(numbers)
            return number

        tokens: list[int] = []
        todo = [1]  # levels of the nodes that are still to come; 0 closes an operator
        while todo and len(tokens) < self.longest:
            level = todo.pop()
            if level == 0:
                tokens.append(CLOSE)
            elif level < self.depth and random() < OPERATOR_SHARE:
                tokens.append(10 + int(random() * len(OPERATORS)))
                arguments = 2 + int(random() * (self.arguments - 1))
                todo += [0, *[level + 1] * arguments]
            else:
                tokens.append(int(random() * 10))
        return tokens


def value(tokens: list[int]) -> int:
    """The value, a digit, of a tree that is given by its tokens."""
    stack: list[tuple[str, list[int]]] = []  # operators that are open, each with its arguments so far
    for token in tokens:
        if 10 <= token < CLOSE:
            stack.append((OPERATORS[token - 10], []))
            continue
        result = token
        if token == CLOSE:
            name, arguments = stack.pop()
            match name:
                case "[MIN":
                    result = min(arguments)
                case "[MAX":
                    result = max(arguments)
                case "[MED":
                    arguments.sort()
                    middle = len(arguments) // 2
                    result = arguments[middle] if len(arguments) % 2 else sum(arguments[middle - 1 : middle + 1]) // 2
                case "[SM":
                    result = sum(arguments) % 10
        if not stack:
            return result
        stack[-1][1].append(result)
    raise ValueError("the tree does not end")
