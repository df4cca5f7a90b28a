"""Makes a folder of spoken words by the synthesisers espeak-ng and flite, for `data.name=sound` (docs/domains.md).

    apt-get install espeak-ng flite
    python benchmarks/speak.py data/spoken                     # ten digits, espeak-ng; and flite's in data/spoken/flite

espeak-ng says every word in every of its voices and accents once, at a speed and a pitch that are drawn for the clip.
The synthesisers are not deterministic, so the clips are made once and kept; what is there already stays. A clip is
WORD/FAMILY_VOICE_ACCENT_SPEED_PITCH.wav, 16 bits at --rate samples a second, with a little noise. The family of the
voice, such as klatt of klatt1 to klatt6, stands before the first "_" of the name, so that no family is in two splits.
"""

import argparse
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
import wave
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from scipy.signal import resample_poly

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seqmodels.data.domains.sound import read_wav

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ACCENTS = [
    "en-us", "en-us-nyc", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029"
]  # fmt: skip
SPEEDS, PITCHES = (110, 230), (20, 80)  # drawn from the first on, below the second
FLITE = ["kal16", "awb", "rms", "slt"]
QUIET = 0.005  # of the largest sample: what is below at both ends is cut off; an f is above, in its root mean square
WINDOW = 0.02  # seconds of which this mean is taken
NOISE = 0.002  # deviation, as a share of the largest sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--words", default=",".join(DIGITS))
    parser.add_argument("--rate", type=int, default=8000)
    parser.add_argument("--espeak", default="espeak-ng", help="the command, with its own arguments")
    parser.add_argument("--flite", default="flite", help="the same; empty: none")
    options = parser.parse_args()
    for command in filter(None, (options.espeak, options.flite)):
        if not shutil.which(command.split()[0]):
            sys.exit(f"{command}: is not there; apt-get install espeak-ng flite, or name it by --espeak and --flite")
    commands = list(clips(options))
    with ThreadPoolExecutor() as pool:
        made = sum(pool.map(lambda each: make(*each, options.rate), commands))
    print(f"{made:,} clips made, {len(commands) - made:,} were there, in {options.out}")


def clips(options):
    """Command, without the name of the file to write, and the clip, of each word and voice."""
    espeak, flite = options.espeak.split(), options.flite.split()
    spoken = voices(espeak)
    for word in options.words.split(","):
        for voice, accent in itertools.product(spoken, ACCENTS):
            rng = np.random.default_rng(zlib.crc32(f"{word} {voice} {accent}".encode()))
            speed, pitch = rng.integers(*SPEEDS), rng.integers(*PITCHES)
            name = f"{family(voice)}_{voice.replace(' ', '-')}_{accent}_{speed}_{pitch}.wav"
            arguments = ["-v", f"{accent}+{voice}", "-s", str(speed), "-p", str(pitch), word, "-w"]
            yield [*espeak, *arguments], options.out / word / name
        for voice, stretch in itertools.product(FLITE if flite else (), np.linspace(0.7, 1.3, 10)):
            arguments = ["-voice", voice, "--setf", f"duration_stretch={stretch:.2f}", "-t", word, "-o"]
            yield [*flite, *arguments], options.out / "flite" / word / f"{voice}_{stretch:.2f}.wav"


def voices(espeak: list[str]) -> list[str]:
    """The variants of voices that espeak-ng has, by the names of their files."""
    listed = subprocess.run([*espeak, "--voices=variant"], check=True, capture_output=True, text=True).stdout
    return sorted(set(re.findall(r"!v/(.+?)\s*(?:\(.*\))?$", listed, re.MULTILINE)), key=str.lower)


def family(voice: str) -> str:
    """A voice without the number at its end; m1 to m8 and f1 to f5 are eight men and five women."""
    name = voice.lower().replace(" ", "-").replace("_", "-")
    return re.sub(r"(?<=..)\d+$", "", name)


def make(command: list[str], path: Path, rate: int) -> bool:
    """Makes a clip if it is not there."""
    if path.exists():
        return False
    with tempfile.NamedTemporaryFile(suffix=".wav") as raw:
        subprocess.run([*command, raw.name], check=True, capture_output=True)
        with wave.open(raw.name) as file:
            theirs = file.getframerate()
        samples = resample_poly(trimmed(read_wav(Path(raw.name)).astype(float), round(WINDOW * theirs)), rate, theirs)
    largest = max(np.abs(samples).max(), 1.0)
    rng = np.random.default_rng(len(samples))
    samples = samples / largest + NOISE * rng.normal(size=len(samples))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with wave.open(str(part), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(samples, -1, 1) * 0.9 * 2**15).astype("<i2").tobytes())
    part.replace(path)
    return True


def trimmed(samples: np.ndarray, width: int) -> np.ndarray:
    """Samples [T] without silence at both ends, by windows of a width: synthesisers leave different amounts of it."""
    power = np.convolve(samples**2, np.ones(width) / width, mode="same")
    loud = np.flatnonzero(power > (QUIET * np.abs(samples).max()) ** 2)
    return samples[loud[0] : loud[-1] + 1] if len(loud) else samples


if __name__ == "__main__":
    main()
