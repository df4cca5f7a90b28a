"""A random order of any number of rows, computed from the position, so that it needs no memory.

With any round function, a Feistel network permutes the numbers below a power of four (Luby & Rackoff, 1988, "How to
construct pseudorandom permutations from pseudorandom functions"). The network is applied again to results outside the
range, until they are inside ("cycle walking": Black & Rogaway, 2002, "Ciphers with arbitrary finite domains"). The
result is a permutation of the range.
The order does not depend on the version of a library, so a resumed run sees the same rows.
"""

import numpy as np

ROUNDS = 6
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio: the step of SplitMix64


def permute(position: np.ndarray | int, size: int, seed: int, epoch: np.ndarray | int) -> np.ndarray:
    """Row at each position of an epoch's order.

    Args:
      position: [...] integers in [0, size).
      size: number of rows, at least 1.
      seed: seed of the run.
      epoch: [...] integers, the epoch of each position; every epoch has its own order.

    Returns:
      [...] int64: for a fixed epoch, position -> row is one-to-one on [0, size).
    """
    position = np.asarray(position, np.uint64)
    half = max(1, (int(size - 1).bit_length() + 1) // 2)  # bits of either half: 4**half >= size
    key = _mix(_mix(np.uint64(seed % 2**64)) + np.asarray(epoch, np.uint64))
    key = np.broadcast_to(key, position.shape)
    row = _feistel(position, key, half)
    while (outside := row >= size).any():
        row = np.where(outside, _feistel(row, key, half), row)
    return row.astype(np.int64)


def _feistel(x, key, half: int):
    """One pass of the network over `2 * half` bits. x, key [...] uint64."""
    mask = np.uint64(2**half - 1)
    left, right = x >> np.uint64(half), x & mask
    for r in range(ROUNDS):
        left, right = right, left ^ (_mix(key + _mix(right + np.uint64(r << 40))) & mask)
    return (left << np.uint64(half)) | right


def _mix(x):
    return mix(np.atleast_1d(x) + GOLDEN)  # arrays wrap silently, scalars warn


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele, Lea & Flood, 2014): every bit out depends on every bit in. x uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
