"""Block sizes of the GPU kernels: for a shape, those whose measured speed promises the shortest time.

A block of channels goes through time token by token, so a kernel takes the tokens times the nanoseconds a token takes
one block, for each wave of as many blocks as the GPU has multiprocessors. Where channels and sequences are few, time is
short of blocks: then narrow blocks, or time in pieces that run at once, at the cost of a summary of each piece first.
"""

from seqmodels.kernels.selective_scan.mosaic_gpu.tile import Tile

# One H100, bfloat16, N = 16, 2026-11-22 (benchmarks/notes/selective_scan_gpu.md): nanoseconds a token and block.
FORWARD = {128: 102, 64: 59, 32: 29.5, 16: 17.5}  # by channels of a block
CHUNK = {128: 16, 64: 16, 32: 64, 16: 64}  # tokens of a step of these, at most
BACKWARD = 285  # a block of 128 channels
SUMMARY = {"forward": 104, "backward": 111}  # a block of 128 channels
SHORTEST = 256  # tokens of a piece
MOST = 32  # pieces, which fill the GPU well enough: their states are chained one by one, in code written out
WIDEST = max(FORWARD)


def plan_forward(batch, length, width, count, blocks=tuple(FORWARD)) -> tuple[int, int]:
    """Channels of a block, one of `blocks`, and pieces of time.

    Args: as of the scan; width: a multiple of 128. count: multiprocessors.
    """
    costs = {
        (block, pieces): cost(batch, length, width, count, block, FORWARD[block], pieces, SUMMARY["forward"])
        for pieces in pieces_of(length)
        for block in blocks
    }
    return min(costs, key=costs.__getitem__)


def plan_backward(batch, length, width, states, count) -> int:
    """Pieces of time; arguments as of `plan_forward`."""
    block = Tile(states).channels
    costs = {
        pieces: cost(batch, length, width, count, block, BACKWARD, pieces, SUMMARY["backward"])
        for pieces in pieces_of(length)
    }
    return min(costs, key=costs.__getitem__)


def pieces_of(length):
    """1, 2, 4 and so on, while pieces are not too short or too many."""
    pieces = [1]
    while pieces[-1] < MOST and length >= 2 * SHORTEST * pieces[-1]:
        pieces.append(2 * pieces[-1])
    return pieces


def cost(batch, length, width, count, block, nanoseconds, pieces, summary) -> float:
    """Nanoseconds of a kernel with blocks of `block` channels, and of the summaries if time is in pieces."""

    def waves(channels):
        return -(-(batch * pieces * width) // (channels * count))

    total = waves(block) * nanoseconds
    return length / pieces * (total + (waves(WIDEST) * summary if pieces > 1 else 0))
