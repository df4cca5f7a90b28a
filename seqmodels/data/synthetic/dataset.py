"""Batches of a task, generated on demand. A batch is a pure function of (seed, step)."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from typing import ClassVar

import numpy as np

from seqmodels.data.contract import BatchSource, Spec, text_spec
from seqmodels.data.permutation import GOLDEN, mix
from seqmodels.data.synthetic.symbols import SymbolTokenizer
from seqmodels.data.synthetic.task import NOTHING, Rows, Task, joined
from seqmodels.errors import UserError

SPLITS = ("train", "validation", "test")
FOLDS = 8  # hashes of rows have this many values; rows with one of the values are held out of training
ATTEMPTS = 4096  # most attempts to find the rows of a split


def fold(tokens: np.ndarray) -> np.ndarray:
    """[n] int, the fold of each row, from 0 to FOLDS - 1: a hash of its tokens, or of its source, [n, T]."""
    place = np.arange(1, tokens.shape[1] + 1, dtype=np.uint64)
    weight = mix(place * GOLDEN)
    total = (tokens.astype(np.uint64) + np.uint64(1)) * weight
    return (mix(total.sum(axis=1, dtype=np.uint64)) % np.uint64(FOLDS)).astype(int)


def sample(task: Task, rng: np.random.Generator, count: int, length: int, held_out: bool | None) -> Rows:
    """Draws `count` rows of a task.

    Args:
      held_out: True: only rows that are held out of training. False: only the other rows. None: any rows.

    Raises: UserError if there are hardly any such rows.
    """
    if held_out is None:
        return task.rows(rng, count, length)
    found, pieces = 0, []
    for _ in range(ATTEMPTS + 2):
        rows = task.rows(rng, count - found, length)
        kept = np.flatnonzero((fold(rows.origin) == 0) == held_out)
        pieces.append(rows.take(kept))
        found += len(kept)
        if found == count:
            return joined(pieces)
    raise UserError(f"config.seq_len={length}: this task has too few different rows to hold some out; make it longer")


@dataclasses.dataclass(frozen=True)
class SyntheticSplit:
    """The rows of one split. Row i of a length does not depend on how many rows are requested together.

    Attributes:
      task: the task that generates the rows.
      name: one of SPLITS.
      seed: seed of the dataset.
      train_length: T in training. At this length, the rows of "train" have other hashes than those of other splits.
      count: number of rows of validation, and of test.
    """

    task: Task
    name: str
    seed: int
    train_length: int
    count: int

    def row(self, number: int, length: int) -> Rows:
        """Row `number`, as `Rows` with a single row."""
        rng = np.random.default_rng([self.seed, SPLITS.index(self.name), length, number])
        by_tokens = self.task.by_tokens and length != self.train_length  # rows of other lengths are other rows
        held_out = None if by_tokens else self.name != "train"
        return sample(self.task, rng, 1, length, held_out)

    def row_count(self, length: int) -> int:
        """Number of rows of `windows`."""
        return self.count

    def windows(self, length: int, batch_size: int = 1, limit: int | None = None) -> Iterator[dict[str, np.ndarray]]:
        """The rows of the split, in order.

        Args:
          length: T. batch_size: B; the last batch is filled up with masked rows, so every batch has one shape.
          limit: rows to stop after, as rows are drawn independently; None reads `count`.

        Yields:
          `tokens`, `targets`, `segment_ids` [B, T] int32 and `mask` [B, T] bool. The mask is True at answers, which are
          the targets that count; other targets are -1. `allowed` [B, T, V] bool, of tasks that have several right ids.
        """
        self.task.check(length)
        rows = self.count if limit is None else min(limit, self.count)
        for first in range(0, rows, batch_size):
            numbers = range(first, min(first + batch_size, rows))
            batch = {"tokens": np.zeros((batch_size, length), np.int32), "mask": np.zeros((batch_size, length), bool)}
            batch["targets"] = np.full((batch_size, length), NOTHING, np.int32)
            batch["segment_ids"] = np.zeros((batch_size, length), np.int32)
            for b, number in enumerate(numbers):
                row = self.row(number, length)
                batch["tokens"][b], batch["mask"][b] = row.tokens[0], row.answers[0]
                batch["targets"][b] = np.where(row.answers[0], row.targets[0], NOTHING)
                if row.allowed is not None:
                    nowhere = np.zeros((batch_size, *row.allowed.shape[1:]), bool)
                    batch.setdefault("allowed", nowhere)[b] = row.allowed[0]
            yield batch


@dataclasses.dataclass(frozen=True)
class SyntheticDataset(BatchSource):
    """A task as a dataset, with the interface of `seqmodels.data.Dataset`. Made by `seqmodels.data.load`.

    Attributes:
      task: see `seqmodels.data.synthetic.TASKS`.
      seq_len, batch_size: T and B of a (global) batch.
      seed: seed of all rows.
      loss: positions that count in training: "answers", or "all" positions that have a target.
      count: number of rows of validation, and of test.
      lengths: further lengths T, in tokens, at which a trained model is evaluated.
    """

    task: Task
    seq_len: int
    batch_size: int
    seed: int
    loss: str
    count: int
    lengths: tuple[int, ...]

    measured_by: ClassVar[str] = "accuracy"

    @property
    def objective(self) -> str:  # type: ignore[override]
        """Head that the batches are for."""
        return self.task.objective

    @property
    def spec(self) -> Spec:
        """Arrays of a batch: `tokens`, `targets`, `segment_ids` [B, T] int32."""
        return text_spec(self.batch_size, self.seq_len, self.tokenizer.vocab_size)

    @cached_property
    def tokenizer(self) -> SymbolTokenizer:
        return SymbolTokenizer(self.task.symbols)

    def __getitem__(self, split: str) -> SyntheticSplit:
        """A split: train, validation or test."""
        if split not in SPLITS:
            raise UserError(f"split {split!r}: must be one of {', '.join(SPLITS)}")
        return SyntheticSplit(self.task, split, self.seed, self.seq_len, self.count)

    def other(self, split: str, task: Task) -> SyntheticSplit:
        """A split with rows of another task with the same tokens, as `Task.tests` returns them."""
        return dataclasses.replace(self[split], task=task)

    def describe(self) -> str:
        """One line that describes the data."""
        return f"{self.tokenizer.vocab_size:,} symbols, generated, 1/{FOLDS} of all rows held out"

    @property
    def fingerprints(self) -> dict[str, str]:
        """A hash of everything that the rows depend on."""
        settings = [type(self.task).__name__, dataclasses.asdict(self.task), self.seed, self.loss, self.seq_len]
        text = json.dumps([*settings, self.count, self.lengths], sort_keys=True)
        return {"task": hashlib.sha256(text.encode()).hexdigest()}

    @property
    def held_out(self) -> list[str]:
        """Splits other than train."""
        return list(SPLITS[1:])

    def batch(self, n: int, rows: slice | None = None) -> dict[str, np.ndarray]:
        """Training batch of step n. It depends only on n and the dataset. None of its rows is in another split.

        Args:
          n: step, from 0.
          rows: part of the batch that this host needs; None is all of it.

        Returns:
          `tokens`, `targets` (-1 where nothing counts), `segment_ids` (0): [B, T] int32.
        """
        rng = np.random.default_rng([self.seed, SPLITS.index("train"), n])
        tokens, targets, answers, *_ = sample(self.task, rng, self.batch_size, self.seq_len, held_out=False)
        if self.loss == "answers":
            targets = np.where(answers, targets, NOTHING)
        batch = {"tokens": tokens, "targets": targets, "segment_ids": np.zeros_like(tokens)}
        return {name: np.ascontiguousarray(part[rows or slice(None)], np.int32) for name, part in batch.items()}
