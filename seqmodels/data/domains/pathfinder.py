"""Pathfinder (Linsley et al. 2018; Tay et al. 2020), drawn here: do two discs lie on the same dashed curve?

Two curves ("snakes") of `paddles` strokes each grow from tails that are 27 units apart on a canvas of 300. A disc lies
on the tail of one and on the head of the same (1) or of the other (0). Shorter curves distract. Sizes and turns are
those of the authors' generator, except that strokes are drawn by their distance to pixels and not by OpenCV, straight
at the size of the image.

With `matched`, only pairs of curves count whose two candidate distances between discs are almost equal. Without, the
distance of the discs alone tells much of the answer: the baseline "distance of the discs" says how much.
"""

import dataclasses
import functools
import hashlib
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Self

import numpy as np

from seqmodels.data.contract import Batch
from seqmodels.data.domains.baselines import logistic
from seqmodels.data.domains.contours import path_costs
from seqmodels.data.domains.domain import Baselines, Domain, Splits, classes, longest
from seqmodels.data.domains.examples import Labelled, standardised
from seqmodels.data.domains.files import Place

CANVAS, BORDER = 300.0, 22.0
STROKE, WIDTH, GAP, MARGIN = 5.0, 2.0, 6.0, 4.0  # of a paddle; margin: least distance of paddles of two curves
APART, INSIDE, DISC = 27.0, 54.0, 5.0  # of the tails; of the first tail from the edge; radius
LARGEST_TURN = np.deg2rad(50.0)
TRIES = 25  # for each paddle, before the curve is given up
PIECE = 250  # images that one process draws at a time


