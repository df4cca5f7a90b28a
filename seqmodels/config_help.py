"""What `--help` prints of a config: every field with its value, its meaning and what is allowed."""

import shlex
import textwrap
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from seqmodels.config import groups, part
from seqmodels.fields import Field

INDENT = " " * 6


def describe(config: ConfigDict, columns: int) -> Iterator[str]:
    """The lines, at most `columns` wide where a value is not longer than that; groups are apart by an empty line.

    A field that nobody declared, such as an option of a branch without a file in `seqmodels/fields`, has no meaning.
    """
    for group in groups(config):
        values = part(config, group.home)
        there = {name: field for name, field in group.fields.items() if name in values}  # eval.py takes a part of them
        if there:
            yield ""
        for name, field in there.items():
            yield from _field(group.place(name), values[name], field, columns)
        if group.home == "model":
            yield from _undeclared(values, [other.home for other in groups(config)], columns)
        for kind in ("task", "domain"):
            if group.home == "data" and kind in values:
                yield from _undeclared(ConfigDict({kind: values[kind]}), [], columns, "data")


def _undeclared(inside: ConfigDict, homes: list[str], columns: int, home: str = "model") -> Iterator[str]:
    """Fields of the groups in `inside` that are not among the declared `homes`."""
    for name, options in inside.items():
        if isinstance(options, ConfigDict) and f"{home}.{name}" not in homes:
            for option, value in options.items():
                yield from _field(f"{home}.{name}.{option}", value, None, columns)


def _field(name: str, value: Any, field: Field | None, columns: int) -> Iterator[str]:
    yield f"  --config.{name}={shlex.quote(str(value)) if value != '' else ''}"
    if field is not None:
        text = f"{field.meaning}. Allowed: {field.words()}."
        yield from textwrap.wrap(
            text, max(columns, 40), initial_indent=INDENT, subsequent_indent=INDENT, break_on_hyphens=False
        )
