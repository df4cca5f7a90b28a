"""Files that are there whole or not at all."""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from seqmodels.errors import UserError
from seqmodels.lock import NO_LOCKS, locked


def replace_file(path: Path, content: str | bytes) -> None:
    """Writes a file so that whoever reads it, at any time, finds the old or the new content whole.

    Several processes may write the same file, one after another; the last one stays. Raises: OSError.
    """
    temporary = path.with_name(path.name + ".tmp")
    with os.fdopen(_open_alone(temporary), "wb") as file:
        try:
            if os.fstat(file.fileno()).st_size:  # left by a process that was killed
                file.truncate()
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(file.fileno(), 0)  # gives the room on a full disk back
            raise


def _open_alone(path: Path) -> int:
    """Descriptor of a file that no other process writes until it is closed; where there are no locks, of the file."""
    try:
        descriptor = locked(path, blocking=True)
        assert descriptor is not None  # it has waited
        return descriptor
    except OSError as error:
        if error.errno in NO_LOCKS:
            return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        raise


def json_text(value: Any) -> str:
    """JSON in lines, in which numbers that are not finite are null: JSON has no NaN."""
    return json.dumps(_finite(value), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes a UserError, which names the file, of what the system says against writing it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be written ({error.strerror or error})") from error
