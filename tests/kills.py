"""A run that is killed again and again ends as one that never was: python tests/kills.py --kills=50 [--seed=0]

Each life of train.py ends by SIGKILL, SIGTERM or Ctrl-C at a random moment: while it starts, after a random step, while
a checkpoint is written, or while the finished model is measured. A run that has ended all the same is compared with one
that was left alone, and the next begins. Compared are, to the last bit: the rows of metrics.jsonl, the events of
TensorBoard as they are in the files, and summary.json.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from seqmodels.training import board, checkpoint, metrics  # noqa: E402
from tests.run_fixtures import write_text  # noqa: E402
from tests.run_processes import command  # noqa: E402

STEPS, EVERY = 240, 17
MOMENTS = ("start", "step", "save", "finish")
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# Exit statuses of a process that a signal has ended, and of one that the signal came too late for. At its very end
# Python gives the signals back to the system, which then ends the process; a shell reports the same status.
ENDS = {
    signal.SIGKILL: (-signal.SIGKILL, 0),
    signal.SIGTERM: (75, 128 + signal.SIGTERM, -signal.SIGTERM, 0),
    signal.SIGINT: (75, 128 + signal.SIGINT, -signal.SIGINT, 0),
}
START = 0.3  # seconds; before, Python itself handles the signals
KINDS = ([], ["--config.training.bptt=True", "--config.training.accumulate=2", "--config.optimizer.ema=0.9"])


class Killed(AssertionError):
    """What differs from a run that was left alone."""


class Schedule:
    """Runs under `folder`, killed at moments that follow from the seed.

    Attributes:
      counts: how many kills at which moment by which signal; and lives that ended before theirs came.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.text = write_text(folder, lines=60)
        self.counts: Counter[str] = Counter()
        self.wholes: dict[int, Path] = {}

    def run(self, kills: int) -> int:
        """Kills so often, and returns how many runs were compared. Raises: Killed."""
        number = 0
        while self.killed < kills:
            workdir, kind = self.folder / f"killed_{number}", number % len(KINDS)
            whole = self._whole(kind)
            while self.killed < kills and not (workdir / "summary.json").exists():
                self._life(workdir, kind)
            self._finish(workdir, kind)
            compare(whole, workdir)
            number += 1
        return number

    @property
    def killed(self) -> int:
        return sum(count for name, count in self.counts.items() if name != "too late")

    def _whole(self, kind: int) -> Path:
        if kind not in self.wholes:
            self.wholes[kind] = self.folder / f"whole_{kind}"
            self._finish(self.wholes[kind], kind)
        return self.wholes[kind]

    def _finish(self, workdir: Path, kind: int) -> None:
        with open(self.folder / "log", "ab") as log:
            status = self._start(workdir, kind, log).wait(300)
        self._check(status, (0,))

    def _life(self, workdir: Path, kind: int) -> None:
        number, moment = self.random.choice(SIGNALS), self.random.choice(MOMENTS)
        before = max((row["step"] for row in rows_of(workdir)), default=0)
        step, delay = self.random.randint(before + 1, before + STEPS // 3), self.random.random()
        with open(self.folder / "log", "ab") as log:
            process = self._start(workdir, kind, log)
            self._wait(process, workdir, moment, step, delay)
            late = process.poll() is not None
            process.send_signal(number)
            if self.random.random() < 0.2:  # once more, as impatient users do
                time.sleep(0.4 * delay)
                process.send_signal(number)
            status = process.wait(300)
        self._check(status, ENDS[number])
        self.counts["too late" if late else f"{moment}, {number.name}"] += 1

    def _wait(self, process: subprocess.Popen, workdir: Path, moment: str, step: int, delay: float) -> None:
        """Returns when the moment has come, or the process has ended."""
        checkpoints, begin = workdir / "checkpoints", time.monotonic()
        if moment == "start":
            time.sleep(START + 6 * delay)
            return
        there = {path.name for path in checkpoints.glob("*")}
        while process.poll() is None and time.monotonic() < begin + 120:
            if moment == "step" and any(row["step"] >= step for row in rows_of(workdir)):
                return
            if moment == "save" and {path.name for path in checkpoints.glob("*")} - there:
                time.sleep(0.02 * delay)
                return
            if moment == "finish" and (checkpoints / str(STEPS)).exists():
                time.sleep(2 * delay)
                return
            time.sleep(0.002)

    def _start(self, workdir: Path, kind: int, log) -> subprocess.Popen:
        options = [
            f"--config.steps={STEPS}", f"--config.checkpoint.every={EVERY}", "--config.metrics.tensorboard=True",
            "--config.evaluation.every=50", "--config.evaluation.rows=4", "--config.evals=loss_by_position",
            *KINDS[kind],
        ]  # fmt: skip
        cache = {"JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled")}
        always = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
        environment = os.environ | {"JAX_PLATFORMS": "cpu"} | cache | always
        arguments = command(workdir, self.text, *options)
        return subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def _check(self, status: int, allowed: tuple[int, ...]) -> None:
        said = (self.folder / "log").read_text(errors="replace")
        if status not in allowed or "Traceback" in said:
            raise Killed(f"exit status {status}, allowed: {allowed}\n{said[-4000:]}")


def rows_of(workdir: Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    return metrics.read(path) if path.exists() else []


def compare(whole: Path, killed: Path) -> None:
    """Raises: Killed, unless both run directories tell the same."""
    for name, read in (("metrics.jsonl", _rows), ("TensorBoard", _events), ("summary.json", _summary)):
        left, right = read(whole), read(killed)
        if left != right:
            differ = [pair for pair in zip(left, right, strict=False) if pair[0] != pair[1]][:2]
            raise Killed(f"{name} of {killed}: {len(right)} for {len(left)} entries; {differ}")
    steps = [row["step"] for row in rows_of(killed) if "loss" in row]
    if steps != list(range(1, STEPS + 1)):
        raise Killed(f"steps of {killed}: {steps}")
    if not checkpoint.steps(killed / "checkpoints")[0] == STEPS:
        raise Killed(f"no last checkpoint in {killed}")


def _rows(workdir: Path) -> list[dict]:
    return [_but_speed(row) for row in rows_of(workdir)]


def _events(workdir: Path) -> list[tuple[int, dict]]:
    found = []
    for path in sorted(workdir.glob(board.PREFIX + "*")):
        found += [(step, _but_speed(values)) for step, values, _ in board.events(path) if values]
    return found


def _summary(workdir: Path) -> list[tuple[str, object]]:
    summary = json.loads((workdir / "summary.json").read_text())
    return [(name, value) for name, value in summary.items() if name != "plot"]


def _but_speed(values: dict) -> dict:
    return {name: value for name, value in values.items() if not name.startswith("tokens_per_second")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    folder = given.out or Path(tempfile.mkdtemp(prefix="kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    schedule = Schedule(folder, given.seed)
    begin = time.monotonic()
    runs = schedule.run(given.kills)
    print(f"{schedule.killed} kills in {runs} runs, nothing lost; {time.monotonic() - begin:.0f} s")
    for name, count in sorted(schedule.counts.items()):
        print(f"{count:4} {name}")


if __name__ == "__main__":
    main()
