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
        inputs: [n, T, C] numbers, of which NaN is a missing one, or [n, T] tokens; what lies at or after a row's length
            is not read.
        lengths: [n] int, positions of each row.
        labels: [n] int32, from 0.
        mean, deviation: [C], of values, which are read less the mean, over the deviation.
        gaps: batches say which values are there. Without, a missing value is read as the mean.
    """

    inputs: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    mean: Any = 0.0
    deviation: Any = 1.0
    gaps: bool = False

    @property
    def count(self) -> int:
        return len(self.labels)

    @property
    def key(self) -> str:
        """Name of the inputs in a batch."""
        return "tokens" if self.inputs.ndim == 2 else "values"

    def read(self, numbers: np.ndarray, length: int, rng: np.random.Generator | None = None) -> Batch:
        """`tokens` [B, T] or `values` [B, T, C], 0 behind a row's end and where one is missing; `mask` [B, T] bool;
        with gaps `observed` [B, T, C] bool; `labels` [B] int32."""
        inputs = self.inputs[numbers]
        inputs = inputs if inputs.ndim == 2 else (inputs - self.mean) / self.deviation
        mask = np.arange(length) < self.lengths[numbers, None]
        missing = length - inputs.shape[1]
        inputs = np.pad(inputs, [(0, 0), (0, max(missing, 0))] + [(0, 0)] * (inputs.ndim - 2))[:, :length]
        there = mask if inputs.ndim == 2 else mask[..., None] & ~np.isnan(inputs)
        inputs = np.where(there, inputs, 0).astype(np.int32 if inputs.ndim == 2 else np.float32)
        gaps = {"observed": there} if self.gaps else {}
        return {self.key: inputs, "mask": mask, **gaps, "labels": self.labels[numbers].astype(np.int32)}

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


ROWS = 1024  # of which mean and deviation are summed up at a time
FORMS = {"window": "window", "masked": "regress_steps", "recurrent": "next_value"}  # of `Windows`, and their heads


@dataclasses.dataclass(frozen=True)
class Windows:
    """Every window of a series, with what follows it.

    Attributes:
        series: [time, C] float32; NaN is a missing value.
        first, last: the first predicted value of the first window, and of the last.
        lookback: values that a window has. horizon: values after it that are to be predicted.
        form: "window": a row is the window, and what follows are its targets. "masked": a row is both, and what follows
            is not observed, but the target there. "recurrent": a row is both, as values.
        gaps: batches say which values are there; "masked" always does.
    """

    series: np.ndarray
    first: int
    last: int
    lookback: int
    horizon: int
    form: str = "window"
    gaps: bool = False

    @property
    def count(self) -> int:
        return self.last - self.first + 1

    def read(self, numbers: np.ndarray, length: int, rng: np.random.Generator | None = None) -> Batch:
        """`values` [B, T, C], 0 where one is missing, `mask` [B, T], and by the form `observed` and `targets`.

        T is the lookback, and with the forms masked and recurrent the horizon is behind it. `targets` are [B, horizon,
        C], or [B, T, C] of the form masked, where those in the lookback are NaN.
        """
        if length != row_length(self.form, self.lookback, self.horizon):
            raise UserError(f"config.seq_len={length}: does not fit lookback={self.lookback}, horizon={self.horizon}")
        start = self.first + np.asarray(numbers)[:, None]
        whole = self.series[start + np.arange(-self.lookback, self.horizon)]
        values = whole[:, :length].copy()
        if self.form == "masked":
            values[:, self.lookback :] = np.nan
        observed = ~np.isnan(values)
        batch = {"values": np.where(observed, values, 0), "mask": np.ones(values.shape[:2], bool)}
        if self.gaps or self.form == "masked":
            batch["observed"] = observed
        if self.form == "window":
            batch["targets"] = whole[:, self.lookback :]
        elif self.form == "masked":
            batch["targets"] = whole.copy()
            batch["targets"][:, : self.lookback] = np.nan
        return batch

    def fingerprint(self) -> str:
        return digest(self.series[self.first - self.lookback : self.last + self.horizon], np.array(self.horizon))


def row_length(form: str, lookback: int, horizon: int) -> int:
    """Steps of a row of `Windows`."""
    return lookback + (0 if form == "window" else horizon)


def digest(*arrays: np.ndarray) -> str:
    """SHA-256 of arrays, with their shapes."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(f"{array.dtype}{array.shape}".encode())
        total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()


def standardised(splits: dict[str, Any]) -> dict[str, Any]:
    """Labelled splits whose values are read less the mean, over the deviation, of the train split.

    Padding and missing values do not count.
    """
    train = splits["train"]

    def mean_of(function):
        """Mean [C] of a function of the values that count; few rows at a time, as all in float64 may not fit."""
        total, count = np.zeros(train.inputs.shape[2]), np.zeros(train.inputs.shape[2])
        for first in range(0, train.count, ROWS):
            rows = slice(first, first + ROWS)
            real = np.arange(train.inputs.shape[1]) < train.lengths[rows, None]
            values = train.inputs[rows][real].astype(np.float64)
            total += np.nansum(function(values), axis=0)
            count += (~np.isnan(values)).sum(axis=0)
        return total / np.maximum(count, 1)

    mean = mean_of(lambda values: values)
    deviation = np.sqrt(mean_of(lambda values: (values - mean) ** 2))
    scale = dict(mean=mean, deviation=np.maximum(deviation, 1e-8))
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
