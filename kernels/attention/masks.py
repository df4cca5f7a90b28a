"""Which keys a query sees by their positions: causality, windows with sinks, and sparse patterns of blocks.

Masks and patterns are small static objects, equal if their fields are. Each answers two questions: whether a query at
position i sees a key at position j (`sees`), and whether any query in a range of positions sees any key in another
range (`touches`). With the second, an implementation skips tiles of the scores. Both take arrays of numpy or jax, so
that tiles whose positions are known are chosen before compilation. What a pattern must know of a token are a few
numbers, its `marks`; so a kernel computes them once for each token, not for each pair.

Positions are counted from the start of the document. A pattern divides them into blocks of `block` tokens; with a block
of one token it is the pattern of its paper. I and J are the blocks of the query and the key.
"""

import dataclasses
from typing import Any, Protocol

import numpy as np

Positions = Any  # an int32 array of numpy or jax
Range = tuple[Positions, Positions]  # the first and the last position
Marks = tuple[Any, ...]


class Pattern(Protocol):
    """A sparse pattern. It is hashable, for it is a static argument of compiled functions."""

    @property
    def block(self) -> int:
        """Tokens per block."""

    def marks(self, position: Positions) -> Marks:
        """Numbers of tokens, int32 arrays like `position`."""

    def meets(self, query: Marks, key: Marks) -> Any:
        """Whether a query sees a key, by the marks of both; the arrays are broadcast against each other."""

    def sees(self, i: Positions, j: Positions) -> Any:
        """Whether a query at i sees a key at j; the arrays are broadcast against each other."""
        return self.meets(self.marks(i), self.marks(j))

    def touches(self, rows: Range, columns: Range, most: int) -> Any:
        """False where no query at positions in `rows` sees a key at positions in `columns`.

        Args:
            rows, columns: arrays, broadcast against each other.
            most: how many tokens `rows` has if its positions are consecutive. It may be longer if they are not.
        """


