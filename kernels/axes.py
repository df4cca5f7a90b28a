"""Logical names for the axes of an operation's arrays. `seqmodels.parallel` uses them to split arrays over a mesh."""

from collections.abc import Mapping
from typing import NamedTuple

Axes = tuple[str | None, ...]  # a name for each axis; None: an axis that stays whole

TOKENS: Axes = ("batch", "length")
DOCUMENTS: Mapping[str, Axes] = dict(segment_ids=TOKENS, mask=TOKENS, initial_segment=("batch",))


class Layout(NamedTuple):
    """Axes of every array that an operation takes and returns.

    Attributes:
        arrays: axes of each array argument, by name.
        results: axes of each result.
        together: names of axes that must be split in the same way or not at all, such as the heads of keys and of the
            values that belong to them. An axis of size 1 is shared by all devices, and this rule does not apply to it.
    """

    arrays: Mapping[str, Axes]
    results: tuple[Axes, ...]
    together: tuple[str, ...] = ()
