"""Batches of a domain. A batch is a pure function of (seed, step)."""

import dataclasses
from collections.abc import Iterator
from functools import cached_property

import numpy as np

from seqmodels.data.contract import ArraySpec, Batch, BatchSource, Spec, spread
from seqmodels.data.domains.domain import Baselines, Domain
from seqmodels.data.domains.examples import Examples
from seqmodels.data.permutation import permute
from seqmodels.data.times import at_half_rate
from seqmodels.errors import UserError

ORDER = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class DomainSplit:
    """The rows of a split in order.

    Attributes:
        examples: of the split. length: T of a row.
    """

    examples: Examples
    length: int

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """See `seqmodels.data.contract.BatchSplit`."""
        rows = spread(self.examples.count, limit)
        for first in range(0, len(rows), batch_size):
            yield filled(self.examples.read(rows[first : first + batch_size], self.length), batch_size)


def filled(batch: Batch, rows: int) -> Batch:
    """A batch with rows at the end that do not count, so that it has `rows`: labels and targets -1 or NaN, no mask."""
    result = {}
    for name, array in batch.items():
        missing = rows - len(array)
        value = 0.0
        if name in ("labels", "targets"):
            value = np.nan if np.issubdtype(array.dtype, np.floating) else -1
        result[name] = np.concatenate([array, np.full((missing, *array.shape[1:]), value, array.dtype)])
    return result


@dataclasses.dataclass(frozen=True)
class DomainDataset(BatchSource):
    """A domain as a dataset. Made by `seqmodels.data.load` where `config.data` has a `domain`.

    Attributes:
        name, domain: `config.data.name` and its settings.
        splits: rows of each split.
        seq_len, batch_size: T and B of a (global) batch.
        seed: seed of the order of rows, and of what is changed at random.
        half_rate: share of the training rows that are read at half the rate (`config.data.half_rate`).
    """

    name: str
    domain: Domain
    splits: dict[str, Examples]
    seq_len: int
    batch_size: int
    seed: int
    half_rate: float = 0.0

    @property
    def objective(self) -> str:  # type: ignore[override]
        """Head that the batches are for."""
        return self.domain.objective

    @cached_property
    def spec(self) -> Spec:
        """Arrays of a batch, see `seqmodels.data.contract.BatchSource.spec`."""
        one, ids = self.splits["train"].read(np.arange(1), self.seq_len), self.domain.ids(self.splits)
        if self.half_rate:
            one["steps"] = np.ones(one["mask"].shape, np.float32)
        return {
            name: ArraySpec((self.batch_size, *array.shape[1:]), array.dtype, ids.get(name, 0))
            for name, array in one.items()
        }

    @property
    def evenly_sampled(self) -> bool:
        """See `BatchSource.evenly_sampled`. The `steps` of `half_rate` are in training batches alone."""
        return bool(self.half_rate) or (self.domain.in_order and super().evenly_sampled)

    @property
    def held_out(self) -> list[str]:  # type: ignore[override]
        """Splits other than train."""
        return [split for split in ORDER[1:] if split in self.splits]

    @cached_property
    def fingerprints(self) -> dict[str, str]:  # type: ignore[override]
        """A hash of each split's rows."""
        return {name: split.fingerprint() for name, split in self.splits.items()}

    def __getitem__(self, split: str) -> DomainSplit:
        """A split by name."""
        if split not in self.splits:
            raise UserError(f"split {split!r}: must be one of {', '.join(self.splits)}")
        return DomainSplit(self.splits[split], self.seq_len)

    def describe(self) -> str:
        """One line that describes the data."""
        counts = ", ".join(f"{split.count:,} {name}" for name, split in self.splits.items())
        return f"rows: {counts}; {self.splits['train'].count / self.batch_size:.1f} steps an epoch"

    def baselines(self, split: str) -> Baselines:
        """Figures of simple methods on a split, computed now."""
        return self.domain.baselines(self.splits, split)

    def batch(self, n: int, rows: slice | None = None) -> Batch:
        """Training batch of step n. Every epoch has each row once, in a new random order.

        Args:
            n: step, from 0.
            rows: part of the batch that this host needs; None is all of it.
        """
        train = self.splits["train"]
        samples = n * self.batch_size + np.arange(self.batch_size, dtype=np.int64)
        numbers = permute(samples % train.count, train.count, self.seed, samples // train.count)
        rng = np.random.default_rng([self.seed, n])
        batch = train.read(numbers, self.seq_len, rng)
        if self.half_rate:
            batch = at_half_rate(batch, self.half_rate, rng)
        return {name: np.ascontiguousarray(array[rows or slice(None)]) for name, array in batch.items()}
