"""Rules that a field's value must satisfy. A rule can test a value, and can say in words what is allowed."""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Rule:
    """What is allowed.

    Attributes:
        test: whether a value, which has the right type already, is allowed.
        words: what is allowed, so that "must be <words>" is a sentence; "" where any value is.
    """

    test: Callable[[Any], bool]
    words: str


any_value = Rule(lambda value: True, "")
share = Rule(lambda value: 0 <= value < 1, "at least 0 and less than 1")


def one_of(*values: Any) -> Rule:
    """One of these values."""
    return Rule(lambda value: value in values, "one of " + ", ".join(map(repr, values)))


def at_least(smallest: float) -> Rule:
    """This number or a larger one."""
    return Rule(lambda value: value >= smallest, f"at least {smallest}")


def between(smallest: float, largest: float) -> Rule:
    """A number from `smallest` to `largest`, both allowed."""
    return Rule(lambda value: smallest <= value <= largest, f"between {smallest} and {largest}")


def above(bound: float) -> Rule:
    """A finite number that is greater than `bound`."""
    return Rule(lambda value: bound < value < math.inf, f"greater than {bound}")


def each_at_least(smallest: int, what: str) -> Rule:
    """A list with one integer or more, each `smallest` or larger. `what`: what the numbers are, in words."""
    return Rule(
        lambda values: len(values) > 0 and all(isinstance(n, numbers.Integral) and int(n) >= smallest for n in values),
        f"{what}, each at least {smallest}",
    )
