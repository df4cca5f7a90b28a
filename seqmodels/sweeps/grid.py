"""Trials of `--grid=FIELD=VALUE,VALUE`: every combination of the values of some fields."""

import ast
import itertools
import re
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from seqmodels import cli, pattern
from seqmodels.config import declared_fields, with_pattern
from seqmodels.errors import UserError
from seqmodels.fields.field import Field, refuse
from seqmodels.nearest import nearest

PATTERN = "model.pattern"
# A value ends at a comma that is in no quotes and no brackets.
VALUE = re.compile(r"""(?:"[^"]*"|'[^']*'|\([^)]*\)|\[[^\]]*\]|[^,])+""")
TRUTH = {"true": True, "false": False}


def name_of(texts: Sequence[str]) -> str:
    """A name for the sweep, of its fields: grid-learning_rate-state. Other values of them belong to the same sweep."""
    return "-".join(["grid", *(text.partition("=")[0].split(".")[-1] for text in texts)])


def combinations(texts: Sequence[str]) -> list[dict[str, str]]:
    """Every combination of the values that `texts`, such as "model.width=64,128", list; the last field is the fastest.

    Raises: UserError for a text that is not FIELD=VALUE,VALUE, or a field that comes twice.
    """
    lists: dict[str, list[str]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        found = [value.strip() for value in VALUE.findall(values)]
        if not name or not found or not all(found):
            raise UserError(f"--grid={text}: must be FIELD=VALUE,VALUE, such as optimizer.learning_rate=1e-3,3e-3")
        if name in lists:
            raise UserError(f"--grid={text}: {name} has a grid already")
        lists[name] = found
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def overrides(combination: dict[str, str], config: ConfigDict, others: dict[str, Any]) -> dict[str, Any]:
    """The fields and values of a combination.

    Args:
      config: what the trials start from.
      others: the fields that a sweep sets for the same trial.

    A field may be named without the branch that has it: model.state is model.mamba.state where Mamba is the only branch
    of the pattern with such an option.

    Raises: UserError for a field that is not there or that the sweep sets too, or a value that is not allowed.
    """
    if isinstance(text := combination.get(PATTERN, others.get(PATTERN)), str):
        try:
            config = with_pattern(config, _unquoted(text))
        except UserError as error:
            raise UserError(f"--grid: {error}") from None
    declared, values = declared_fields(config), dict(cli.fields(config))
    found: dict[str, Any] = {}
    for short, text in combination.items():
        name = _full_name(short, list(values), pattern.names(config.model.pattern))
        if name in others or name in found:
            who = "the sweep" if name in others else "another grid"
            raise UserError(f"--grid={short}={text}: {who} sets {name} too")
        field = declared.get(name) or Field(values[name], "")  # the task of synthetic data declares its own
        found[name] = _parsed(text, name, field)
    return found


def _full_name(short: str, names: list[str], branches: list[str]) -> str:
    if short in names:
        return short
    group, _, option = short.rpartition(".")
    matches = [f"model.{branch}.{option}" for branch in branches] if group == "model" else []
    matches = [name for name in matches if name in names]
    if len(matches) > 1:
        raise UserError(f"--grid={short}: may be {' or '.join(matches)}; name one of them")
    if not matches:
        raise UserError(f"--grid={short}: no such field{nearest(short, names)}")
    return matches[0]


def _parsed(text: str, name: str, field: Field) -> Any:
    """The value that a text is for a field, as on the command line."""
    value: Any = text
    try:
        match field.default:
            case bool():
                value = TRUTH.get(text.lower(), text)
            case int():
                value = int(text)
            case float():
                value = float(text)
            case tuple():
                value = ast.literal_eval(text)
                value = tuple(value) if isinstance(value, tuple | list) else (value,)
            case _:
                value = _unquoted(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        refuse(name, text, field.words(), "--grid=")
    field.check(name, value, "--grid=")
    return value


def _unquoted(text: str) -> str:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text
