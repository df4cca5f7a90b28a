"""Handwritten digits of 8 by 8 pixels (UCI Optical Recognition, as scikit-learn has them), pixel by pixel."""

import dataclasses
import gzip
import io

import numpy as np

from seqmodels.data.domains.baselines import accuracies
from seqmodels.data.domains.domain import Baselines, Domain, Splits, classes
from seqmodels.data.domains.files import Package, Place
from seqmodels.data.domains.images import Images, image_splits

SCIKIT_LEARN = Package("scikit-learn", "1.9.1", "sklearn", "datasets/data")
LAST = 360  # rows of the test split; other writers than those before


@dataclasses.dataclass(frozen=True)
class Digits(Domain):
    """1,797 images of ten classes, as 64 steps of one pixel, row by row.

    Attributes:
        split: "last": the last 360 images are the test split, most of them of writers who are not in the rest.
            "random": a fifth of each class is, drawn; this is easier.
        validation: share of the other images that is the validation split, drawn.
        warp: see `Images`.
    """

    split: str = "last"
    validation: float = 0.1
    warp: float = 0.0

    def __post_init__(self) -> None:
        self.choose("split", "last", "random")
        self.share("validation")
        self.share("warp")

    def splits(self, place: Place, length: int) -> Splits:
        text = gzip.decompress(place.read("digits.csv.gz", SCIKIT_LEARN))
        table = np.loadtxt(io.BytesIO(text), delimiter=",", dtype=np.float32)
        lengths, labels = np.full(len(table), 64), table[:, -1].astype(np.int32)
        every = Images(table[:, :-1, None], lengths, labels, warp=self.warp)
        return image_splits(every, LAST if self.split == "last" else 0, self.validation, length)

    def ids(self, splits: Splits) -> dict[str, int]:
        return {"labels": classes(splits)}

    def baselines(self, splits: Splits, split: str) -> Baselines:
        return accuracies(splits["train"], splits[split])
