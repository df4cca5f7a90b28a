"""Run directories and texts in a cloud: gs://bucket/run, s3://bucket/run, az://...; by etils.epath.

A run appends to its files, locks them, and replaces them in one step. Objects of a cloud know none of that. So a run
works in a folder of the local disk, and a `Copy` sends what has changed to the cloud. Texts are copied before they are
read.
"""

import contextlib
import functools
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from seqmodels.errors import UserError

URL = re.compile(r"(\w+)://(.*)", re.DOTALL)
PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}
LOCAL = re.compile(r"run\.lock$|\.tmp$|^checkpoints/(?!\d+/)")  # files that stay here: locks, and what is half written


def is_cloud(path: str | os.PathLike) -> bool:
    """Whether a path is an address such as gs://bucket/run."""
    return URL.match(os.fspath(path)) is not None


class Copy:
    """A local copy of a folder in a cloud.

    Attributes:
      address: such as "gs://bucket/run".
      folder: the copy, a folder of the same name.

    Raises, as its methods: UserError where the cloud cannot be reached, read or written.
    """

    def __init__(self, address: str, place: Path) -> None:
        self.address = address
        self.folder = place / (address.rstrip("/").rpartition("/")[2] or "bucket")
        self._root = remote(address)
        self._sent: dict[str, tuple[int, int]] = {}  # size and time of the files that are equal in both places

    def fetch(self) -> None:
        """Copies all that is there."""
        with reaching(self.address):
            for name, file in files(self._root):
                download(file, self.folder / name)
                self._sent[name] = _version(self.folder / name)

    def send(self) -> None:
        """Makes the cloud equal to the folder. Checkpoints come after the other files, whose rows they count on."""
        here = {path.relative_to(self.folder).as_posix(): path for path in self.folder.rglob("*") if path.is_file()}
        there = {name: path for name, path in here.items() if not LOCAL.search(name)}
        with reaching(self.address):
            for name in sorted(there, key=lambda name: (name.startswith("checkpoints/"), name)):
                version = _version(there[name])
                if self._sent.get(name) != version:
                    upload(there[name], self._root / name)
                    self._sent[name] = version
            for name in self._sent.keys() - there.keys():
                (self._root / name).unlink(missing_ok=True)
                del self._sent[name]


@contextlib.contextmanager
def copied(address: str | os.PathLike) -> Iterator[Copy]:
    """A copy of a folder in a cloud, for as long as the context lasts. Raises: UserError, see `Copy`."""
    with tempfile.TemporaryDirectory(prefix="seqmodels-") as place:
        copy = Copy(os.fspath(address), Path(place))
        copy.fetch()
        yield copy


@functools.cache
def local_files(pattern: str) -> str:
    """Copies the files that an address names, a file, a folder or a glob, and returns the same pattern for the copies.

    They are kept below `~/.cache/seqmodels/files` (or XDG_CACHE_HOME), and a later process copies them again where size
    or time differ, or the cloud tells no time.
    Raises: UserError where the cloud cannot be reached.
    """
    match = URL.match(pattern)
    assert match is not None
    parts = match[2].split("/")
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    place = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "seqmodels" / "files" / match[1]
    base = "/".join(parts[:fixed])
    with reaching(pattern):
        root = remote(f"{match[1]}://{base}")
        found = [file for each in (root.glob("/".join(parts[fixed:])) if fixed < len(parts) else [root])
                 for _, file in files(each)]  # fmt: skip
        for file in found:
            copy, about = place / os.fspath(file).partition("://")[2], file.stat()
            there = (copy.stat().st_size, int(copy.stat().st_mtime)) if copy.exists() else None
            if not about.mtime or there != (about.length, about.mtime):
                download(file, copy)
                os.utime(copy, (about.mtime, about.mtime))
    return str(place / "/".join([glob.escape(base) if fixed < len(parts) else base, *parts[fixed:]]))


def files(root: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The files in a folder of a cloud and in those below, by their names from there; of a file, itself."""
    if not root.is_dir():
        if root.exists():
            yield name, root
        return
    for path in sorted(root.iterdir()):
        yield from files(path, f"{name}/{path.name}" if name else path.name)


def remote(address: str) -> Any:
    """The etils.epath.Path of an address. Raises: UserError for one of an unknown kind."""
    from etils import epath

    if address.partition("://")[0] not in PACKAGES:
        raise UserError(f"{address}: must begin with {', '.join(f'{each}://' for each in PACKAGES)}, or be a folder")
    with reaching(address):
        path = epath.Path(address)
        path.exists()  # asks for the package of this cloud
    return path


def download(file: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with file.open("rb") as source, open(path, "wb") as target:
        shutil.copyfileobj(source, target)


def upload(path: Path, file: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "rb") as source, file.open("wb") as target:
        shutil.copyfileobj(source, target)


@contextlib.contextmanager
def reaching(address: str) -> Iterator[None]:
    """Makes a line of what the library of a cloud raises."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        package = PACKAGES.get(address.partition("://")[0], "fsspec")
        raise UserError(f"{address}: needs another package; pip install {package}") from error
    except Exception as error:  # each cloud has errors of its own
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{address}: cannot be read or written ({type(error).__name__}: {reason})") from error


def _version(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns
