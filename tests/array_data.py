"""A dataset in memory, for tests of what is not text."""

import dataclasses
from collections.abc import Callable

import numpy as np

from seqmodels.data import ArraySpec, BatchSource

FILL = {"labels": -1, "targets": np.nan}  # of rows that do not count; all else is zero, and False


@dataclasses.dataclass(frozen=True)
class ArraySplit:
    """Rows of arrays, in order."""

    arrays: dict[str, np.ndarray]

    def batches(self, batch_size, limit=None):
        """Batches of these rows, the last filled up."""
        count = len(self.arrays["mask"]) if limit is None else min(limit, len(self.arrays["mask"]))
        for first in range(0, count, batch_size):
            rows = slice(first, min(first + batch_size, count))
            fill = batch_size - (rows.stop - rows.start)
            yield {
                name: np.concatenate([array[rows], np.full((fill, *array.shape[1:]), FILL.get(name, 0), array.dtype)])
                for name, array in self.arrays.items()
            }


class ArrayDataset(BatchSource):
    """Rows that a function of a random generator makes: training rows by step, and so many held-out ones.

    Args:
      make: (rng, count) -> arrays by name, their first axis `count`.
      counts: ids of the arrays that hold ids.
    """

    held_out = ("validation", "test")

    def __init__(self, objective: str, make: Callable, batch_size: int, counts: dict[str, int], rows: int = 32):
        self.objective, self.make, self.batch_size, self.counts, self.rows = objective, make, batch_size, counts, rows

    @property
    def spec(self):
        batch = self.batch(0)
        return {name: ArraySpec(array.shape, array.dtype, self.counts.get(name, 0)) for name, array in batch.items()}

    def batch(self, n, rows=None):
        arrays = self.make(np.random.default_rng([0, n]), self.batch_size)
        return {name: array[rows or slice(None)] for name, array in arrays.items()}

    def __getitem__(self, split):
        return ArraySplit(self.make(np.random.default_rng([1, self.held_out.index(split)]), self.rows))


def lengths(rng, count, length):
    """A mask [count, length] of rows of different lengths, at least half of `length`."""
    return np.arange(length) < rng.integers(length // 2, length + 1, (count, 1))


def which_token(rng, count, length=12):
    """Which of the tokens 0 and 1 is there more often; 2 is neither, and what padding holds does not matter."""
    mask = lengths(rng, count, length)
    share = rng.choice([0.2, 0.8], (count, 1))
    tokens = np.where(rng.random((count, length)) < 0.2, 2, (rng.random((count, length)) < share).astype(int))
    more = ((tokens == 1) & mask).sum(axis=1) > ((tokens == 0) & mask).sum(axis=1)
    return {"tokens": np.where(mask, tokens, 1).astype(np.int32), "mask": mask, "labels": more.astype(np.int32)}


def frames(rng, count, length=12):
    """Frames of two channels; NaN in the padding."""
    mask = lengths(rng, count, length)
    values = (rng.normal(size=(count, length, 2)) + rng.normal(size=(count, 1, 2))).astype(np.float32)
    return np.where(mask[..., None], values, np.nan).astype(np.float32), mask


def which_channel(rng, count):
    """Which channel of a row has the larger mean."""
    values, mask = frames(rng, count)
    return {"values": values, "mask": mask, "labels": np.argmax(np.nanmean(values, axis=1), axis=1).astype(np.int32)}


def channel_means(rng, count):
    """The means of both channels and their difference, of which a fifth is not known."""
    values, mask = frames(rng, count)
    mean = np.nanmean(values, axis=1)
    targets = np.concatenate([mean, mean[:, :1] - mean[:, 1:]], axis=1)
    known = rng.random(targets.shape) < 0.8
    return {"values": values, "mask": mask, "targets": np.where(known, targets, np.nan).astype(np.float32)}


def waves(rng, count, length=12):
    """Sines of one frequency and any phase, two channels."""
    mask = lengths(rng, count, length)
    phase = rng.uniform(0, 2 * np.pi, (count, 1))
    angle = 0.7 * np.arange(length) + phase
    values = np.stack([np.sin(angle), np.cos(angle)], axis=2)
    return {"values": np.where(mask[..., None], values, np.nan).astype(np.float32), "mask": mask}
