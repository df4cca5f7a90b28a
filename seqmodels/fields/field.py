"""One field of a config."""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any, NoReturn

from seqmodels.errors import UserError
from seqmodels.fields.rules import Rule, any_value


def _is_float(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value)


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
    """

    default: Any
    meaning: str
    allowed: Rule = any_value
    since: int = 1

    def words(self) -> str:
        """Description of the allowed values, with the type, for the sentence "must be <words>"."""
        kind, rule = KINDS[type(self.default)][1], self.allowed.words
        if rule.startswith("one of"):
            return rule
        return f"{kind}, {rule}" if rule else kind

    def check(self, path: str, value: Any) -> None:
        """Raises UserError if `value` has another type, or is not allowed. `path`: dotted name, for the message."""
        if not KINDS[type(self.default)][0](value):
            refuse(path, value, self.words())
        if not self.allowed.test(value):
            refuse(path, value, self.allowed.advice(value))


def refuse(field: str, value: Any, allowed: str) -> NoReturn:
    """Raises UserError: one line with the field's dotted name as on the command line, its value, what is allowed."""
    raise UserError(f"config.{field}={value!r}: must be {allowed}")
