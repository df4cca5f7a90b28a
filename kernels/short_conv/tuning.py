"""Sizes of the GPU kernels of the short convolution, as measured on one H100 (benchmarks/notes/short_conv.md)."""

from seqmodels.kernels.lanes import THREADS, processors

CHANNELS = 4  # per thread
LONGEST = {"forward": 64, "backward": 128}  # most tokens per thread; longer pieces reread less and write fewer sums
SHORTEST = 16
TOGETHER = 4  # tokens loaded before the first of them is worked on


def piece(kind: str, batch: int, length: int, channels: int) -> int:
    """Tokens per thread, at most `length`: as many as possible with two blocks or more for each multiprocessor.

    Args:
        kind: "forward" or "backward".
    """
    tokens = LONGEST[kind]
    while tokens > SHORTEST and batch * length * channels < 2 * processors() * THREADS * CHANNELS * tokens:
        tokens //= 2
    together = min(TOGETHER, length)
    return min(tokens, length) // together * together
