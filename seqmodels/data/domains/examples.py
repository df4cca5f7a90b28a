"""The rows of one split, which are read by number."""

import dataclasses
import hashlib
from typing import Any, Protocol, Self

import numpy as np

from seqmodels.data.contract import Batch
from seqmodels.errors import UserError


class Examples(Protocol):
    """Rows that are read by number; `rng` is given in training alone, for rows that are changed at random there."""

    @property
    def count(self) -> int:
        """Number of rows."""
        ...

    def read(self, numbers: np.ndarray, length: int, rng: np.random.Generator | None = None) -> Batch:
        """The rows of these numbers as arrays of a batch, with `length` positions each."""
        ...

    def fingerprint(self) -> str:
        """A text that changes whenever the rows change."""
        ...


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Rows with a class each.

    Attributes:
        inputs: [n, T, C] numbers, or [n, T] tokens; what lies at or after a row's length is not read.
        lengths: [n] int, positions of each row.
        labels: [n] int32, from 0.
        mean, deviation: [C], of values, which are read less the mean, over the deviation.
    """

    inputs: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    mean: Any = 0.0
    deviation: Any = 1.0

    @property
    def count(self) -> int:
        return len(self.labels)

    @property
    def key(self) -> str:
        """Name of the inputs in a batch."""
        return "tokens" if self.inputs.ndim == 2 else "values"

    def read(self, numbers: np.ndarray, length: int, rng: np.random.Generator | None = None) -> Batch:
        """`tokens` [B, T] or `values` [B, T, C], 0 behind a row's end; `mask` [B, T] bool; `labels` [B] int32."""
        inputs = self.inputs[numbers]
        inputs = inputs if inputs.ndim == 2 else (inputs - self.mean) / self.deviation
        mask = np.arange(length) < self.lengths[numbers, None]
        missing = length - inputs.shape[1]
        inputs = np.pad(inputs, [(0, 0), (0, max(missing, 0))] + [(0, 0)] * (inputs.ndim - 2))[:, :length]
        inputs = np.where(mask if inputs.ndim == 2 else mask[..., None], inputs, 0)
        inputs = inputs.astype(np.int32 if inputs.ndim == 2 else np.float32)
        return {self.key: inputs, "mask": mask, "labels": self.labels[numbers].astype(np.int32)}

    def flat(self) -> np.ndarray:
        """[n, features] float64: all positions of a row side by side, 0 behind its end."""
        batch = self.read(np.arange(self.count), self.inputs.shape[1])
        return batch[self.key].reshape(self.count, -1).astype(np.float64)

    def part(self, chosen: np.ndarray) -> Self:
        """The rows of these numbers."""
        rows = dict(inputs=self.inputs[chosen], lengths=self.lengths[chosen], labels=self.labels[chosen])
        return dataclasses.replace(self, **rows)

    def fingerprint(self) -> str:
        return digest(self.inputs, self.lengths, self.labels)


@dataclasses.dataclass(frozen=True)
class Windows:
    """Every window of a series, with what follows it.

    Attributes:
        series: [time, C] float32.
        first, last: the first predicted value of the first window, and of the last.
        lookback: values that a window has. horizon: values after it that are to be predicted.
    """

    series: np.ndarray
    first: int
    last: int
    lookback: int
    horizon: int

    @property
    def count(self) -> int:
        return self.last - self.first + 1

    def read(self, numbers: np.ndarray, length: int, rng: np.random.Generator | None = None) -> Batch:
        """`values` [B, T, C] with T the lookback, `mask` [B, T], `targets` [B, horizon, C]."""
        if length != self.lookback:
            raise UserError(f"config.seq_len={length}: must be config.data.domain.lookback, {self.lookback}")
        start = self.first + np.asarray(numbers)[:, None]
        values = self.series[start + np.arange(-self.lookback, 0)]
        targets = self.series[start + np.arange(self.horizon)]
        return {"values": values, "mask": np.ones(values.shape[:2], bool), "targets": targets}

    def fingerprint(self) -> str:
        return digest(self.series[self.first - self.lookback : self.last + self.horizon], np.array(self.horizon))


def digest(*arrays: np.ndarray) -> str:
    """SHA-256 of arrays, with their shapes."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(f"{array.dtype}{array.shape}".encode())
        total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()


def standardised(splits: dict[str, Any]) -> dict[str, Any]:
    """Labelled splits whose values are read less the mean, over the deviation, of the train split's real positions."""
    train = splits["train"]
    real = np.arange(train.inputs.shape[1]) < train.lengths[:, None]
    values = train.inputs[real].astype(np.float64)
    scale = dict(mean=values.mean(axis=0), deviation=np.maximum(values.std(axis=0), 1e-8))
    return {name: dataclasses.replace(split, **scale) for name, split in splits.items()}


def divided(labels: np.ndarray, share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the rows of two parts, the second with this share of each class, drawn once and for all by `seed`."""
    rng, second = np.random.default_rng(seed), []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        second.append(rows[: round(share * len(rows))])
    chosen = np.zeros(len(labels), bool)
    chosen[np.concatenate(second)] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)
