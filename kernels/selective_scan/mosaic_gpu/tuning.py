"""Block sizes of the GPU kernels: for each shape, the sizes with the shortest time predicted from measured speeds.

A block of channels goes through time token by token. So a kernel's time is the number of tokens, times the nanoseconds
per token and block, times the number of waves. A wave has as many blocks as the GPU has multiprocessors. If channels
and sequences are few, there are too few blocks to fill the GPU. Then the plan uses narrow blocks, or splits time into
pieces that run in parallel. Pieces cost an additional summary pass over each piece.
"""

from collections.abc import Sequence

from seqmodels.kernels.selective_scan.mosaic_gpu.tile import Tile

# One H100, bfloat16, N = 16, 2026-11-22 (benchmarks/notes/selective_scan_gpu.md): nanoseconds per token and block.
FORWARD = {128: 102, 64: 59, 32: 29.5, 16: 17.5}  # by channels per block
CHUNK = {128: 16, 64: 16, 32: 64, 16: 64}  # most tokens per step, by channels per block
BACKWARD = 285  # for a block of 128 channels
SUMMARY = {"forward": 104, "backward": 111}  # for a block of 128 channels
SHORTEST = 256  # least tokens per piece
MOST = 32  # most pieces; these fill the GPU well enough, and their states are chained one by one in unrolled code
WIDEST = max(FORWARD)


def plan_forward(
    batch: int, length: int, width: int, count: int, across: bool = False, blocks: Sequence[int] = tuple(FORWARD)
) -> tuple[int, int]:
    """Channels per block, one of `blocks`, and number of pieces of time.

    Args: as for the scan; width: a multiple of 128. count: multiprocessors. across: whether time goes on on other
        devices, which needs the summaries in any case.
    """
    costs = {
        (block, pieces): cost(batch, length, width, count, block, FORWARD[block], pieces, SUMMARY["forward"], across)
        for pieces in pieces_of(length)
        for block in blocks
    }
    return min(costs, key=costs.__getitem__)


def plan_backward(batch: int, length: int, width: int, states: int, count: int, across: bool = False) -> int:
    """Number of pieces of time; arguments as for `plan_forward`."""
    block = Tile(states).channels
    costs = {
        pieces: cost(batch, length, width, count, block, BACKWARD, pieces, SUMMARY["backward"], across)
        for pieces in pieces_of(length)
    }
    return min(costs, key=costs.__getitem__)


def pieces_of(length: int) -> list[int]:
    """Possible numbers of pieces: 1, 2, 4 and so on, while pieces are not too short or too many."""
    pieces = [1]
    while pieces[-1] < MOST and length >= 2 * SHORTEST * pieces[-1]:
        pieces.append(2 * pieces[-1])
    return pieces


def cost(
    batch: int,
    length: int,
    width: int,
    count: int,
    block: int,
    nanoseconds: float,
    pieces: int,
    summary: float,
    across: bool = False,
) -> float:
    """Nanoseconds of a kernel with blocks of `block` channels, plus the summaries if time is split into pieces, of this
    device or of several."""

    def waves(channels):
        return -(-(batch * pieces * width) // (channels * count))

    total = waves(block) * nanoseconds
    return length / pieces * (total + (waves(WIDEST) * summary if pieces > 1 or across else 0))
