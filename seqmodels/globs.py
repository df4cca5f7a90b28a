"""Files that a text of a config names."""

import contextlib
import glob
from pathlib import Path

from seqmodels import cloud


def matching(pattern: str) -> list[Path]:
    """The path of that name, or what a glob matches in sorted order; `~` is the home directory.

    Of an address in a cloud, local copies (`seqmodels.cloud`).
    """
    if cloud.is_cloud(pattern):
        pattern = cloud.local_files(pattern)
    literal = Path(pattern).expanduser()
    with contextlib.suppress(OSError):  # no file can have a name that is too long
        if literal.exists():  # a name with brackets is a glob too, which does not match itself
            return [literal]
    return [Path(path) for path in sorted(glob.glob(str(literal), recursive=True))]
