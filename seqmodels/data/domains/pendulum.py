"""A pendulum that is filmed at irregular times: where is it? (Becker et al. 2019; Schirmer et al. 2022)

The angle follows d2θ/dt2 = -g sin θ + noise, for a pendulum of length 1. A frame shows the bob as a disc on 24 x 24
pixels. Noise on the pixels comes and goes: a frame is s times the picture and 1 - s times noise, and s wanders between
0 and 1, so that only the frames around one tell where the bob is while s is near 0.
"""

import dataclasses
import json
from typing import ClassVar

import numpy as np

from seqmodels.data.contract import Batch
from seqmodels.data.domains.baselines import ridge
from seqmodels.data.domains.domain import Baselines, Domain, Splits
from seqmodels.data.domains.files import Place
from seqmodels.data.times import steps_of
from seqmodels.errors import UserError

SIDE = 24  # pixels
GRAVITY, STEP, EACH = 9.81, 0.005, 10  # m / s^2; seconds of a step of the simulation; steps from a time to the next
KICK = 0.1  # deviation of the noise of the speed, 1 / s, over a second
RADIUS, BOB = 0.75, 0.15  # of the circle of the bob and of the bob, in halves of the picture
NEAR, FEW = 1, 400  # frames before and after one that the second baseline sees; films that baselines are fitted on
FIRST = {"train": 0, "validation": 10**6, "test": 2 * 10**6}  # number of the first film of each split


@dataclasses.dataclass(frozen=True)
class Films:
    """Films by number; film i of a split is always the same.

    Attributes:
        settings: of the domain. split: name. count: number of rows. length: frames of a film.
    """

    settings: "Pendulum"
    split: str
    count: int
    length: int

    def read(self, numbers: np.ndarray, length: int, rng: np.random.Generator | None = None) -> Batch:
        """`values` [B, T, 576], `steps` and `mask` [B, T], `targets` [B, T, 2], sine and cosine of the angle.

        With missing frames also `observed` [B, T, 576].
        """
        settings = self.settings
        rngs = [np.random.default_rng([FIRST[self.split] + int(number)]) for number in numbers]
        times = np.stack([np.sort(own.choice(settings.times, length, replace=False)) for own in rngs])
        angle = np.take_along_axis(angles(rngs, settings.times), times, axis=1)
        values = blurred(pictures(angle), rngs)
        targets = np.stack([np.sin(angle), np.cos(angle)], axis=-1).astype(np.float32)
        steps = steps_of(times, unit=settings.times / length)
        batch = {"values": values, "mask": np.ones(times.shape, bool), "steps": steps, "targets": targets}
        if settings.missing:
            there = np.stack([own.random(length) >= settings.missing for own in rngs])[..., None]
            batch |= {"values": np.where(there, values, 0), "observed": np.broadcast_to(there, values.shape).copy()}
        return batch

    def fingerprint(self) -> str:
        return json.dumps([1, dataclasses.asdict(self.settings), self.split, self.count, self.length])


@dataclasses.dataclass(frozen=True)
class Pendulum(Domain):
    """The films are made when they are read. The number of frames of a film is `config.seq_len`.

    Attributes:
        films: of the train split. held: of the validation, and of the test split.
        times: equally distant times, 0.05 seconds apart, of which the frames of a film are drawn.
        missing: share of the frames that are not observed; their targets count.
    """

    objective: ClassVar[str] = "regress_steps"

    films: int = 2000
    held: int = 1000
    times: int = 100
    missing: float = 0.0

    def __post_init__(self) -> None:
        for field in ("films", "held", "times"):
            if not 1 <= getattr(self, field) < FIRST["validation"]:
                self.refuse(field, f"from 1 to {FIRST['validation'] - 1}")
        self.share("missing")

    def splits(self, place: Place, length: int) -> Splits:
        if length > self.times:
            raise UserError(f"config.seq_len={length}: must be at most config.data.domain.times={self.times}")
        counts = {"train": self.films, "validation": self.held, "test": self.held}
        return {name: Films(self, name, count, length) for name, count in counts.items()}

    def ids(self, splits: Splits) -> dict[str, int]:
        return {}

    def baselines(self, splits: Splits, split: str) -> Baselines:
        """Ridge regression of sine and cosine from the pixels of a frame, and of some frames around it."""
        few = min(FEW, self.films)
        train, test = (splits[name].read(np.arange(count), splits[name].length) for name, count in
                       (("train", few), (split, splits[split].count)))  # fmt: skip
        found = {}
        for name, near in (("ridge, one frame", 0), (f"ridge, {2 * NEAR + 1} frames", NEAR)):
            x, y = (around(batch["values"], near) for batch in (train, test))
            guess = ridge(x, train["targets"].reshape(len(x), 2), y, strength=10.0)
            found[name] = {"mse": float(((guess - test["targets"].reshape(len(y), 2)) ** 2).mean())}
        return found


def around(values: np.ndarray, near: int) -> np.ndarray:
    """Films [B, T, C] to the pixels of each frame and of `near` ones before and after it, [B T, (2 near + 1) C + 1]."""
    length = values.shape[1]
    padded = np.pad(values, ((0, 0), (near, near), (0, 0)), mode="edge")
    sides = [padded[:, k : k + length] for k in range(2 * near + 1)]
    return np.concatenate([*sides, np.ones((*values.shape[:2], 1))], axis=-1).reshape(values.shape[0] * length, -1)


def angles(rngs: list[np.random.Generator], times: int) -> np.ndarray:
    """[B, times] angle of each pendulum, 0 being at the bottom; by the semi-implicit Euler method."""
    angle = np.array([rng.uniform(-np.pi, np.pi) for rng in rngs])
    speed = np.zeros(len(rngs))
    kicks = np.stack([rng.normal(size=times * EACH) for rng in rngs]) * KICK * STEP**0.5
    found = np.zeros((len(rngs), times))
    for n, kick in enumerate(kicks.T):
        if n % EACH == 0:
            found[:, n // EACH] = angle
        speed += kick - GRAVITY * np.sin(angle) * STEP
        angle = angle + speed * STEP
    return found


def pictures(angle: np.ndarray) -> np.ndarray:
    """Angles [...] to pictures [..., SIDE^2], from 0 to 1: about the share of each pixel that the bob covers."""
    centre = (np.arange(SIDE) + 0.5) / SIDE * 2 - 1
    down, right = RADIUS * np.cos(angle)[..., None, None], RADIUS * np.sin(angle)[..., None, None]
    distance = np.hypot(centre[:, None] - down, centre - right)
    return np.clip((BOB - distance) * SIDE / 2 + 0.5, 0, 1).reshape(*angle.shape, SIDE**2)


def blurred(clean: np.ndarray, rngs: list[np.random.Generator]) -> np.ndarray:
    """Films [B, T, SIDE^2] under noise that comes and goes, float32.

    s is a random walk with steps of up to 0.2, cut and stretched from [a, b] to [0, 1], with a below 1/4, b above 3/4.
    """
    length = clean.shape[1]
    found = np.zeros(clean.shape, np.float32)
    for row, rng in enumerate(rngs):
        walk = rng.uniform(0, 1) + np.cumsum(rng.uniform(-0.2, 0.2, size=length))
        walk = 1 - np.abs(1 - walk % 2)  # reflected at 0 and 1
        low, high = rng.uniform(0, 0.25), rng.uniform(0.75, 1)
        share = np.clip((walk - low) / (high - low), 0, 1)[:, None]
        found[row] = share * clean[row] + (1 - share) * rng.uniform(0, 1, size=clean.shape[2:])
    return found
