"""A claim on a run directory, a trial or a device. The process that holds its lock file has it, on any host that shares
the directory, if the file system has locks between hosts.

The lock belongs to the open file, which a child process can inherit. It ends when the process and such a child have
ended. So a killed process leaves nothing to clean up, and a trial that runs on after its sweep has ended stays claimed.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from seqmodels.errors import UserError
from seqmodels.lock import NO_LOCKS, locked

RUN = "run.lock"  # in a run directory: of the process that trains there; says which one
PATIENCE = 1.0  # seconds: who looks whether a claim is held, holds it for a moment


class NoLocksError(UserError):
    """The file system has no locks."""


class Claim:
    """A held lock. `descriptor` is for `subprocess.Popen(pass_fds=...)`."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @classmethod
    def take(cls, path: Path) -> "Claim | None":
        """The claim on `path`, or None while another holds it.

        Raises: NoLocksError where the file system has no locks; OSError where the file cannot be made.
        """
        try:
            descriptor = locked(path, blocking=False)
        except OSError as error:
            if error.errno in NO_LOCKS:
                raise NoLocksError(
                    f"{path}: this file system has no locks; take another --out or --engine=print"
                ) from None
            raise
        return None if descriptor is None else cls(descriptor)

    @classmethod
    def named(cls, path: Path) -> "Claim | None":
        """As `take`, and waits `PATIENCE` for another; writes into the file whose claim it is, for `holder`."""
        until = time.monotonic() + PATIENCE
        while (claim := cls.take(path)) is None and time.monotonic() < until:
            time.sleep(0.05)
        if claim:
            os.ftruncate(claim.descriptor, 0)
            os.pwrite(claim.descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return claim

    def release(self) -> None:
        """Releases the lock. A child process that inherited it still holds it."""
        os.close(self.descriptor)


def holder(path: Path) -> str:
    """Who holds a claim that was taken by name, such as `process 4711 on node3`."""
    try:
        text = path.read_text(errors="replace").strip()
    except OSError:
        text = ""
    return text or "another process"


@contextlib.contextmanager
def waited(path: Path) -> Iterator[None]:
    """Waits for the lock of `path`, and holds it. Where the file system has no locks, nobody waits."""
    try:
        while (claim := Claim.take(path)) is None:
            time.sleep(0.05)
    except NoLocksError:
        yield
        return
    try:
        yield
    finally:
        claim.release()


def claimed(path: Path) -> bool:
    """Whether somebody holds the lock of `path`. False where that cannot be known."""
    if not path.is_file():
        return False
    try:
        claim = Claim.take(path)
    except (OSError, NoLocksError):
        return False
    if claim:
        claim.release()
    return claim is None
