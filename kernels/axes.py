"""Logical names of the axes of an operation's arrays, from which `seqmodels.parallel` splits them over a mesh."""

from collections.abc import Mapping
from typing import NamedTuple

Axes = tuple[str | None, ...]  # a name for each axis; None: an axis that stays whole

TOKENS: Axes = ("batch", "length")
DOCUMENTS: Mapping[str, Axes] = dict(segment_ids=TOKENS, mask=TOKENS, initial_segment=("batch",))


class Layout(NamedTuple):
    """Axes of every array that an operation takes and gives.

    Attributes:
        arrays: of each array argument, by name.
        results: of each result.
        together: names that must be split alike or not at all, as those of keys and of the values that go with them;
            one whose size is 1 belongs to all and stays out of it.
    """

    arrays: Mapping[str, Axes]
    results: tuple[Axes, ...]
    together: tuple[str, ...] = ()
