"""ListOps as rows with a class each: the value of a nested expression, a digit (Long Range Arena)."""

import dataclasses
import json

import numpy as np

from seqmodels.data.contract import Batch
from seqmodels.data.domains.baselines import logistic
from seqmodels.data.domains.domain import Baselines, Domain, Splits
from seqmodels.data.domains.files import Place
from seqmodels.data.synthetic.dataset import SPLITS, sample
from seqmodels.data.synthetic.listops import END, PAD
from seqmodels.data.synthetic.listops import ListOps as Task


@dataclasses.dataclass(frozen=True)
class Expressions:
    """Generated rows; row i is always the same. No row of one split is in another."""

    task: Task
    split: str
    rows: int

    @property
    def count(self) -> int:
        return self.rows

    def read(self, numbers: np.ndarray, length: int, rng: np.random.Generator | None = None) -> Batch:
        """`tokens` [B, T] int32, `mask` [B, T], `labels` [B]; the end counts as a token, what is behind it does not."""
        held = self.split != "train"
        key = [0, SPLITS.index(self.split), length]
        parts = [sample(self.task, np.random.default_rng([*key, int(n)]), 1, length, held) for n in numbers]
        tokens = np.concatenate([part.tokens for part in parts])
        labels = np.array([part.targets[0, np.argmax(part.answers[0])] for part in parts], np.int32)
        return {"tokens": tokens, "mask": tokens != PAD, "labels": labels}

    def fingerprint(self) -> str:
        return json.dumps([dataclasses.asdict(self.task), self.split, self.rows])


@dataclasses.dataclass(frozen=True)
class ListOps(Domain):
    """See `seqmodels.data.synthetic.listops`, whose task asks for the same value as the next token.

    Attributes:
        depth, arguments, shortest, longest: of that task.
        rows: of the train split. held: rows of the validation, and of the test split.
    """

    depth: int = 10
    arguments: int = 10
    shortest: int = 500
    longest: int = 2000
    rows: int = 96000
    held: int = 2000

    def __post_init__(self) -> None:
        self.task()
        for field in ("rows", "held"):
            if getattr(self, field) < 1:
                self.refuse(field, "at least 1")

    def task(self) -> Task:
        """The generator."""
        return Task(depth=self.depth, arguments=self.arguments, shortest=self.shortest, longest=self.longest)

    def splits(self, place: Place, length: int) -> Splits:
        self.task().check(length)
        counts = {"train": self.rows, "validation": self.held, "test": self.held}
        return {name: Expressions(self.task(), name, count) for name, count in counts.items()}

    def ids(self, splits: Splits) -> dict[str, int]:
        return {"tokens": max(END, PAD) + 1, "labels": 10}

    def baselines(self, splits: Splits, split: str) -> Baselines:
        """The commonest value, and logistic regression on the first operator and how often each symbol occurs."""
        length = self.longest
        train = splits["train"].read(np.arange(min(4000, self.rows)), length)
        test = splits[split].read(np.arange(splits[split].count), length)
        guess = logistic(_symbols(train["tokens"]), train["labels"], _symbols(test["tokens"]))
        commonest = np.bincount(train["labels"]).argmax()
        return {
            "commonest value": {"accuracy": float((test["labels"] == commonest).mean())},
            "logistic regression": {"accuracy": float((guess == test["labels"]).mean())},
        }


def _symbols(tokens: np.ndarray) -> np.ndarray:
    """[n, 2 * 17]: the first symbol, and counts of all."""
    eye = np.eye(PAD + 1)
    return np.concatenate(
        [eye[tokens[:, 0]], np.stack([np.bincount(row, minlength=PAD + 1) for row in tokens])], axis=1
    )
