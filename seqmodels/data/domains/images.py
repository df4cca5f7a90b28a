"""Images as sequences of pixels, row by row."""

import dataclasses

import numpy as np

from seqmodels.data.contract import Batch
from seqmodels.data.domains.domain import longest
from seqmodels.data.domains.examples import Labelled, divided, standardised


@dataclasses.dataclass(frozen=True)
class Images(Labelled):
    """Square images with a class each; inputs [n, side^2, C], whose background is 0.

    Attributes:
        warp: in training each image is moved, stretched, sheared and turned at random: standard deviation of the four
            entries of the matrix and, in sides of the image, of the shift. 0: not at all.
        order: [side^2] int, the pixel at each place of the sequence. None: row by row.
    """

    warp: float = 0.0
    order: np.ndarray | None = None

    def read(self, numbers: np.ndarray, length: int, rng: np.random.Generator | None = None) -> Batch:
        """As `Labelled`."""
        inputs, rows = self.inputs[numbers], np.arange(len(numbers))
        if self.warp and rng is not None:
            inputs = warped(inputs, self.warp, rng)
        if self.order is not None:
            inputs = inputs[:, self.order]
        values = dict(inputs=inputs, lengths=self.lengths[numbers], labels=self.labels[numbers])
        return Labelled(**values, mean=self.mean, deviation=self.deviation).read(rows, length)


def warped(inputs: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Images [B, side^2, C] after a random affine map of each, by bilinear interpolation; 0 comes in at the edges."""
    batch, pixels, channels = inputs.shape
    side = round(pixels**0.5)
    matrix = np.eye(2) + strength * rng.normal(size=(batch, 2, 2))
    shift = strength * side * rng.normal(size=(batch, 1, 2))
    centre = (side - 1) / 2
    grid = np.stack(np.meshgrid(*[np.arange(side) - centre] * 2, indexing="ij"), axis=-1).reshape(1, pixels, 2)
    place = grid @ matrix + shift + centre + 1  # in an image with a frame of zeros, one pixel wide
    place = np.clip(place, 0, side + 0.999)
    corner = place.astype(int)
    part = place - corner
    framed = np.pad(inputs.reshape(batch, side, side, channels), ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows, total = np.arange(batch)[:, None], np.zeros(inputs.shape, np.float32)
    for down in (0, 1):
        for right in (0, 1):
            weight = np.abs(1 - down - part[..., 0]) * np.abs(1 - right - part[..., 1])
            total += weight[..., None] * framed[rows, corner[..., 0] + down, corner[..., 1] + right]
    return total


def image_splits(
    every: Images, last: int, validation: float, length: int, test_share: float = 0.2
) -> dict[str, Labelled]:
    """Splits of images, standardised by the train split.

    Args:
        last: so many images at the end are the test split; 0: a share of each class is, drawn.
        validation: share of each class of the others that is the validation split, drawn.
        length: `config.seq_len`.
    """
    labels = every.labels
    if last:
        rest, test = np.arange(len(labels) - last), np.arange(len(labels) - last, len(labels))
    else:
        rest, test = divided(labels, test_share)
    train, held = divided(labels[rest], validation, seed=1)
    parts = {"train": rest[train], "validation": rest[held], "test": test}
    found = standardised({name: every.part(rows) for name, rows in parts.items() if len(rows)})
    longest(found, length)
    return found