@dataclasses.dataclass(frozen=True)
class Strided(Pattern):
    """The last `stride` blocks and every block at a multiple of `stride` before: |I - J| < stride or stride | I - J.

    Child et al. 2019, arXiv 1904.10509, section 4.3, both heads' patterns together.
    """

    stride: int
    block: int = 1

    def __post_init__(self) -> None:
        _at_least_one(self, "stride", "block")

    def marks(self, position: Positions) -> Marks:
        I = position // self.block
        return I, I % self.stride

    def meets(self, query: Marks, key: Marks) -> Any:
        (I, at), (J, key_at) = query, key
        return _near(I, J, self.stride) | (at == key_at)

    def touches(self, rows: Range, columns: Range, most: int) -> Any:
        (i0, i1), (j0, j1) = _blocks(rows, self.block), _blocks(columns, self.block)
        nearest, farthest = i0 - j1, i1 - j0
        near = (nearest < self.stride) & (farthest > -self.stride)
        return near | (farthest // self.stride * self.stride >= nearest)


@dataclasses.dataclass(frozen=True)
class Fixed(Pattern):
    """The query's own group of `stride` blocks, and the last `summary` blocks of every group.

    Child et al. 2019, arXiv 1904.10509, section 4.3 (there l = stride and c = summary), both heads' patterns together.
    """

    stride: int
    summary: int = 1
    block: int = 1

    def __post_init__(self) -> None:
        _at_least_one(self, "stride", "summary", "block")
        if self.summary > self.stride:
            raise ValueError(f"attention: summary must be at most stride={self.stride}, got {self.summary}")

    def marks(self, position: Positions) -> Marks:
        I = position // self.block
        return I // self.stride, I % self.stride

    def meets(self, query: Marks, key: Marks) -> Any:
        (group, _), (key_group, key_at) = query, key
        return (group == key_group) | (key_at >= self.stride - self.summary)

    def touches(self, rows: Range, columns: Range, most: int) -> Any:
        (i0, i1), (j0, j1) = _blocks(rows, self.block), _blocks(columns, self.block)
        same = (i1 // self.stride >= j0 // self.stride) & (i0 // self.stride <= j1 // self.stride)
        return same | (j0 % self.stride + (j1 - j0) >= self.stride - self.summary)


@dataclasses.dataclass(frozen=True)
class BigBird(Pattern):
    """A window of blocks, blocks that everyone sees and that see everyone, and random blocks.

    Query block I sees J if |I - J| < window, if J < first or I < first, or if the later of the two drew the earlier
    one: each block draws `random` of the blocks before it, with equal chances, and possibly one of them twice. The
    draws follow from `seed`, and do not depend on the length of the row: a token sees the same keys in training and in
    decoding. Zaheer et al. 2020, arXiv 2007.14062, section 2; there random blocks may also lie after the query.
    """

    window: int = 3
    first: int = 1
    random: int = 3
    block: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least_one(self, "window", "block")
        for name in ("first", "random", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"attention: {name} must be 0 or more, got {getattr(self, name)}")

    def marks(self, position: Positions) -> Marks:
        I = position // self.block
        return I, *(self.drawn(I, n) for n in range(self.random))

    def meets(self, query: Marks, key: Marks) -> Any:
        (I, *draws), (J, *key_draws) = query, key
        seen = _near(I, J, self.window)
        if self.first:
            seen = seen | (self.first > J) | (self.first > I)
        for draw, key_draw in zip(draws, key_draws, strict=True):  # what a block draws is never after it
            seen = seen | (draw == J) | (key_draw == I)
        return seen

    def drawn(self, I: Positions, n: int) -> Any:
        """The n-th block that block I draws: a number from 0 to I - 1 (0 for the first block)."""
        mixed = I.astype(np.uint32) * np.uint32(0x9E3779B1) + np.uint32(
            (n * 0x85EBCA77 + self.seed * 0xC2B2AE3D) % 2**32
        )
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # the mixer "lowbias32"
            mixed = (mixed ^ (mixed >> np.uint32(shift))) * np.uint32(factor)
        mixed = mixed ^ (mixed >> np.uint32(16))
        return (mixed % (I + (I == 0)).astype(np.uint32)).astype(np.int32)

    def touches(self, rows: Range, columns: Range, most: int) -> Any:
        (i0, i1), (j0, j1) = _blocks(rows, self.block), _blocks(columns, self.block)
        touched = (i0 - j1 < self.window) & (i1 - j0 > -self.window) | (j0 < self.first) | (i0 < self.first)
        if not self.random:
            return touched
        blocks = -(-most // self.block) + 1
        touched = touched | (i1 - i0 >= blocks) | (j1 - j0 >= blocks)  # positions that are not consecutive
        for (first, last), (low, high) in (((i0, i1), (j0, j1)), ((j0, j1), (i0, i1))):
            for step in range(blocks):
                for n in range(self.random):
                    draw = self.drawn(first + step, n)
                    touched = touched | ((first + step <= last) & (low <= draw) & (draw <= high))
        return touched


def _blocks(ends: Range, block: int) -> Range:
    """The first and the last block."""
    return ends[0] // block, ends[1] // block


def _near(I: Any, J: Any, window: int) -> Any:
    """abs(I - J) < window, of what kernels can compute."""
    return (window > I - J) & (window > J - I)


def _at_least_one(pattern: Any, *names: str) -> None:
    for name in names:
        if getattr(pattern, name) < 1:
            raise ValueError(f"attention: {name} must be 1 or more, got {getattr(pattern, name)}")


@dataclasses.dataclass(frozen=True)
class Mask:
    """What a query sees by positions alone; the fields are those of `kernels.attention.attention`."""

    causal: bool = True
    window: int | None = None
    sinks: int = 0
    pattern: Pattern | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"attention: window must be 1 or more, got {self.window}")
        if self.sinks < 0:
            raise ValueError(f"attention: sinks must be 0 or more, got {self.sinks}")
        if self.sinks and self.window is None:
            raise ValueError(f"attention: sinks={self.sinks} need a window; without one every token is seen")

    @property
    def trivial(self) -> bool:
        """Whether positions do not matter."""
        return not self.causal and self.window is None and self.pattern is None

    @property
    def absolute(self) -> bool:
        """Whether more than the difference of two positions matters."""
        return self.sinks > 0 or self.pattern is not None

    def most_keys(self, length: int) -> int:
        """How many of `length` keys a query sees that sees as many as any; of a pattern's, 64 queries are looked at."""
        if self.pattern is None:
            return min(length, self.window + self.sinks) if self.causal and self.window else length
        i = np.linspace(0, length - 1, min(length, 64), dtype=np.int32)
        return int(self.sees(i[:, None], np.arange(length, dtype=np.int32)[None]).sum(axis=1).max())

    def sees(self, i: Positions, j: Positions) -> Any:
        """As `Pattern.sees`."""
        seen = i - j >= 0 if self.causal else None
        if self.window is not None:
            near = i - j < self.window
            near = near | (j < self.sinks) if self.sinks else near
            seen = near if seen is None else seen & near
        if self.pattern is not None:
            chosen = self.pattern.sees(i, j)
            seen = chosen if seen is None else seen & chosen
        return seen

    def touches(self, rows: Range, columns: Range, most: int) -> Any:
        """As `Pattern.touches`."""
        touched = rows[1] >= columns[0] if self.causal else (rows[1] >= rows[0]) & (columns[1] >= columns[0])
        if self.window is not None:
            near = rows[0] - columns[1] < self.window
            touched = touched & (near | (columns[0] < self.sinks) if self.sinks else near)
        return touched if self.pattern is None else touched & self.pattern.touches(rows, columns, most)
