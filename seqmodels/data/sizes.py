"""Bytes of raw text that each token of a split stands for, so that any part of a split has its exact bits per byte.

A token stands for the text from the end of the token before it to its own end. So text that a tokenizer drops or joins,
such as a second space, counts with the token after it, and at the end of a document with the last one. A character
that several tokens make counts, with all its bytes, with the last of them; only the tokenizer `bytes` splits it. The
separator stands for nothing. A document without any token counts with the next token of the split. So the sizes of
all tokens but the first add up to the bytes of the split.

In a cache, `<split>/sizes.bin` has one uint8 for each token, and `<split>/wide.npy` (int64 [n, 2]) the index of each
token of more than 255 bytes, and how many bytes it has beyond these.
"""

import array
import dataclasses
from pathlib import Path
from typing import Any, Self

import numpy as np

LARGEST = 255


def sizes_of(begins: np.ndarray, ends: np.ndarray, total: int) -> np.ndarray:
    """Sizes of the tokens of one document, by the rule above.

    Args:
      begins, ends: [n] int, where the text of each token begins and ends, in bytes. Tokens may share characters.
      total: bytes of the document.

    Returns: [n] int64; they add up to `total`, unless n is 0.
    """
    if not len(ends):
        return np.zeros(0, np.int64)
    begins, ends = np.asarray(begins, np.int64), np.asarray(ends, np.int64)
    # Where a later token begins before the end of this one, this one has only the text before that.
    begins = np.where(begins < ends, begins, total)
    later = np.append(np.minimum.accumulate(begins[::-1])[::-1][1:], total)
    complete = np.maximum.accumulate(np.clip(np.minimum(ends, later), 0, total))
    complete[-1] = total
    return np.diff(complete, prepend=0)


class SizeWriter:
    """Writes the sizes of a split, document by document. Use it in a `with` statement."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._file = folder, (folder / "sizes.bin").open("wb")
        self._wide, self._count = array.array("q"), 0
        self._before = 0  # bytes of documents without tokens, which wait for the next token

    def write(self, sizes: np.ndarray, total: int) -> None:
        """The next document: a separator, and tokens of these sizes [n], which add up to `total`."""
        sizes = np.concatenate([[0], sizes]).astype(np.int64)
        if self._count:  # the first token of a split is never predicted
            sizes[0], self._before = self._before, 0
        if len(sizes) == 1:
            self._before += total
        else:
            sizes[1], self._before = sizes[1] + self._before, 0
        for index in np.flatnonzero(sizes > LARGEST):
            self._wide.extend((self._count + int(index), int(sizes[index]) - LARGEST))
        self._file.write(np.minimum(sizes, LARGEST).astype(np.uint8).tobytes())
        self._count += len(sizes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._before and self._count > 1:  # the last documents had no tokens
            self._wide.extend((self._count - 1, self._before))
        self._file.close()
        np.save(self._folder / "wide.npy", np.array(self._wide, np.int64).reshape(-1, 2))


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a split.

    Attributes:
      sizes: [tokens] uint8. wide: [n, 2] int64. Both as in the cache.
    """

    sizes: np.ndarray
    wide: np.ndarray

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Those of a split's folder, mapped from disk; None in a cache of an earlier version."""
        if not (folder / "sizes.bin").is_file():
            return None
        return cls(np.memmap(folder / "sizes.bin", np.uint8, mode="r"), np.load(folder / "wide.npy"))

    def between(self, start: int, stop: int) -> int:
        """Bytes of raw text of the tokens from `start` to before `stop`."""
        inside = (self.wide[:, 0] >= start) & (self.wide[:, 0] < stop)
        return int(self.sizes[start:stop].sum(dtype=np.int64)) + int(self.wide[inside, 1].sum())
