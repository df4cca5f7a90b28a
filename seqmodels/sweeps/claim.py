"""A claim on a trial or a device. The process that holds its lock file, on any host that shares the directory, has it.

The lock belongs to the open file, which a child process can inherit. It ends when the sweep and its child have ended.
So a killed process leaves nothing to clean up, and a trial that runs on after its sweep has ended stays claimed.
"""

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import lock_descriptor

from seqmodels.errors import UserError


class Claim:
    """A held lock. `descriptor` is for `subprocess.Popen(pass_fds=...)`."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @classmethod
    def take(cls, path: Path) -> "Claim | None":
        """The claim on `path`, or None while another holds it.

        Raises: UserError where the file system has no locks; OSError where the file cannot be made.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if lock_descriptor(descriptor, blocking=False):
                return cls(descriptor)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise UserError(
                    f"{path}: this file system has no locks; take another --out or --engine=print"
                ) from None
            raise
        os.close(descriptor)
        return None

    def release(self) -> None:
        """Releases the lock. A child process that inherited it still holds it."""
        os.close(self.descriptor)


@contextlib.contextmanager
def waited(path: Path) -> Iterator[None]:
    """Waits for the lock of `path`, and holds it."""
    while (claim := Claim.take(path)) is None:
        time.sleep(0.05)
    try:
        yield
    finally:
        claim.release()


def claimed(path: Path) -> bool:
    """Whether somebody holds the lock of `path`."""
    if not path.exists():
        return False
    claim = Claim.take(path)
    if claim:
        claim.release()
    return claim is None
