"""What import and export do with each field of a config: one table for each family of models.

A field is honoured (it is converted), harmless (no value of it changes the logits), or allowed only with the values
that the other side has. A field that is in no table may change the logits in a way that nobody here knows. So it is an
error, unless its value switches nothing on.
"""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any, NoReturn

from seqmodels.errors import UserError
from seqmodels.fields.rules import Rule, any_value

OFF: tuple[Any, ...] = (None, False, "", [], {})  # values with which a field that no table knows switches nothing on


@dataclasses.dataclass(frozen=True)
class Honoured:
    """The field is converted.

    Attributes:
        default: value that their library takes if the field is missing.
        allowed: values that our models can have.
    """

    default: Any
    allowed: Rule = any_value


@dataclasses.dataclass(frozen=True)
class Only:
    """The field is converted if it has one of these values. The other side has no others."""

    values: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Harmless:
    """No value of this field changes the logits."""

    reason: str


Table = Mapping[str, Honoured | Only | Harmless]


def only(*values: Any) -> Only:
    """The field is allowed with these values."""
    return Only(values)


def honoured(*names: str) -> dict[str, Honoured]:
    """Fields of our config that the export writes, each with any value that our models can have."""
    return dict.fromkeys(names, Honoured(None))


def harmless(reason: str, *names: str) -> dict[str, Harmless]:
    """Fields that are harmless for the same reason."""
    return dict.fromkeys(names, Harmless(reason))


def integer(least: int = 1, most: float = math.inf) -> Rule:
    """An integer from `least` to `most`."""
    words = f"an integer from {least} to {most}" if most < math.inf else f"an integer, at least {least}"
    return Rule(lambda value: _is(value, numbers.Integral) and least <= value <= most, words)


positive = Rule(lambda value: _is(value, numbers.Real) and 0 < value < math.inf, "a number greater than 0")
flag = Rule(lambda value: isinstance(value, bool), "true or false")


def optional(rule: Rule) -> Rule:
    """What `rule` allows, or null."""
    return Rule(lambda value: value is None or rule.test(value), f"{rule.words}, or null")


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def refuse(field: str, value: Any, allowed: str) -> NoReturn:
    """Raise a UserError that names a field of their config, its value and what is allowed."""
    raise UserError(f"Hugging Face config: {field} is {value!r}; {allowed}")


def read(config: Mapping[str, Any], table: Table, family: str) -> dict[str, Any]:
    """The honoured fields of their config by name; a missing one has their default.

    Raises:
        UserError: a value that our models do not have, or a field that no table knows.
    """
    for name, value in config.items():
        entry = table.get(name)
        if entry is None and value not in OFF:
            known = f"the import does not know this field of a {family} model"
            refuse(name, value, f"{known}; remove it from config.json if it does not change the logits")
        if isinstance(entry, Only) and value not in entry.values:
            refuse(name, value, f"only {_either(entry.values)} can be converted")
        if isinstance(entry, Honoured) and not entry.allowed.test(value):
            refuse(name, value, f"allowed: {entry.allowed.words}")
    honoured = {name: entry for name, entry in table.items() if isinstance(entry, Honoured)}
    return {name: config.get(name, entry.default) for name, entry in honoured.items()}


def missing(config: Mapping[str, Any], table: Table) -> dict[str, int]:
    """The sizes that their config does not have, and the defaults taken for them."""
    sizes = {name: entry.default for name, entry in table.items() if isinstance(entry, Honoured)}
    return {name: size for name, size in sizes.items() if name not in config and _is(size, int)}


def check_export(fields: Mapping[str, Any], table: Table, place: str) -> None:
    """Raise a UserError for a field of our config that cannot be exported. `place`: dotted name of the group."""
    for name, value in fields.items():
        entry = table.get(name)
        if entry is None:
            raise UserError(f"{place}.{name} is {value!r}; the export does not know this field")
        if isinstance(entry, Only) and value not in entry.values:
            raise UserError(f"{place}.{name} is {value!r}; only {_either(entry.values)} can be exported")


def _either(values: tuple[Any, ...]) -> str:
    return " or ".join(map(repr, values))
