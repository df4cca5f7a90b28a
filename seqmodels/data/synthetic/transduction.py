"""Tasks of "Neural Networks and the Chomsky Hierarchy" (Deletang et al. 2023, arXiv 2207.02098, appendix A): from a
string to a string. Parity and modular arithmetic are tasks of their own here."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from seqmodels.data.synthetic.modular_arithmetic import ModularArithmetic
from seqmodels.data.synthetic.task import Rows, Task, only, refuse_length

END, PAD, STOP = "=", "_", "."
Draw = Callable[[np.random.Generator, int], str]


@dataclasses.dataclass(frozen=True)
class Language:
    """Inputs of a language and their answers.

    Attributes:
      symbols: of inputs and answers, a character each.
      draw: a random input of exactly n symbols.
      answer: of an input.
      room: most symbols of the answer to n symbols.
      sizes: whether there are inputs of n symbols.
    """

    symbols: str
    draw: Draw
    answer: Callable[[str], str]
    room: Callable[[int], int] = lambda n: 1
    sizes: Callable[[int], bool] = lambda n: n >= 1


def uniform(symbols: str) -> Draw:
    """Draws each symbol uniformly."""
    return lambda rng, n: "".join(symbols[i] for i in rng.integers(0, len(symbols), n))


def around(text: str) -> str:
    """Where a walk on a circle of five ends: 0 stays, 1 goes on, 2 goes back."""
    return str((text.count("1") - text.count("2")) % 5)


def draw_stack(rng: np.random.Generator, n: int) -> str:
    """A stack, the bottom first, and actions: P takes the top off, A and B put an a or b on it."""
    size = int(rng.integers(0, n + 1))
    return uniform("ab")(rng, size) + uniform("PAB")(rng, n - size)


def final_stack(text: str) -> str:
    """The stack after the actions, the top first, and the stop. An empty one stays empty."""
    stack: list[str] = []
    for symbol in text:
        if symbol != "P":
            stack.append(symbol.lower())
        elif stack:
            stack.pop()
    return "".join(reversed(stack)) + STOP


def draw_equation(rng: np.random.Generator, n: int) -> str:
    """A bracketed expression modulo 5 with + and -, in which x is one number, "~", and its value."""
    task = ModularArithmetic(brackets=True, operators="+-")
    ids, value = task.expression(rng, n - 2)
    symbols = [task.symbols[i] for i in ids]
    places = [i for i, symbol in enumerate(symbols) if symbol.isdigit()]
    symbols[places[rng.integers(len(places))]] = "x"
    return "".join(symbols) + f"~{value}"


def solve(text: str) -> str:
    """The x of an equation. With + and - alone both sides are sums, in which x stands once."""
    left, right = text.split("~")
    outer, sign, total, of_x = [1], 1, 0, 1  # signs before the brackets that are open, and before the next symbol
    for symbol in left:
        if symbol == "(":
            outer.append(outer[-1] * sign)
        elif symbol == ")":
            outer.pop()
        elif symbol == "x":
            of_x = outer[-1] * sign
        elif symbol.isdigit():
            total += outer[-1] * sign * int(symbol)
        sign = -sign if symbol == "-" else 1
    return str((int(right) - total) * of_x % 5)


def draw_missing(rng: np.random.Generator, n: int) -> str:
    """A string of bits twice, in which one bit of 2 (n / 2) is a hole."""
    text = list(uniform("01")(rng, n // 2) * 2)
    text[rng.integers(len(text))] = "?"
    return "".join(text)


def missing(text: str) -> str:
    """The bit in the hole."""
    hole, half = text.index("?"), len(text) // 2
    return text[hole - half] if hole >= half else text[hole + half]


def operands(sign: str) -> Draw:
    """Two binary numbers, the lowest bit first, with a sign between them."""

    def draw(rng: np.random.Generator, n: int) -> str:
        first = int(rng.integers(1, n - 1))
        return uniform("01")(rng, first) + sign + uniform("01")(rng, n - 1 - first)

    return draw


def number(bits: str) -> int:
    """From bits, the lowest first."""
    return int(bits[::-1], 2)


def bits(value: int) -> str:
    """The lowest first, and the stop."""
    return f"{value:b}"[::-1] + STOP


def calculate(text: str) -> str:
    """The sum or the product."""
    a, b = (number(part) for part in text.replace("*", "+").split("+"))
    return bits(a * b if "*" in text else a + b)


LANGUAGES = {
    # regular
    "even_pairs": Language("ab01", uniform("ab"), lambda s: str(int(s[0] == s[-1]))),
    "cycle_navigation": Language("01234", uniform("012"), around),
    # deterministic context-free
    "stack": Language("abPAB.", draw_stack, final_stack, lambda n: n + 1),
    "reverse": Language("ab", uniform("ab"), lambda s: s[::-1], lambda n: n),
    "equation": Language("01234+-()x~", draw_equation, solve, sizes=lambda n: n >= 3),
    # context-sensitive
    "duplicate": Language("ab", uniform("ab"), lambda s: s + s, lambda n: 2 * n),
    "missing_duplicate": Language("01?", draw_missing, missing, sizes=lambda n: n >= 2 and n % 2 == 0),
    "odds_first": Language("ab", uniform("ab"), lambda s: s[::2] + s[1::2], lambda n: n),
    "addition": Language("01+.", operands("+"), calculate, lambda n: n, lambda n: n >= 3),
    "multiplication": Language("01*.", operands("*"), calculate, lambda n: n, lambda n: n >= 3),
    "sqrt": Language("01.", uniform("01"), lambda s: bits(math.isqrt(number(s))), lambda n: n // 2 + 2),
    "bucket_sort": Language("12345", uniform("12345"), lambda s: "".join(sorted(s)), lambda n: n),
}


@dataclasses.dataclass(frozen=True)
class Transduction(Task):
    """An input, "=", and room for its answer, all of which is asked: the first symbol at the "=", the others behind it.

    The input's length is uniform on the lengths from `shortest` that fit into T. Behind the "=" stands padding, so that
    no answer is shown.

    Attributes:
      language: a key of LANGUAGES.
      shortest: fewest symbols of the input; 0: as many as fit.
    """

    language: str = "reverse"
    shortest: int = 1

    def __post_init__(self) -> None:
        if self.language not in LANGUAGES:
            self.refuse("language", f"one of {', '.join(LANGUAGES)}")
        if self.shortest < 0:
            self.refuse("shortest", "at least 0")

    @property
    def symbols(self) -> list[str]:
        return [*LANGUAGES[self.language].symbols, END, PAD]

    def sizes(self, length: int) -> list[int]:
        """Lengths of inputs that fit."""
        language = LANGUAGES[self.language]
        fit = [n for n in range(max(self.shortest, 1), length) if language.sizes(n) and n + language.room(n) <= length]
        return fit if self.shortest else fit[-1:]

    def check(self, length: int) -> None:
        if not self.sizes(length):
            refuse_length(length, f"longer: no input of {self.language} from {max(self.shortest, 1)} symbols on fits")

    def rows(self, rng: np.random.Generator, count: int, length: int) -> Rows:
        language, ids = LANGUAGES[self.language], {symbol: i for i, symbol in enumerate(self.symbols)}
        read = np.full((count, length), ids[PAD], np.int32)
        targets, answers = np.zeros_like(read), np.zeros(read.shape, bool)
        for row, size in enumerate(rng.choice(self.sizes(length), count)):
            text = language.draw(rng, int(size))
            answer = language.answer(text)
            asked = slice(len(text), len(text) + len(answer))
            read[row, : len(text) + 1] = [ids[symbol] for symbol in text + END]
            targets[row, asked], answers[row, asked] = [ids[symbol] for symbol in answer], True
        return Rows(read, only(answers, targets), answers)

    def tests(self, lengths: tuple[int, ...]) -> dict[str, tuple[Task, int]]:
        return {str(n): (dataclasses.replace(self, shortest=0), n) for n in lengths}
