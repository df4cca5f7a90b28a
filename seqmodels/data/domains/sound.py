"""Sounds with a class each: a folder of WAV files for each class, as in Speech Commands (Warden 2018)."""

import dataclasses
import functools
import hashlib
import itertools
import re
import wave
from pathlib import Path

import numpy as np

from seqmodels.data.contract import Batch
from seqmodels.data.domains.baselines import logistic
from seqmodels.data.domains.domain import Baselines, Domain, Splits, classes
from seqmodels.data.domains.examples import Labelled, standardised
from seqmodels.data.domains.files import Place
from seqmodels.errors import UserError

LISTS = (("test", "testing_list.txt"), ("validation", "validation_list.txt"))
FRAME, HOP, POINTS = 200, 80, 512  # samples of a frame, from one to the next, and of its Fourier transform
BEND = 0.175  # share of the highest frequency up to which the bands are equally wide (700 Hz at 8,000 samples a second)
FLOOR = 1e-3  # added to the power of every band, as a share of a clip's mean
SNR = (5.0, 40.0)  # decibels, of the noise that training adds
WINDOW, BANDS = 400, 24  # samples of a window of the baseline's spectrogram, and its bands at most


@dataclasses.dataclass(frozen=True)
class Sound(Domain):
    """One class a folder. Clips are cut, or filled up with padding, to `config.seq_len` samples.

    The splits are those of the lists of Speech Commands, where the folder has them. Else they follow from a hash of the
    speaker, who is what stands before the first "_" of a file's name: a tenth each is held out. So no speaker is in two
    splits.

    Attributes:
        every: every how many samples one is read, without a filter, as S4 and S5 do to halve the rate.
        bands: 0: a step is a sample. Else it is a frame of 200 samples, 80 after the one before: the logarithms of the
            power in so many bands, of which each has mean 0 over its clip.
        scale: what has deviation 1 over a clip: "band": each band; "clip": all bands together, so that a band that says
            little stays small.
        vary: in training clips are played faster or slower, by a factor with this deviation of its logarithm, and noise
            is added. 0: neither.
        hide: in training two runs of frames and two of bands are read as 0, each of up to this share of them (Park et
            al. 2019, SpecAugment).
        other: a folder beside the classes' folders whose clips, by another speaker or synthesiser, are the test split.
    """

    every: int = 1
    other: str = ""
    bands: int = 0
    scale: str = "band"
    vary: float = 0.0
    hide: float = 0.0

    def __post_init__(self) -> None:
        if self.every < 1:
            self.refuse("every", "at least 1")
        if not 0 <= self.bands <= 128:
            self.refuse("bands", "from 0 to 128")
        self.choose("scale", "band", "clip")
        self.share("vary")
        self.share("hide")
        if self.hide and not self.bands:
            self.refuse("hide", "0 with bands=0")

    def splits(self, place: Place, length: int) -> Splits:
        folder = place.file()
        names = sorted(
            d.name for d in folder.iterdir() if d.is_dir() and d.name not in ("_background_noise_", self.other)
        )
        if len(names) < 2:
            raise UserError(f"config.data.path={place.path!r}: must hold a folder of WAV files for each class")
        files: dict[str, list[tuple[Path, int]]] = {"train": [], "validation": [], "test": []}
        listed = {line.strip(): split for split, name in LISTS if (folder / name).exists()
                  for line in (folder / name).read_text().splitlines()}  # fmt: skip
        for label, name in enumerate(names):
            for path in sorted((folder / name).glob("*.wav")):
                split = listed.get(f"{name}/{path.name}", "train") if listed else split_of(path.stem)
                files[split].append((path, label))
        if self.other:
            files["test"] = [(path, label) for label, name in enumerate(names)
                             for path in sorted((folder / self.other / name).glob("*.wav"))]  # fmt: skip
        found = {name: self._clips(each, length) for name, each in files.items() if each}
        if "train" not in found or "test" not in found:
            raise UserError(f"config.data.path={place.path!r}: must hold clips of the train and the test split")
        return standardised(found)

    def ids(self, splits: Splits) -> dict[str, int]:
        return {"labels": classes(splits)}

    def baselines(self, splits: Splits, split: str) -> Baselines:
        train, test = splits["train"], splits[split]
        guess = logistic(spectrogram(train), train.labels, spectrogram(test))
        return {"logistic regression": {"accuracy": float((guess == test.labels).mean())}}

    def _clips(self, files: list[tuple[Path, int]], length: int) -> Labelled:
        if self.bands:
            length = (length - 1) * HOP + FRAME
        inputs, lengths = np.zeros((len(files), length, 1), np.int16), np.zeros(len(files), int)
        for row, (path, _) in enumerate(files):
            samples = read_wav(path)[:: self.every][:length]
            inputs[row, : len(samples), 0], lengths[row] = samples, len(samples)
        labels = np.array([label for _, label in files], np.int32)
        return Clips(inputs, lengths, labels, bands=self.bands, scale=self.scale, vary=self.vary, hide=self.hide)


