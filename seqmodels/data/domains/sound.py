"""Sounds with a class each: a folder of WAV files for each class, as in Speech Commands (Warden 2018)."""

import dataclasses
import hashlib
import itertools
import re
import wave
from pathlib import Path

import numpy as np

from seqmodels.data.domains.baselines import logistic
from seqmodels.data.domains.domain import Baselines, Domain, Splits, classes
from seqmodels.data.domains.examples import Labelled, standardised
from seqmodels.data.domains.files import Place
from seqmodels.errors import UserError

LISTS = (("test", "testing_list.txt"), ("validation", "validation_list.txt"))
WINDOW, BANDS = 400, 24  # samples of a window of the baseline's spectrogram, and its bands at most


@dataclasses.dataclass(frozen=True)
class Sound(Domain):
    """One class a folder. Clips are cut, or filled up with padding, to `config.seq_len` samples.

    The splits are those of the lists of Speech Commands, where the folder has them. Else they follow from a hash of the
    speaker, who is what stands before the first "_" of a file's name: a tenth each is held out. So no speaker is in two
    splits.

    Attributes:
        every: every how many samples one is read, without a filter, as S4 and S5 do to halve the rate.
        other: a folder beside the classes' folders whose clips, by another speaker or synthesiser, are the test split.
    """

    every: int = 1
    other: str = ""

    def __post_init__(self) -> None:
        if self.every < 1:
            self.refuse("every", "at least 1")

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
        inputs, lengths = np.zeros((len(files), length, 1), np.int16), np.zeros(len(files), int)
        for row, (path, _) in enumerate(files):
            samples = read_wav(path)[:: self.every][:length]
            inputs[row, : len(samples), 0], lengths[row] = samples, len(samples)
        return Labelled(inputs, lengths, np.array([label for _, label in files], np.int32))


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
        samples = rows.read(numbers, longest)["values"][..., 0]
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
