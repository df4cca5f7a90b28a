"""Modular arithmetic, plain and with brackets (Deletang et al. 2022, "Neural networks and the Chomsky hierarchy")."""

import dataclasses
from typing import ClassVar

import numpy as np

from seqmodels.data.synthetic.bits import with_answer
from seqmodels.data.synthetic.task import Rows, Task, refuse_length

OPERATORS = "+-*"


@dataclasses.dataclass(frozen=True)
class ModularArithmetic(Task):
    """The value of an expression modulo m.

    Plain: numbers and operators alternate, the number of tokens is odd, and products come before sums. With brackets:
    an expression of n >= 5 tokens is "(left operator right)", and the n - 3 other tokens are split uniformly; an
    expression of 1 to 4 tokens is d, -d, (d) or (-d). Numbers and operators are uniform. A row is an expression, "=",
    and padding. The expression's length is uniform on `shortest` to T - 1 tokens (plain: on the odd lengths). Loss
    mask: the "="; the target there is the value.

    Ids: 0 to m - 1 numbers, then + - * ( ) = and padding.

    Attributes:
      modulus: m.
      brackets: with brackets.
      operators: the operators that occur, out of + - *. The paper has all of them in plain expressions, and + and -
        in expressions with brackets.
      shortest: fewest tokens of an expression; 0 makes all as long as fits.
    """

    has_horizon: ClassVar[bool] = True

    modulus: int = 5
    brackets: bool = False
    operators: str = "+-*"
    shortest: int = 0

    def __post_init__(self) -> None:
        if self.modulus < 2:
            self.refuse("modulus", "at least 2")
        if not self.operators or not set(self.operators) <= set(OPERATORS):
            self.refuse("operators", f"one or several of {OPERATORS}")
        if self.shortest < 0:
            self.refuse("shortest", "at least 0")

    @property
    def symbols(self) -> list[str]:
        return [*map(str, range(self.modulus)), *OPERATORS, "(", ")", "=", "_"]

    def check(self, length: int) -> None:
        if length <= max(self.shortest, 1):
            refuse_length(length, f"more than config.data.task.shortest, and at least 2: {max(self.shortest, 1) + 1}")
        if not self.brackets and self.shortest and not self.shortest % 2 and length == self.shortest + 1:
            refuse_length(length, "such that an odd number of tokens fits before the '='")

    def rows(self, rng: np.random.Generator, count: int, length: int) -> Rows:
        make = self._bracketed if self.brackets else self._plain
        expressions, sizes, values = make(rng, count, length)
        end = self.modulus + len(OPERATORS) + 2
        return Rows(*with_answer(expressions, sizes, values, end, end + 1))

    def tests(self, lengths: tuple[int, ...]) -> dict[str, tuple[Task, int]]:
        return {str(n): (dataclasses.replace(self, shortest=0), n) for n in lengths}

    def _plain(self, rng, count, length):
        longest = length - 1 - length % 2  # the odd number of tokens that fits
        shortest = (self.shortest or longest) // 2 * 2 + 1
        sizes = rng.integers(shortest // 2, longest // 2 + 1, (count, 1)) * 2 + 1
        numbers = rng.integers(0, self.modulus, (count, longest // 2 + 1), dtype=np.int32)
        allowed = np.array([OPERATORS.index(name) for name in self.operators], np.int32)
        operators = rng.choice(allowed, (count, longest // 2))
        text = np.zeros((count, length), np.int32)
        text[:, 0:longest:2], text[:, 1:longest:2] = numbers, self.modulus + operators
        running = values(numbers, operators, self.modulus)
        return text, sizes, np.take_along_axis(running, sizes // 2, axis=1)

    def _bracketed(self, rng, count, length):
        sizes = rng.integers(self.shortest or length - 1, length, (count, 1))
        text, results = np.zeros((count, length), np.int32), np.zeros((count, 1), np.int32)
        for row, (size,) in enumerate(sizes):
            symbols, results[row] = self.expression(rng, int(size))
            text[row, :size] = symbols
        return text, sizes, results

    def expression(self, rng: np.random.Generator, size: int) -> tuple[list[int], int]:
        """Ids and value of one expression with brackets. A stack replaces recursion: long expressions nest deeply."""
        m = self.modulus
        plus, minus, opening, closing = m, m + 1, m + 3, m + 4
        symbols: list[int] = []
        numbers: list[int] = []
        todo: list[int | str] = [size]  # sizes of parts; an operator, with and without its sides
        while todo:
            part = todo.pop()
            if isinstance(part, str):  # both sides are there: close the bracket
                right, left = numbers.pop(), numbers.pop()
                numbers.append({"+": left + right, "-": left - right, "*": left * right}[part] % m)
                symbols.append(closing)
            elif part < 0:  # an operator between the sides
                symbols.append(-part)
            elif part < 5:
                number = int(rng.integers(0, m))
                sign = [minus] if part % 2 == 0 else []
                inside = [*sign, number]
                symbols += [opening, *inside, closing] if part > 2 else inside
                numbers.append(-number % m if sign else number)
            else:
                left = int(rng.integers(1, part - 3))
                name = self.operators[int(rng.integers(0, len(self.operators)))]
                symbols.append(opening)
                todo += [name, part - 3 - left, -(plus + OPERATORS.index(name)), left]
        return symbols, numbers[0]


def values(numbers: np.ndarray, operators: np.ndarray, modulus: int) -> np.ndarray:
    """[n, k] int32: value of each expression up to its 1st, 2nd, ..., k-th number, products before sums.

    Args:
      numbers: [n, k]. operators: [n, k - 1], index in OPERATORS of the operator before each number but the first.
    """
    done, term = np.zeros_like(numbers[:, 0]), numbers[:, 0]  # sum of the finished terms, product of the open one
    running = [term]
    for number, operator in zip(numbers.T[1:], operators.T, strict=True):
        times = operator == OPERATORS.index("*")
        done = np.where(times, done, (done + term) % modulus)
        sign = np.where(operator == OPERATORS.index("-"), -1, 1)
        term = np.where(times, term * number, sign * number) % modulus
        running.append((done + term) % modulus)
    return np.stack(running, axis=1).astype(np.int32) % modulus
