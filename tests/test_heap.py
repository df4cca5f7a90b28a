"""What a CPU's process keeps of the memory that it frees (seqmodels/heap.py)."""

import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from seqmodels import heap

# Pages that the kernel hands out for the last of three blocks of 64 MiB, each freed before the next
COUNT = """
import ctypes, resource, runpy, sys, threading
for keep in sys.argv[2:]: runpy.run_path(sys.argv[1])["keep_freed_memory"](keep == "keep")
library = ctypes.CDLL(None)
library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def blocks():
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = library.malloc(ctypes.c_size_t(2**26))
        ctypes.memset(block, 1, 2**26)
        library.free(block)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=blocks)  # as XLA's threads do
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept():
    def pages(*keep):
        command = [sys.executable, "-I", "-c", COUNT, heap.__file__, *keep]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert pages("keep") < 100 < pages() and pages("keep", "return") > 100


def test_another_c_library_is_left_alone():
    assert not heap.keep_freed_memory(library=SimpleNamespace())
