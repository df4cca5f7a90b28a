"""Rules that a field's value must satisfy. A rule can test a value, and can say in words what is allowed."""

import dataclasses
import math
import numbers
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any


@dataclasses.dataclass(frozen=True)
class Rule:
    """What is allowed.

    Attributes:
        test: whether a value, which has the right type already, is allowed.
        words: what is allowed, for the sentence "must be <words>"; "" if any value is allowed.
        choices: the allowed values, if they are a list.
    """

    test: Callable[[Any], bool]
    words: str
    choices: tuple[Any, ...] = ()

    def advice(self, value: Any) -> str:
        """What is allowed, and the allowed name that is most similar to `value`."""
        names = [name for name in self.choices if isinstance(name, str)]
        near = get_close_matches(value, names, n=1) if isinstance(value, str) else []
        return f"{self.words}; did you mean {near[0]!r}?" if near else self.words


any_value = Rule(lambda value: True, "")
NEAREST = 1 - 2.0**-24  # the largest float32 below 1
share = Rule(lambda value: 0 <= value <= NEAREST, "at least 0 and less than 1 (in float32)")


def one_of(*values: Any) -> Rule:
    """One of these values."""
    return Rule(lambda value: value in values, "one of " + ", ".join(map(repr, values)), values)


def at_least(smallest: float) -> Rule:
    """This number or a larger one."""
    return Rule(lambda value: value >= smallest, f"at least {smallest}")


def between(smallest: float, largest: float) -> Rule:
    """A number from `smallest` to `largest`, both allowed."""
    return Rule(lambda value: smallest <= value <= largest, f"between {smallest} and {largest}")


def above(bound: float) -> Rule:
    """A finite number that is greater than `bound`."""
    return Rule(lambda value: bound < value < math.inf, f"greater than {bound}")


def each_at_least(smallest: int, what: str, empty: bool = False) -> Rule:
    """A list of integers, each at least `smallest`. `what` describes them in words. `empty`: there may be none."""

    def test(values: Any) -> bool:
        whole = all(isinstance(n, numbers.Integral) and not isinstance(n, bool) for n in values)
        return whole and (empty or len(values) > 0) and all(smallest <= n < 2**31 for n in values)

    return Rule(test, f"{what}, each an integer, at least {smallest}")


def assignments(text: str) -> dict[str, str] | None:
    """`name=value,name=value` as a dict; None for a text that is not that."""
    parts = [part.strip().partition("=") for part in text.split(",") if part.strip()]
    if not all(name.isidentifier() and value for name, _, value in parts):
        return None
    return {name: value for name, _, value in parts}


def names_among(*names: str) -> Rule:
    """A text: one or more of these names, apart by commas."""

    def test(text: Any) -> bool:
        return all(part.strip() in names for part in text.split(","))

    return Rule(test, f"one or more of {', '.join(names)}, apart by commas")
