"""Handwritten digits of 8 by 8 pixels (UCI Optical Recognition, as scikit-learn has them), pixel by pixel."""

import dataclasses
import gzip
import io

import numpy as np

from seqmodels.data.domains.baselines import accuracies
from seqmodels.data.domains.domain import Baselines, Domain, Splits, classes, longest
from seqmodels.data.domains.examples import Labelled, divided, standardised
from seqmodels.data.domains.files import Package, Place

SCIKIT_LEARN = Package("scikit-learn", "1.9.1", "sklearn", "datasets/data")
LAST = 360  # rows of the test split; other writers than those before


@dataclasses.dataclass(frozen=True)
class Digits(Domain):
    """1,797 images of ten classes, as 64 steps of one pixel, row by row.

    Attributes:
        split: "last": the last 360 images are the test split, most of them of writers who are not in the rest.
            "random": a fifth of each class is, drawn; this is easier.
        validation: share of the other images that is the validation split, drawn.
    """

    split: str = "last"
    validation: float = 0.1

    def __post_init__(self) -> None:
        self.choose("split", "last", "random")
        self.share("validation")

    def splits(self, place: Place, length: int) -> Splits:
        text = gzip.decompress(place.read("digits.csv.gz", SCIKIT_LEARN))
        table = np.loadtxt(io.BytesIO(text), delimiter=",", dtype=np.float32)
        return images(table[:, :-1], table[:, -1].astype(np.int32), self.split, LAST, self.validation, length)

    def ids(self, splits: Splits) -> dict[str, int]:
        return {"labels": classes(splits)}

    def baselines(self, splits: Splits, split: str) -> Baselines:
        return accuracies(splits["train"], splits[split])


def images(
    pixels: np.ndarray, labels: np.ndarray, split: str, last: int, validation: float, length: int
) -> dict[str, Labelled]:
    """Splits of images as sequences of pixels: pixels [n, T] float32, labels [n] int32; see `Digits`."""
    every = Labelled(pixels[..., None], np.full(len(labels), pixels.shape[1]), labels)
    if split == "last":
        rest, test = np.arange(len(labels) - last), np.arange(len(labels) - last, len(labels))
    else:
        rest, test = divided(labels, 0.2)
    train, held = divided(labels[rest], validation, seed=1)
    parts = {"train": rest[train], "validation": rest[held], "test": test}
    found = standardised({name: every.part(rows) for name, rows in parts.items() if len(rows)})
    longest(found, length)
    return found
