"""Makes a folder of spoken words by the synthesisers espeak-ng and flite, for `data.name=sound` (docs/domains.md).

    apt-get install espeak-ng flite
    python benchmarks/speak.py data/spoken                     # ten digits, espeak-ng; and flite's in data/spoken/flite

The synthesisers are not deterministic, so the clips are made once and kept; what is there already stays. A clip is
WORD/VOICE_ACCENT_SPEED_PITCH.wav, 16 bits at --rate samples a second, with a little noise. The voice stands before the
first "_" of the name, so that no voice is in two splits.
"""

import argparse
import itertools
import shutil
import subprocess
import sys
import tempfile
import wave
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from scipy.signal import resample_poly

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seqmodels.data.domains.sound import read_wav

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
VOICES = [f"{kind}{n}" for kind, last in (("m", 8), ("f", 5)) for n in range(1, last + 1)]  # espeak-ng's variants
ACCENTS = ["en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-029"]
SPEEDS, PITCHES = (130, 165, 200), (35, 65)
FLITE = ["kal16", "awb", "rms", "slt"]
QUIET = 0.03  # of the largest sample; what is below at both ends is cut off
NOISE = 0.002  # deviation, as a share of the largest sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--words", default=",".join(DIGITS))
    parser.add_argument("--rate", type=int, default=8000)
    parser.add_argument("--espeak", default="espeak-ng", help="the command, with its own arguments")
    parser.add_argument("--flite", default="flite", help="the same; empty: none")
    options = parser.parse_args()
    commands = list(clips(options))
    for command in {command[0] for command, _ in commands}:
        if not shutil.which(command):
            sys.exit(f"{command}: is not there; apt-get install espeak-ng flite, or name it by --espeak and --flite")
    with ThreadPoolExecutor() as pool:
        made = sum(pool.map(lambda each: make(*each, options.rate), commands))
    print(f"{made:,} clips made, {len(commands) - made:,} were there, in {options.out}")


def clips(options):
    """Command, without the name of the file to write, and the clip, of each word and voice."""
    espeak, flite = options.espeak.split(), options.flite.split()
    for word in options.words.split(","):
        for voice, accent, speed, pitch in itertools.product(VOICES, ACCENTS, SPEEDS, PITCHES):
            name = f"{voice}_{accent}_{speed}_{pitch}.wav"
            arguments = ["-v", f"{accent}+{voice}", "-s", str(speed), "-p", str(pitch), word, "-w"]
            yield [*espeak, *arguments], options.out / word / name
        for voice, stretch in itertools.product(FLITE if flite else (), np.linspace(0.7, 1.3, 10)):
            arguments = ["-voice", voice, "--setf", f"duration_stretch={stretch:.2f}", "-t", word, "-o"]
            yield [*flite, *arguments], options.out / "flite" / word / f"{voice}_{stretch:.2f}.wav"


def make(command: list[str], path: Path, rate: int) -> bool:
    """Makes a clip if it is not there."""
    if path.exists():
        return False
    with tempfile.NamedTemporaryFile(suffix=".wav") as raw:
        subprocess.run([*command, raw.name], check=True, capture_output=True)
        with wave.open(raw.name) as file:
            theirs = file.getframerate()
        samples = trimmed(resample_poly(read_wav(Path(raw.name)).astype(float), rate, theirs))
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


def trimmed(samples: np.ndarray) -> np.ndarray:
    """Samples [T] without silence at both ends: synthesisers leave different amounts of it."""
    loud = np.flatnonzero(np.abs(samples) > QUIET * np.abs(samples).max())
    return samples[loud[0] : loud[-1] + 1] if len(loud) else samples


if __name__ == "__main__":
    main()