@dataclasses.dataclass(frozen=True)
class Pathfinder(Domain):
    """Images of size x size pixels, row by row; drawn once and kept in the cache.

    Attributes:
        size: pixels of a side; 128 is Path-X. paddles: strokes of a curve.
        matched: see above. images: rows of the train split; the others have a tenth each.
        turned: in training each image is turned by a multiple of 90 degrees and perhaps mirrored, at random.
    """

    size: int = 32
    paddles: int = 14
    matched: bool = True
    images: int = 20000
    turned: bool = False

    def __post_init__(self) -> None:
        self.choose("paddles", 6, 9, 14)
        if not 16 <= self.size <= 256:
            self.refuse("size", "from 16 to 256")
        if self.images < 10:
            self.refuse("images", "at least 10")

    def splits(self, place: Place, length: int) -> Splits:
        return self._split(*self._drawn(place.cache / "pathfinder", self.images + 2 * (self.images // 10)), length)

    def unread(self, place: Place, length: int) -> Splits:
        """A few images of stripes: the real ones take hours to draw."""
        pixels = np.tile(np.arange(self.size**2) % 256, (12, 1)).astype(np.uint8)
        few = dataclasses.replace(self, images=10)
        return few._split(pixels, np.arange(12, dtype=np.int32) % 2, np.zeros(12, np.float32), length)

    def _split(self, pixels: np.ndarray, labels: np.ndarray, apart: np.ndarray, length: int) -> Splits:
        """Images [n, size^2], their labels and the distances of their discs [n] as splits."""
        lengths, held, found, first = np.full(len(labels), self.size**2), self.images // 10, {}, 0
        for name, count in (("train", self.images), ("validation", held), ("test", held)):
            rows = slice(first, first + count)
            found[name] = Discs(
                pixels[rows, :, None], lengths[rows], labels[rows], apart=apart[rows], turned=self.turned
            )
            first += count
        longest(found, length)
        return standardised(found)

    def ids(self, splits: Splits) -> dict[str, int]:
        return {"labels": classes(splits)}

    def baselines(self, splits: Splits, split: str) -> Baselines:
        train, test = splits["train"], splits[split]
        features = lambda rows: np.eye(32)[np.clip(rows.apart / 8, 0, 31).astype(int)]  # noqa: E731
        first = np.arange(min(train.count, 4000))  # of what takes long
        few = train.part(first)
        guesses = {
            "distance of the discs": logistic(features(train), train.labels, features(test)),
            "cheapest path": logistic(path_costs(few.inputs[..., 0]), few.labels, path_costs(test.inputs[..., 0])),
            "logistic regression": logistic(few.flat(), few.labels, test.flat()),
        }
        return {name: {"accuracy": float((guess == test.labels).mean())} for name, guess in guesses.items()}

    def _drawn(self, folder: Path, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pixels [n, size^2] uint8, labels [n] and distances of the discs [n]; made once."""
        drawn = {name: value for name, value in dataclasses.asdict(self).items() if name != "turned"}
        settings = json.dumps([1, drawn], sort_keys=True)
        path = folder / f"{hashlib.sha256(settings.encode()).hexdigest()[:16]}.npz"
        if not path.exists():
            print(f"drawing {count:,} images, once, into {path}", flush=True)
            starts = range(0, count, PIECE)
            with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:  # JAX's threads do not survive a fork
                parts = list(pool.map(draw_many, [self] * len(starts), starts, [min(PIECE, count - s) for s in starts]))
            folder.mkdir(parents=True, exist_ok=True)
            made = path.with_name(f"{path.stem}.{id(parts)}.npz")
            arrays = [np.concatenate(each) for each in zip(*parts, strict=True)]
            np.savez_compressed(made, pixels=arrays[0], labels=arrays[1], apart=arrays[2])
            made.replace(path)
        with np.load(path) as stored:
            return stored["pixels"], stored["labels"], stored["apart"]


@dataclasses.dataclass(frozen=True)
class Discs(Labelled):
    """Images with the distance of their discs [n]; see `Pathfinder` for `turned`."""

    apart: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    turned: bool = False

    def read(self, numbers: np.ndarray, length: int, rng: np.random.Generator | None = None) -> Batch:
        """As `Labelled`."""
        if not self.turned or rng is None:
            return super().read(numbers, length)
        rows = self.part(numbers)
        order = symmetries(round(rows.inputs.shape[1] ** 0.5))[rng.integers(8, size=len(numbers))]
        rows = dataclasses.replace(rows, inputs=np.take_along_axis(rows.inputs, order[..., None], axis=1), turned=False)
        return rows.read(np.arange(len(numbers)), length)

    def part(self, chosen: np.ndarray) -> Self:
        return dataclasses.replace(super().part(chosen), apart=self.apart[chosen])


@functools.cache
def symmetries(side: int) -> np.ndarray:
    """[8, side^2]: which pixel comes to each place in the eight turned and mirrored images of a square."""
    places = np.arange(side**2).reshape(side, side)
    return np.stack([np.rot90(each, k).ravel() for each in (places, places.T) for k in range(4)])


def draw_many(settings: Pathfinder, first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images `first` to `first + count`: pixels [n, size^2] uint8, labels [n] int32, distances of the discs [n]."""
    rows = [image(settings, np.random.default_rng([0, first + n])) for n in range(count)]
    pixels, labels, apart = zip(*rows, strict=True)
    return np.stack(pixels), np.array(labels, np.int32), np.array(apart, np.float32)


def image(settings: Pathfinder, rng: np.random.Generator) -> tuple[np.ndarray, int, float]:
    """One image [size^2] uint8, its label, and the distance of its discs."""
    label = int(rng.integers(2))
    tolerance = 4.0 if settings.paddles > 6 else 1.0
    while True:
        curves = two_curves(rng, settings.paddles)
        if curves is None:
            continue
        tail, heads = curves[0][0, 0], [curve[-1, 1] for curve in curves]
        distances = [float(np.linalg.norm(head - tail)) for head in heads]
        if settings.matched and abs(distances[0] - distances[1]) >= tolerance:
            continue
        break
    strokes = list(curves)
    for _ in range(30 // (settings.paddles // 3)):
        for _ in range(TRIES):
            start = rng.uniform(BORDER, CANVAS - BORDER, size=2)
            extra = curve(rng, start, settings.paddles // 3, np.concatenate(strokes))
            if extra is not None:
                strokes.append(extra)
                break
    chosen = 0 if label else 1
    discs = np.stack([tail, heads[chosen]])
    return render(np.concatenate(strokes), discs, settings.size), label, distances[chosen]


def two_curves(rng: np.random.Generator, paddles: int) -> list[np.ndarray] | None:
    """Two curves [paddles, 2 ends, 2] whose tails are APART; None where one has no room."""
    first = rng.uniform(INSIDE, CANVAS - INSIDE, size=2)
    angle = rng.uniform(0, 2 * np.pi)
    second = first + APART * np.array([np.cos(angle), np.sin(angle)])
    one = curve(rng, first, paddles, np.stack([second, second])[None])
    if one is None:
        return None
    other = curve(rng, second, paddles, one)
    return None if other is None else [one, other]


def curve(rng: np.random.Generator, start: np.ndarray, paddles: int, others: np.ndarray) -> np.ndarray | None:
    """A curve [paddles, 2 ends, 2] from `start` that keeps its distance from `others` [n, 2 ends, 2], or None."""
    taken = along(others)
    strokes: list[np.ndarray] = []
    angle = rng.uniform(0, 2 * np.pi)
    for _ in range(paddles):
        for _ in range(TRIES):
            turned = angle + (turn(rng) if strokes else 0.0)
            step = np.array([np.cos(turned), np.sin(turned)])
            begin = strokes[-1][1] + GAP * step if strokes else start
            stroke = np.stack([begin, begin + STROKE * step])
            near = np.concatenate([taken, along(np.stack(strokes[:-1]))]) if len(strokes) > 1 else taken
            distance = np.linalg.norm(along(stroke[None])[:, None] - near[None], axis=-1)
            if stroke.min() >= BORDER and stroke.max() <= CANVAS - BORDER and distance.min() >= MARGIN:
                strokes.append(stroke)
                angle = turned
                break
            if not strokes:  # the direction of the first is free
                angle = rng.uniform(0, 2 * np.pi)
        else:
            return None
    return np.stack(strokes)


def along(strokes: np.ndarray) -> np.ndarray:
    """Both ends and the middle of strokes [n, 2, 2]: [3 n, 2]."""
    return np.concatenate([strokes[:, 0], strokes.mean(axis=1), strokes[:, 1]])


def turn(rng: np.random.Generator) -> float:
    """An angle whose density is proportional to cos^2 of min(1.8 |angle|, pi / 2), up to LARGEST_TURN."""
    while True:
        angle = rng.uniform(-LARGEST_TURN, LARGEST_TURN)
        if rng.random() < np.cos(min(1.8 * abs(angle), np.pi / 2)) ** 2:
            return float(angle)


def render(strokes: np.ndarray, discs: np.ndarray, size: int) -> np.ndarray:
    """[size^2] uint8: about the share of each pixel that strokes [n, 2, 2] and discs [2, 2] cover, times 255."""
    pixel = CANVAS / size
    centre = (np.arange(size) + 0.5) * pixel
    grid = np.stack(np.meshgrid(centre, centre, indexing="ij"), axis=-1).reshape(-1, 1, 2)
    begin, span = strokes[:, 0], strokes[:, 1] - strokes[:, 0]
    place = np.clip(((grid - begin) * span).sum(-1) / (span**2).sum(-1), 0, 1)
    distance = np.linalg.norm(grid - begin - place[..., None] * span, axis=-1)
    ink = np.clip((WIDTH / 2 + pixel / 2 - distance) / pixel, 0, 1).max(axis=1)
    ink = np.minimum(ink * min(1.0, 2 * WIDTH / pixel), 1.0)
    discs_ink = np.clip((DISC + pixel / 2 - np.linalg.norm(grid - discs, axis=-1)) / pixel, 0, 1).max(axis=1)
    return np.round(255 * np.maximum(ink, discs_ink)).astype(np.uint8)
