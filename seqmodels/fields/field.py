"""One field of a config."""

import dataclasses
import numbers
import os
from collections.abc import Callable
from typing import Any, NoReturn

from seqmodels.errors import UserError
from seqmodels.fields.rules import Rule, any_value

LARGEST = 2**31 - 1  # of integers: counts and sizes are int32 on devices
WIDEST, MOST_EXPANDED = 2**20, 2**10  # of model.width and expand: their product is the size of an axis
HUGE, TINY = 3e38, 1.2e-38  # of numbers: beyond, float32 is infinite, or 0
SHOWN = 200  # characters of a value that a message shows


def _is_float(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and value == value


# type of the default: test of a value, and the type's name in messages
KINDS: dict[type, tuple[Callable[[Any], bool], str]] = {
    bool: (lambda value: isinstance(value, bool), "True or False"),
    int: (lambda value: isinstance(value, numbers.Integral) and not isinstance(value, bool), "an integer"),
    float: (_is_float, "a number"),
    str: (lambda value: isinstance(value, str), "a text"),
    tuple: (lambda value: isinstance(value, (tuple, list)), "a list"),
}


@dataclasses.dataclass(frozen=True)
class Field:
    """A field's declaration.

    Attributes:
        default: the value if the field is not set. Its type is the field's type: bool, int, float (which also takes
            integers, but not NaN), str or tuple.
        meaning: what the field does, for `--help`: a plain phrase, with the unit.
        allowed: which values are allowed.
        since: version of the list of fields that introduced this field. From version 2 on, the default means "as
            before": a config without the field means the same as a config with the default.
        path: whether the text names files, whose names may be other bytes than UTF-8.
        largest: of an integer, the largest size.
    """

    default: Any
    meaning: str
    allowed: Rule = any_value
    since: int = 1
    path: bool = False
    largest: int = LARGEST

    def words(self) -> str:
        """Description of the allowed values, with the type, for the sentence "must be <words>"."""
        kind, rule = KINDS[type(self.default)][1], self.allowed.words
        if rule.startswith("one of"):
            return rule
        return f"{kind}, {rule}" if rule else kind

    def check(self, path: str, value: Any, prefix: str = "config.") -> None:
        """Raises UserError if `value` has another type, or is not allowed.

        Args:
            path: dotted name, for the message.
            prefix: what stands before it there; "--" for a flag.
        """
        if not KINDS[type(self.default)][0](value):
            refuse(path, value, self.words(), prefix)
        if size := self._size(value):
            refuse(path, value, f"{self.words()}, and {size}", prefix)
        if not self.allowed.test(value):
            refuse(path, value, self.allowed.advice(value), prefix)

    def _size(self, value: Any) -> str:
        """What is wrong with a value of the right type that no program can use; "" if nothing is."""
        if isinstance(value, str):
            if "\0" in value:
                return "without the character 0"
            if not self.path and any("\ud800" <= character <= "\udfff" for character in value):
                return "in UTF-8"
            if self.path and value.startswith("~") and os.path.expanduser(value).startswith("~"):
                return "below a folder that is there: no user has that name"
        elif isinstance(self.default, float):
            if value and self.allowed is not any_value and not TINY <= abs(value) <= HUGE:
                return f"of a size that float32 holds ({TINY} to {HUGE})"
        elif isinstance(value, numbers.Integral) and not isinstance(value, bool) and abs(int(value)) > self.largest:
            return f"at most {self.largest}"
        return ""


def refuse(field: str, value: Any, allowed: str, prefix: str = "config.") -> NoReturn:
    """Raises UserError: one line with the field's dotted name as on the command line, its value, what is allowed."""
    raise UserError(f"{prefix}{field}={shown(value)}: must be {allowed}")


def shown(value: Any) -> str:
    """A value as a message shows it, in one line, without the end of a long one."""
    try:
        text = " ".join(repr(value).split()) if not isinstance(value, str) else repr(value)
    except ValueError:  # Python writes no integers of thousands of digits
        text = f"<{type(value).__name__} of more digits than can be shown>"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"
