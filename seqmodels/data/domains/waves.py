"""The next sample of sounds, as one of 256 mu-law ids (WaveNet; SaShiMi, Goel et al. 2022)."""

import dataclasses
import math
from typing import ClassVar

import numpy as np

from seqmodels.data import mu_law
from seqmodels.data.contract import Batch
from seqmodels.data.domains.domain import Baselines, Domain, Splits
from seqmodels.data.domains.examples import digest
from seqmodels.data.domains.files import Place
from seqmodels.data.domains.sound import read_wav
from seqmodels.errors import UserError

IDS, SILENCE = 256, 128
SHARES = (("train", 0.88), ("validation", 0.94), ("test", 1.0))


@dataclasses.dataclass(frozen=True)
class Ids:
    """Rows of T ids, one after the other in each file; the last samples of a file that fill no row are left out.

    Attributes:
        rows: [n, T] uint8.
    """

    rows: np.ndarray

    @property
    def count(self) -> int:
        return len(self.rows)

    def read(self, numbers: np.ndarray, length: int, rng: np.random.Generator | None = None) -> Batch:
        """`targets` [B, T], the ids; `tokens`, the ids before them, where SILENCE is the first; `segment_ids`."""
        targets = self.rows[numbers].astype(np.int32)
        first = np.full((len(targets), 1), SILENCE, np.int32)
        tokens = np.concatenate([first, targets[:, :-1]], axis=1)
        return {"tokens": tokens, "targets": targets, "segment_ids": np.zeros_like(tokens)}

    def fingerprint(self) -> str:
        return digest(self.rows)


@dataclasses.dataclass(frozen=True)
class Waves(Domain):
    """WAV files of any folders, sorted by name: the first 88 % of the files are the train split, 6 % each the others.

    Samples of 16 bits are divided by 2^15; clips keep their levels, which the authors' code does not.

    Attributes:
        every: every how many samples one is read, without a filter.
    """

    objective: ClassVar[str] = "next_token"

    every: int = 1

    def __post_init__(self) -> None:
        if self.every < 1:
            self.refuse("every", "at least 1")

    def splits(self, place: Place, length: int) -> Splits:
        files = sorted(place.file().rglob("*.wav"))
        found, first = {}, 0
        for name, end in SHARES:
            last = round(end * len(files))
            waves = [mu_law.encode(read_wav(file)[:: self.every] / 2**15) for file in files[first:last]]
            rows = [wave[: len(wave) // length * length].reshape(-1, length) for wave in waves]
            found[name] = Ids(np.concatenate([np.zeros((0, length)), *rows]).astype(np.uint8))
            if not found[name].count:
                raise UserError(f"config.seq_len={length}: the {last - first} WAV files of {name} have no row so long")
            first = last
        return found

    def ids(self, splits: Splits) -> dict[str, int]:
        return {"tokens": IDS, "targets": IDS}

    def baselines(self, splits: Splits, split: str) -> Baselines:
        """How often each id occurs, and how often after each id before it; 1 is added to each count."""
        train, test = (part.read(np.arange(part.count), 0) for part in (splits["train"], splits[split]))
        found = {}
        for name, before in (("ids", np.zeros_like), ("ids by the last", lambda tokens: tokens)):
            table = np.ones((IDS, IDS))
            np.add.at(table, (before(train["tokens"]), train["targets"]), 1)
            table /= table.sum(axis=1, keepdims=True)
            nats = float(-np.log(table[before(test["tokens"]), test["targets"]]).mean())
            found[name] = {"loss": nats, "bits": nats / math.log(2)}
        return found
