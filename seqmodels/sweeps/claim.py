"""A claim on a trial or a device: whoever holds its lock file works on it, on any host that shares the directory.

The lock belongs to the open file, which a child can inherit: it lasts as long as the sweep or its child lives, and no
longer. So a killed process leaves nothing to be cleaned up, and a trial that outlives its sweep is still its own.
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
        """Lets go. A child that inherited the lock keeps it."""
        os.close(self.descriptor)


@contextlib.contextmanager
def waited(path: Path) -> Iterator[None]:
    """Holds the lock of `path`, as soon as whoever has it lets go."""
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
