"""The lock of a file, which ends with the processes that have the file open."""

import errno
import os
from pathlib import Path

from filelock import lock_descriptor

# what a file system without locks answers
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def locked(path: Path, blocking: bool) -> int | None:
    """Descriptor of the file of that name, made if it is not there, with its lock; None while another holds it.

    Args:
      blocking: wait for the lock.

    Raises: OSError, with a number of NO_LOCKS where the file system has no locks.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not lock_descriptor(descriptor, blocking=blocking):
                os.close(descriptor)
                return None
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            pass
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder before has removed or renamed it: the name is another file's now