@dataclasses.dataclass(frozen=True)
class Clips(Labelled):
    """Clips with a class each; inputs [n, samples, 1] int16.

    Attributes:
        bands, scale, vary, hide: see `Sound`.
    """

    bands: int = 0
    scale: str = "band"
    vary: float = 0.0
    hide: float = 0.0

    def read(self, numbers: np.ndarray, length: int, rng: np.random.Generator | None = None) -> Batch:
        """As `Labelled`; with bands the positions are frames."""
        samples, lengths = self.inputs[numbers, :, 0].astype(np.float32), self.lengths[numbers]
        if self.vary and rng is not None:
            samples, lengths = varied(samples, lengths, self.vary, rng)
        rows = Labelled(samples[..., None], lengths, self.labels[numbers], self.mean, self.deviation)
        if self.bands:
            frames = np.minimum(np.maximum(lengths - FRAME, 0) // HOP + 1, length)
            values = spectra(samples, frames, length, self.bands, self.scale)
            if self.hide and rng is not None:
                conceal(values, frames, self.hide, rng)
            rows = Labelled(values, frames, rows.labels)
        return rows.read(np.arange(len(samples)), length)


def varied(
    samples: np.ndarray, lengths: np.ndarray, strength: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Clips [B, T] of some lengths [B] at other speeds, with noise, and their lengths; what is too long is cut."""
    found, ends = np.zeros_like(samples), np.zeros_like(lengths)
    for row, (clip, end) in enumerate(zip(samples, lengths, strict=True)):
        speed = np.exp(strength * rng.normal())
        ends[row] = min(max(int(end / speed), 1), len(clip))
        found[row, : ends[row]] = np.interp(np.arange(ends[row]) * speed, np.arange(end), clip[:end])
        noise = np.sqrt(np.mean(clip[:end] ** 2)) * 10 ** (-rng.uniform(*SNR) / 20)
        found[row, : ends[row]] += noise * rng.normal(size=ends[row])
    return found, ends


def spectra(samples: np.ndarray, frames: np.ndarray, length: int, bands: int, scale: str) -> np.ndarray:
    """[B, length, bands] float32: logarithms of the power in bands of samples [B, T].

    Each band has mean 0 over the first `frames` [B] frames of a row, which are the real ones, and by `scale` each band
    or all of them together have deviation 1. FLOOR of the mean power of these frames is added to every power.
    """
    samples = np.pad(samples, ((0, 0), (0, max((length - 1) * HOP + FRAME - samples.shape[1], 0))))
    windows = np.lib.stride_tricks.sliding_window_view(samples, FRAME, axis=1)[:, ::HOP][:, :length]
    power = np.abs(np.fft.rfft(windows * np.hanning(FRAME), POINTS, axis=-1)) ** 2
    real, count = (np.arange(length) < frames[:, None])[..., None], frames[:, None, None]
    mean = np.where(real, power, 0).sum(axis=(1, 2), keepdims=True) / (count * power.shape[2])
    logs = np.log(power @ triangles(bands, POINTS // 2 + 1) + FLOOR * mean + 1e-6)
    centred = logs - np.where(real, logs, 0).sum(axis=1, keepdims=True) / count
    square = np.where(real, centred**2, 0).sum(axis=1, keepdims=True) / count
    deviation = np.sqrt(square if scale == "band" else square.mean(axis=2, keepdims=True))
    return (centred / np.maximum(deviation, 1e-3)).astype(np.float32)


def conceal(values: np.ndarray, frames: np.ndarray, share: float, rng: np.random.Generator) -> None:
    """Sets two runs of frames and two of bands of each row [B, T, C] to 0, in place."""
    for row, real in zip(values, frames, strict=True):
        for part, size in ((row[:real], int(real)), (row.T, row.shape[1])) * 2:
            run = int(rng.integers(int(share * size) + 1))
            start = int(rng.integers(size - run + 1))
            part[start : start + run] = 0


@functools.cache
def triangles(bands: int, points: int) -> np.ndarray:
    """[points, bands]: weights of frequencies in overlapping bands on the mel scale."""
    place = np.log1p(np.linspace(0, 1, points) / BEND) / np.log1p(1 / BEND) * (bands + 1)
    return np.maximum(1 - np.abs(place[:, None] - np.arange(1, bands + 1)), 0)


def split_of(stem: str) -> str:
    """The split of a clip, from the speaker in its name."""
    speaker = re.sub(r"_.*", "", stem)
    place = int(hashlib.sha256(speaker.encode()).hexdigest()[:8], 16) % 10
    return {0: "test", 1: "validation"}.get(place, "train")


def spectrogram(rows: Labelled, frames: int = 20) -> np.ndarray:
    """[n, frames * BANDS]: logarithm of the power in bands of the spectrum, less its mean over the clip.

    The windows are spread over the real samples of a clip, and the bands over the logarithm of the frequency.
    """
    longest = rows.inputs.shape[1]
    width = min(WINDOW, longest)
    place = np.linspace(0, 1, frames)[None] * np.maximum(rows.lengths - width, 0)[:, None]
    edges = np.unique(np.geomspace(1, width // 2 + 1, BANDS + 1).round().astype(int))
    features = []
    for first in range(0, rows.count, 64):  # so many clips at a time
        numbers = np.arange(first, min(first + 64, rows.count))
        samples = rows.inputs[numbers, :, 0].astype(np.float64)
        windows = place[numbers].astype(int)[..., None] + np.arange(width)
        taken = np.take_along_axis(samples, windows.reshape(len(numbers), -1), axis=1).reshape(windows.shape)
        power = np.abs(np.fft.rfft(taken * np.hanning(width), axis=-1)) ** 2
        bands = np.stack([power[..., a:b].sum(-1) for a, b in itertools.pairwise(edges)], axis=-1)
        logs = np.log(bands + 1e-3 * bands.mean(axis=(1, 2), keepdims=True) + 1e-12)
        features.append((logs - logs.mean(axis=(1, 2), keepdims=True)).reshape(len(numbers), -1))
    return np.concatenate(features)


def read_wav(path: Path) -> np.ndarray:
    """Samples [T] int16 of the first channel. Raises: UserError for other widths of samples."""
    try:
        with wave.open(str(path)) as file:
            if file.getsampwidth() != 2:
                raise UserError(f"{path}: must have samples of 16 bits")
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
            return samples.reshape(-1, file.getnchannels())[:, 0]
    except (wave.Error, EOFError) as error:
        raise UserError(f"{path}: is no WAV file ({error})") from error
