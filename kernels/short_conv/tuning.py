"""Sizes of the GPU kernels of the short convolution, as measured on one H100 (benchmarks/notes/short_conv.md)."""

from seqmodels.kernels.lanes import THREADS, processors

CHANNELS = 4  # of a thread
LONGEST = {"forward": 64, "backward": 128}  # tokens of a thread; longer ones read less twice and write fewer sums
SHORTEST = 16
TOGETHER = 4  # tokens loaded before the first of them is worked on


def piece(kind: str, batch: int, length: int, channels: int) -> int:
    """Tokens of a thread, `length` at most: as many as leave two blocks for each multiprocessor.

    Args:
        kind: "forward" or "backward".
    """
    tokens = LONGEST[kind]
    while tokens > SHORTEST and batch * length * channels < 2 * processors() * THREADS * CHANNELS * tokens:
        tokens //= 2
    together = min(TOGETHER, length)
    return min(tokens, length) // together * together
