"""The source code that runs: its commit, and what differs from it."""

import dataclasses
import functools
import hashlib
import json
import os
import subprocess
from pathlib import Path

from seqmodels import __version__
from seqmodels.atomic import replace_file, writing
from seqmodels.scripts import CHECKOUT

MOST = 2**20  # bytes of a difference that are kept
FILE = "source.json"
DIFF = ("diff", "--no-ext-diff", "--no-textconv", "--no-color")  # whatever a user's settings say


@dataclasses.dataclass(frozen=True)
class Source:
    """Attributes:
    commit: hash of the checkout, what SEQMODELS_COMMIT says for a copy of one, or the version of the package.
    diff: what `git apply` makes the files of: changes, and Python files that git does not know yet. "": none.
    """

    commit: str
    diff: str


@functools.cache
def source() -> Source:
    """The source of this process, as it is at the first call."""
    if CHECKOUT is None or not (head := _git("rev-parse", "HEAD")):
        return Source(os.environ.get("SEQMODELS_COMMIT") or __version__, "")
    diff = _git(*DIFF, "HEAD")
    for name in _git("ls-files", "--others", "--exclude-standard", "-z", "*.py").split("\0"):
        if name and len(diff) <= MOST:
            diff += _git(*DIFF, "--no-index", "/dev/null", name)
    return Source(os.environ.get("SEQMODELS_COMMIT") or head.strip(), diff[:MOST])


def commit() -> str:
    """Short hash of the checkout, with "+" if files that git knows differ from it.

    What SEQMODELS_COMMIT says goes before it, for a machine to which the files were copied; "" where neither is there.
    The installed package says its version.
    """
    if said := os.environ.get("SEQMODELS_COMMIT"):
        return said
    if CHECKOUT is None:
        return __version__
    head = _git("rev-parse", "--short", "HEAD").strip()
    return head + ("+" if head and _git("diff", "--name-only", "HEAD") else "")


def write(workdir: Path, step: int) -> None:
    """Adds to `source.json` which source trains from `step` on, and keeps its difference from the commit in a file.

    Nothing is added if it is the same as before. Raises: UserError where nothing can be written.
    """
    path, now = Path(workdir) / FILE, source()
    name = f"source-{hashlib.sha256(now.diff.encode()).hexdigest()[:8]}.diff" if now.diff else ""
    try:
        before = json.loads(path.read_text())
        before = before if isinstance(before, list) else []
    except (OSError, ValueError):
        before = []
    entry = {"commit": now.commit, "diff": name, "version": __version__}
    if before and isinstance(before[-1], dict) and before[-1] | {"step": 0} == entry | {"step": 0}:
        return
    with writing(path):
        if name:
            replace_file(path.with_name(name), now.diff)
        replace_file(path, json.dumps([*before, {"step": step} | entry], indent=2) + "\n")


def _git(*arguments: str) -> str:
    """What git prints about the checkout; "" where there is no git or no repository."""
    command = ["git", "-C", str(CHECKOUT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError:
        return ""
    return done.stdout  # `diff --no-index` ends with 1 where there is a difference
