"""Texts with a class each, byte by byte: reviews, and pairs of documents that are compared."""

import csv
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

from seqmodels.data.contract import Batch
from seqmodels.data.domains.baselines import logistic
from seqmodels.data.domains.domain import Baselines, Domain, Splits
from seqmodels.data.domains.examples import digest
from seqmodels.data.domains.files import Place
from seqmodels.errors import UserError

BYTES, END = 257, 256  # ids; the end of a text
SHARES = (("train", 0.8), ("validation", 0.9), ("test", 1.0))
WORDS = 4096  # columns of the baseline's hashed counts


@dataclasses.dataclass(frozen=True)
class Documents:
    """Rows of one text, or of two that stand one after the other as two documents.

    Attributes:
        texts: of each row, its texts. labels: [n] int32.
    """

    texts: tuple[tuple[bytes, ...], ...]
    labels: np.ndarray

    @property
    def count(self) -> int:
        return len(self.labels)

    def read(self, numbers: np.ndarray, length: int, rng: np.random.Generator | None = None) -> Batch:
        """`tokens`, `segment_ids` [B, T] int32, `mask` [B, T] and `labels` [B]; a long text is cut to its part of T."""
        width = len(self.texts[0])
        batch = {name: np.zeros((len(numbers), length), np.int32) for name in ("tokens", "segment_ids")}
        batch["mask"] = np.zeros((len(numbers), length), bool)
        share = length // width
        for row, number in enumerate(numbers):
            for place, text in enumerate(self.texts[number]):
                ids = np.append(np.frombuffer(text[: share - 1], np.uint8), END)
                here = slice(place * share, place * share + len(ids))
                batch["tokens"][row, here], batch["mask"][row, here] = ids, True
                batch["segment_ids"][row, place * share :] = place
        batch["labels"] = self.labels[numbers].astype(np.int32)
        return batch

    def fingerprint(self) -> str:
        return digest(self.labels, *(np.frombuffer(b"\0".join(row), np.uint8) for row in self.texts))


@dataclasses.dataclass(frozen=True)
class Texts(Domain):
    """Classes of texts from a table: a .csv or .tsv with names of columns in the first line, or .jsonl.

    A folder holds one table a split: train, validation and test with the ending. A single file is cut in order: 80 %
    are the train split, 10 % validation, 10 % test.

    Attributes:
        text: name of the column of the text. label: of its class.
    """

    text: str = "text"
    label: str = "label"

    def splits(self, place: Place, length: int) -> Splits:
        where = place.file()
        files = {name: path for name, _ in SHARES for path in sorted(where.glob(f"{name}.*"))} if where.is_dir() else {}
        if where.is_dir() and not {"train", "test"} <= files.keys():
            raise UserError(f"config.data.path={place.path!r}: must hold a table train and a table test")
        rows = {name: list(self._rows(path)) for name, path in files.items()} or self._cut(list(self._rows(where)))
        names = sorted({label for part in rows.values() for _, label in part})
        if unseen := set(names) - {label for _, label in rows["train"]}:
            raise UserError(
                f"config.data.path={place.path!r}: {min(unseen)!r} is no class of the train split; rows sorted "
                "by class must be shuffled"
            )
        return {
            name: Documents(tuple(t for t, _ in part), np.array([names.index(label) for _, label in part], np.int32))
            for name, part in rows.items()
            if part
        }

    def ids(self, splits: Splits) -> dict[str, int]:
        labels = max(int(split.labels.max()) for split in splits.values()) + 1
        return {"tokens": BYTES, "labels": max(labels, 2)}

    def baselines(self, splits: Splits, split: str) -> Baselines:
        """Logistic regression on which words occur, by hash; of pairs also which occur in both."""
        train, test = splits["train"], splits[split]
        guess = logistic(bags(train), train.labels, bags(test))
        return {"words, logistic": {"accuracy": float((guess == test.labels).mean())}}

    @property
    def columns(self) -> list[str]:
        """Columns of the texts of a row."""
        return [self.text]

    def _cut(self, rows: list) -> dict[str, list]:
        ends = [round(end * len(rows)) for _, end in SHARES]
        starts = [0, *ends[:-1]]
        return {name: rows[a:b] for (name, _), a, b in zip(SHARES, starts, ends, strict=True)}

    def _rows(self, path: Path) -> Iterator[tuple[tuple[bytes, ...], str]]:
        """The texts and the class of each row of a table."""
        for number, row in enumerate(_table(path), 1):
            for name in (*self.columns, self.label):
                if row.get(name) is None:  # None: a row of a table that ends before this column
                    there = ", ".join(key for key in row if row[key] is not None)
                    raise UserError(f"{path}: row {number} has no column {name!r}; there are {there}")
            yield tuple(str(row[name]).encode() for name in self.columns), str(row[self.label])


@dataclasses.dataclass(frozen=True)
class TextPairs(Texts):
    """As `Texts`, of two texts a row.

    Attributes:
        other: name of the column of the second text.
    """

    objective: ClassVar[str] = "pair"

    other: str = "other"

    @property
    def columns(self) -> list[str]:
        return [self.text, self.other]


def bags(rows: Documents) -> np.ndarray:
    """[n, WORDS] or [n, 2 WORDS] float64: 1 for each word of a row; of pairs also for each that both texts have."""
    table = np.zeros((rows.count, WORDS * len(rows.texts[0])))
    for row, texts in enumerate(rows.texts):
        found = [{_hash(word) for word in text.split()} for text in texts]
        table[row, list(set.union(*found))] = 1
        if len(texts) > 1:
            table[row, [WORDS + word for word in set.intersection(*found)]] = 1
    return table


def _hash(word: bytes) -> int:
    return int.from_bytes(word[:8].lower(), "little") * 0x9E3779B1 % 2**32 * WORDS >> 32


def _table(path: Path) -> Iterator[dict]:
    """The rows of a table, by the names of its columns. Raises: UserError for a file of another kind."""
    csv.field_size_limit(2**30)
    with path.open(newline="", encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            for line in filter(str.strip, file):
                try:
                    yield dict(json.loads(line))
                except (ValueError, TypeError) as error:
                    raise UserError(f"{path}: {line.strip()[:60]!r} is no JSON object ({error})") from error
        elif path.suffix in (".csv", ".tsv"):
            yield from csv.DictReader(file, delimiter="," if path.suffix == ".csv" else "\t")
        else:
            raise UserError(f"config.data.path: {path} must end with .csv, .tsv or .jsonl")
