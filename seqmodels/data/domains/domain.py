"""Base of domains: settings, the rows of each split, and the simple baselines that a model has to beat."""

import dataclasses
from typing import Any, ClassVar

from seqmodels.data.domains.files import Place
from seqmodels.errors import UserError

Splits = dict[str, Any]  # name of a split -> its `Examples`
Baselines = dict[str, dict[str, float]]  # name of a baseline -> figure -> value


@dataclasses.dataclass(frozen=True)
class Domain:
    """Settings of a domain; subclasses add fields, which come from `config.data.domain`.

    Attributes:
        objective: head that the batches are for, a name in `seqmodels.heads.HEADS`.
    """

    objective: ClassVar[str] = "classify"

    def __post_init__(self) -> None:
        """Raises UserError for settings that do not fit."""

    @property
    def in_order(self) -> bool:
        """Whether positions that follow each other in a row do so in the data."""
        return True

    def splits(self, place: Place, length: int) -> Splits:
        """The splits "train", "validation" and "test", where there are such.

        Args:
            place: where files are.
            length: `config.seq_len`.
        """
        raise NotImplementedError

    def unread(self, place: Place, length: int) -> Splits:
        """As `splits`, for a plan, which asks for shapes and numbers of ids only: a domain need not make its rows."""
        return self.splits(place, length)

    def ids(self, splits: Splits) -> dict[str, int]:
        """For each array of a batch that holds ids, how many there are."""
        raise NotImplementedError

    def baselines(self, splits: Splits, split: str) -> Baselines:
        """Figures of simple methods on a split, computed from the train split now."""
        return {}

    def refuse(self, field: str, allowed: str) -> None:
        """Raises UserError for a field of this domain."""
        raise UserError(f"config.data.domain.{field}={getattr(self, field)!r}: must be {allowed}")

    def choose(self, field: str, *allowed: Any) -> None:
        """Raises UserError for a field that has none of these values."""
        if getattr(self, field) not in allowed:
            self.refuse(field, "one of " + ", ".join(map(repr, allowed)))

    def share(self, field: str) -> None:
        """Raises UserError for a field that is no share of the rows below 1."""
        if not 0 <= getattr(self, field) < 1:
            self.refuse(field, "at least 0 and less than 1")


def longest(splits: Splits, length: int) -> None:
    """Raises UserError where a row of labelled splits is longer than `length`."""
    most = max(int(split.lengths.max()) for split in splits.values())
    if length < most:
        raise UserError(f"config.seq_len={length}: must be at least {most}, the longest row of these data")


def classes(splits: Splits) -> int:
    """Number of classes of labelled splits."""
    return int(max(split.labels.max() for split in splits.values() if split.count)) + 1
