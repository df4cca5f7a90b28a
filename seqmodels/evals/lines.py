"""Files of JSON lines that an evaluator reads."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from seqmodels.errors import UserError

T = TypeVar("T")


def read_lines(path: Path, parse: Callable[[str, str], T], limit: int | None, *, field: str, kind: str) -> list[T]:
    """The first `limit` lines of a file that are not empty, as `parse` makes them of a line and its place.

    Args:
        field: of the config, which names the file. kind: what a line is, in words.

    Raises:
        UserError: the file cannot be read, or holds no line; and what `parse` raises.
    """
    found: list[T] = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if limit is not None and len(found) == limit:
                    break
                if line.strip():
                    found.append(parse(line, f"{path}:{number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{field}: {path} cannot be read ({error})") from error
    if not found:
        raise UserError(f"{field}: {path} holds no {kind}")
    return found
