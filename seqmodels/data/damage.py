"""Whether the files of a token cache are what was written.

They are read once: `checked.json` in the cache keeps their sizes and times, and while these stay, they count as whole.
"""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from seqmodels.atomic import replace_file
from seqmodels.errors import UserError

CHECKED = "checked.json"


class DamageError(Exception):
    """A file of a token cache is not what was written; the message says which."""


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a split's folder, by name; `meta.json` keeps them as `files`."""
    return {path.name: file_hash(path) for path in sorted(folder.iterdir())}


def check(folder: Path) -> dict:
    """`meta.json` of a token cache, once all files are found whole.

    A cache of an earlier version has no checksums: its ids must be in the vocabulary, and its documents in order.

    Raises: DamageError; UserError where the system refuses to read a file.
    """
    try:
        meta = _read_meta(folder)
        files = [
            folder / "meta.json",
            *(path for split in meta["splits"] for path in sorted((folder / split).iterdir())),
        ]
        times = {str(path.relative_to(folder)): [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
        if times != _checked(folder):
            for split, part in meta["splits"].items():
                _check_split(folder / split, part, meta)
            with contextlib.suppress(OSError):  # a cache that may not be written is checked each time
                replace_file(folder / CHECKED, json.dumps(times, indent=2) + "\n")
        return meta
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise DamageError(f"{error.filename} is no file or not there") from error
    except OSError as error:
        raise UserError(f"config.data.cache: {error.filename or folder} cannot be read ({error.strerror})") from error


def _read_meta(folder: Path) -> dict:
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text())
        np.dtype(meta["dtype"])
        numbers = [part[name] for part in meta["splits"].values() for name in ("tokens", "documents", "bytes")]
        if not numbers or not all(type(number) is int for number in [*numbers, meta["tokenizer"]["vocab_size"]]):
            raise TypeError("no numbers")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamageError(f"{path.name} is not what was written") from error
    return meta


def _check_split(folder: Path, part: dict, meta: dict[str, Any]) -> None:
    tokens, documents = folder / "tokens.bin", folder / "documents.npy"
    if tokens.stat().st_size != part["tokens"] * np.dtype(meta["dtype"]).itemsize:
        raise DamageError(f"{tokens.parent.name}/{tokens.name} has another size than was written")
    for name, content in part.get("files", {}).items():
        if file_hash(folder / name) != content:
            raise DamageError(f"{folder.name}/{name} has other bytes than were written")
    if "files" not in part:
        ids = np.memmap(tokens, meta["dtype"], mode="r")
        if any(piece.max() >= meta["tokenizer"]["vocab_size"] for piece in np.array_split(ids, len(ids) // 2**24 + 1)):
            raise DamageError(f"{tokens.parent.name}/{tokens.name} has ids outside the vocabulary")
        _check_documents(documents, part, ids)


def _check_documents(path: Path, part: dict, ids: np.ndarray) -> None:
    try:
        starts = np.load(path)
    except (ValueError, EOFError) as error:
        raise DamageError(f"{path.parent.name}/{path.name} is no NumPy array") from error
    whole = starts.dtype == np.int64 and starts.shape == (part["documents"],) and starts.size > 0 and starts[0] == 0
    # Every document begins with the separator.
    if not (whole and (np.diff(starts) > 0).all() and starts[-1] < len(ids) and (ids[starts] == ids[0]).all()):
        raise DamageError(f"{path.parent.name}/{path.name} does not fit the tokens")


def _checked(folder: Path) -> dict:
    try:
        return json.loads((folder / CHECKED).read_text())
    except (OSError, ValueError):
        return {}


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes. Raises: OSError where it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
