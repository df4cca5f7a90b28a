"""What training requires of a dataset: batches, a description of their arrays, and the training objective.

To use your own dataset, write a subclass of `BatchSource` and pass it to `seqmodels.training.loop.train(config,
workdir, dataset)`.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import numpy as np

from seqmodels.errors import UserError

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """One array of a batch.

    Attributes:
      shape: of the whole batch over all hosts, B first: [B] labels, [B, T] tokens or a mask, [B, T, C] values.
      dtype: dtype of its elements.
      count: number of different ids, counted from 0 (tokens: the vocabulary; labels: the classes); 0 for real numbers.
    """

    shape: tuple[int, ...]
    dtype: Any
    count: int = 0


Spec = Mapping[str, ArraySpec]


class BatchSplit(Protocol):
    """Rows that are not used for training."""

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
        """The rows in order, as batches of the dataset's spec with `batch_size` rows.

        The last batch is filled up with rows that do not count: labels of -1, targets of -1 or NaN, masks of False.

        Args:
          limit: the most rows, those of `spread`; None reads all.
        """
        ...


def spread(rows: int, limit: int | None) -> np.ndarray:
    """Numbers of at most `limit` of so many rows, spread evenly over them: neighbours are alike, as in one document."""
    count = rows if limit is None else min(rows, limit)
    return np.arange(count) * rows // max(count, 1)


FIGURES = {  # of a split that a run reports, by how it is measured; of a head those of these that it has
    "perplexity": ("loss", "perplexity", "bits_per_byte"),
    "accuracy": ("loss", "accuracy", "sequence_accuracy"),
    "head": ("loss", "accuracy", "mse", "mae", "bits"),
}


class BatchSource:
    """Base class of all datasets.

    Attributes:
      objective: training objective of the batches, a name in `seqmodels.heads.HEADS`.
      measured_by: how a split is evaluated: "head", by the figures of the model's head; "perplexity", as text with its
        number of bytes; "accuracy", by the answers of a synthetic task.
      tokenizer: only in datasets of text or of synthetic tasks; a run then ends with a sample of text.
      held_out: names of the splits other than train, each of which `dataset[name]` gives as a `BatchSplit`.
      fingerprints: for each part of the data, such as a split, a text that changes whenever its contents change. A run
        is continued only on the same data. Empty: not known, so nothing is compared.
    """

    objective: str = "next_token"
    measured_by: ClassVar[str] = "head"
    held_out: Any = ()
    fingerprints: Any = MappingProxyType({})

    @property
    def evenly_sampled(self) -> bool:
        """Whether held-out rows are signals, at equal distances in time, of each of which something is said.

        Such rows can be read at a lower rate.
        """
        return self.objective in ("classify", "regress") and "values" in self.spec and "steps" not in self.spec

    @property
    def spec(self) -> Spec:
        """Every array of a batch by name.

        next_token: an input, `targets` [B, T] and `segment_ids` [B, T], both int32; a `mask` if there is padding.
        rebuild: an input and `targets` [B, T] int32; a `mask` if there is padding.
        classify: an input, `mask` [B, T] bool and `labels` [B] int32, or [B, S] for a row of S documents.
        pair: the same, and `segment_ids`; a row has two documents, which are compared.
        regress: an input, `mask` and `targets` [B, R] float32, or [B, S, R].
        window: `values` [B, T, C] float32, `mask` and `targets` [B, horizon, C] float32.
        forecast, next_value: `values` [B, T, C] float32 and `mask`.
        regress_steps: an input, `mask` and `targets` [B, T, R] float32.
        The input is `tokens` [B, T] int32 or `values` [B, T, C] float32. Padding is False in the mask. Where tokens are
        not equally far apart in time, `steps` [B, T] float32 (`seqmodels.data.times`); held-out batches without them
        have steps of 1. Where single values are missing, `observed` [B, T, C] bool; such values may be anything, NaN
        too.
        """
        raise NotImplementedError

    def batch(self, n: int, rows: slice | None = None) -> Batch:
        """The training batch of step n, counted from 0, with the arrays of `spec`.

        It must be a pure function of n, so that an interrupted run continues bit for bit.

        Args:
          rows: part of the batch that this host needs; None is all of it.
        """
        raise NotImplementedError

    def __getitem__(self, split: str) -> Any:
        """A split by name."""
        raise NotImplementedError

    def baselines(self, split: str) -> dict[str, dict[str, float]]:
        """Figures of simple methods on a split, printed beside a model's: name of a method -> figure -> value."""
        return {}

    def describe(self) -> str:
        """One line that describes the data, which a run prints."""
        return ", ".join(f"{name} {list(array.shape)}" for name, array in self.spec.items())


def check_spec(spec: Spec, batch_size: int, seq_len: int) -> None:
    """Check that the arrays of a spec have the numbers of rows and positions that a config demands.

    Raises: UserError that names the first array that does not fit.
    """
    for name, array in spec.items():
        over_time = name in ("tokens", "values", "mask", "segment_ids", "steps", "observed") or len(array.shape) == 3
        allowed = (batch_size, seq_len) if over_time else (batch_size,)
        fields = "(config.batch_size, config.seq_len)" if over_time else "(config.batch_size,)"
        if array.shape[: len(allowed)] != allowed:
            raise UserError(f"dataset.spec[{name!r}].shape={array.shape}: must begin with {allowed}, which is {fields}")


def text_spec(batch_size: int, seq_len: int, vocab_size: int) -> dict[str, ArraySpec]:
    """The spec of next-token batches of text: `tokens`, `targets`, `segment_ids` [B, T] int32."""
    ids = ArraySpec((batch_size, seq_len), np.dtype(np.int32), vocab_size)
    return {"tokens": ids, "targets": ids, "segment_ids": dataclasses.replace(ids, count=0)}
