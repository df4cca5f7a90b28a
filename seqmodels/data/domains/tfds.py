"""Datasets of tensorflow-datasets by name, which need a network to be prepared: not tried here.

They must be prepared with file_format="array_record" (docs/data.md), and are then read without TensorFlow.
"""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from seqmodels.data.domains.baselines import logistic
from seqmodels.data.domains.dataset import ORDER
from seqmodels.data.domains.domain import Baselines, Domain, Splits, classes, longest
from seqmodels.data.domains.examples import Labelled, divided, standardised
from seqmodels.data.domains.files import Place
from seqmodels.data.domains.images import Images
from seqmodels.data.domains.texts import BYTES, Documents, bags
from seqmodels.errors import UserError


@dataclasses.dataclass(frozen=True)
class Prepared(Domain):
    """Base: `name` in tensorflow-datasets, read from the folder `config.data.path`, or else that of the cache.

    Attributes:
        validation: share of each class of the train split that is the validation split, where the dataset has none.
    """

    name: ClassVar[str]

    validation: float = 0.1

    def __post_init__(self) -> None:
        self.share("validation")

    def splits(self, place: Place, length: int) -> Splits:
        parts = {name: self.rows(source, length) for name, source in self._sources(place).items()}
        if "validation" not in parts:
            kept, held = divided(parts["train"].labels, self.validation, seed=42)
            whole = parts["train"]
            parts |= {"train": self.part(whole, kept), "validation": self.part(whole, held)}
        found = {name: part for name, part in parts.items() if part.count}
        return standardised(found) if isinstance(found["train"], Labelled) else found

    def rows(self, source: Any, length: int) -> Any:
        """`Examples` of one split, from a random-access source of dicts."""
        raise NotImplementedError

    def part(self, rows: Any, chosen: np.ndarray) -> Any:
        """Some of the rows."""
        return rows.part(chosen)

    def ids(self, splits: Splits) -> dict[str, int]:
        return {"labels": classes(splits)}

    def baselines(self, splits: Splits, split: str) -> Baselines:
        """Logistic regression on 5,000 rows of the train split."""
        train, test = splits["train"], splits[split]
        few = train.part(np.arange(min(5000, train.count)))
        guess = logistic(few.flat(), few.labels, test.flat())
        return {"logistic regression": {"accuracy": float((guess == test.labels).mean())}}

    def _sources(self, place: Place) -> dict[str, Any]:
        import tensorflow_datasets as tfds

        folder = place.path or str(place.cache / "tensorflow_datasets")
        try:
            builder = tfds.builder(self.name, data_dir=folder)
            sources = {split: builder.as_data_source(split=split) for split in ORDER if split in builder.info.splits}
            if "train" not in sources:
                raise FileNotFoundError("no split train")
            return sources
        except Exception as error:  # of any type: it is not prepared, or not in this format
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"config.data.name={place.name!r}: tensorflow-datasets has it not prepared in {folder} "
                f'(file_format="array_record", docs/data.md): {reason}'
            ) from error


@dataclasses.dataclass(frozen=True)
class Pictures(Prepared):
    """Images, pixel by pixel.

    Attributes:
        grey: one channel, (299 R + 587 G + 114 B) / 1000, as in the Long Range Arena.
        warp: see `Images`.
    """

    grey: bool = True
    warp: float = 0.0

    def splits(self, place: Place, length: int) -> Splits:
        found = super().splits(place, length)
        longest(found, length)
        return found

    def rows(self, source: Any, length: int) -> Any:
        pixels = np.stack([row["image"].reshape(-1, row["image"].shape[-1]) for row in source]).astype(np.float32)
        if self.grey and pixels.shape[-1] == 3:
            pixels = pixels @ np.array([[0.299], [0.587], [0.114]], np.float32)
        labels = np.array([row["label"] for row in source], np.int32)
        return Images(pixels, np.full(len(labels), pixels.shape[1]), labels, warp=self.warp)


@dataclasses.dataclass(frozen=True)
class Mnist(Pictures):
    """60,000 and 10,000 digits of 784 pixels."""

    name: ClassVar[str] = "mnist"


@dataclasses.dataclass(frozen=True)
class Cifar10(Pictures):
    """50,000 and 10,000 pictures of 1024 pixels."""

    name: ClassVar[str] = "cifar10"


@dataclasses.dataclass(frozen=True)
class SpeechCommands(Prepared):
    """Clips of 16,000 samples; the classes are those of tensorflow-datasets (ten words, silence, unknown)."""

    name: ClassVar[str] = "speech_commands"

    def rows(self, source: Any, length: int) -> Any:
        clips, labels = [np.asarray(row["audio"]) for row in source], [row["label"] for row in source]
        inputs = np.zeros((len(clips), length, 1), np.int16)
        lengths = np.array([min(len(clip), length) for clip in clips])
        for row, clip in enumerate(clips):
            inputs[row, : lengths[row], 0] = clip[:length]
        return Labelled(inputs, lengths, np.array(labels, np.int32))


@dataclasses.dataclass(frozen=True)
class ImdbReviews(Prepared):
    """25,000 and 25,000 reviews, byte by byte, with two classes."""

    name: ClassVar[str] = "imdb_reviews"

    def rows(self, source: Any, length: int) -> Any:
        texts = tuple((bytes(row["text"]),) for row in source)
        return Documents(texts, np.array([row["label"] for row in source], np.int32))

    def part(self, rows: Any, chosen: np.ndarray) -> Any:
        return Documents(tuple(rows.texts[n] for n in chosen), rows.labels[chosen])

    def ids(self, splits: Splits) -> dict[str, int]:
        return {"tokens": BYTES, "labels": 2}

    def baselines(self, splits: Splits, split: str) -> Baselines:
        few = self.part(splits["train"], np.arange(min(5000, splits["train"].count)))
        guess = logistic(bags(few), few.labels, bags(splits[split]))
        return {"words, logistic": {"accuracy": float((guess == splits[split].labels).mean())}}
