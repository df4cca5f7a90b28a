"""The memory of a process that computes on a CPU.

XLA asks the C library for the memory of each step, 50 to 500 MB, and gives it back behind the step. glibc passes such
sizes on to the kernel, which hands out every page anew, filled with zeros: a sixth to a third of a step's time.
(benchmarks/notes/cpu_step.md)
"""

import ctypes
from typing import Any

# Of glibc's malloc.h: only one heap, which threads share; nothing outside of it; and its free end stays with it
ARENA_MAX, MMAP_MAX, TRIM_THRESHOLD = -8, -4, -1
KEEP = ((ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, 2**31 - 1))
RETURN = ((ARENA_MAX, 0), (MMAP_MAX, 2**16), (TRIM_THRESHOLD, 2**17))  # as glibc begins


def keep_freed_memory(keep: bool = True, library: Any = None) -> bool:
    """Let the C library keep freed memory for the next allocation, or return it again as it does by itself.

    To be called before the first thread: a thread chooses its heap for good, and later ones may get one that is there.

    Returns: False if it is not glibc, and nothing was changed.
    """
    library = library or ctypes.CDLL(None)
    return hasattr(library, "mallopt") and all(library.mallopt(*setting) for setting in (KEEP if keep else RETURN))
