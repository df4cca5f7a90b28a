"""How much of a run's time has trained it: python -m seqmodels.training.goodput runs/mamba

`lives.jsonl` in the run directory says, for each time that the run was started (a life), when it began, where its
seconds went, and how many steps before it were lost. A row is written at the begin, at each checkpoint and at the end;
the last of a life counts. Steps that were kept, and how long they took, are in metrics.jsonl.
"""

import contextlib
import json
import sys
import time
from pathlib import Path

from seqmodels.atomic import writing
from seqmodels.errors import UserError
from seqmodels.job import Job
from seqmodels.training import metrics

NAME = "lives.jsonl"
PLACES = {
    "start": "starting: imports, data, restoring",
    "compile": "compiling",
    "validation": "validations",
    "checkpoint": "saving checkpoints, as far as training waits",
    "evaluation": "evaluation at the end",
    "evaluators": "evaluators at the end",
}


class Life:
    """One start of a run, as the first process of a job notes it. To be made before the lost rows are dropped.

    Args:
      first: step of the checkpoint that it goes on from.
      tokens: of a step.
      devices: that train.
    """

    def __init__(self, workdir: Path, here: Job, first: int, tokens: int, devices: int) -> None:
        self._path, self._job = Path(workdir) / NAME, here
        began = time.time() - sum(here.spent().values())
        lost = [row for row in _rows(workdir) if row["step"] > first]
        self._row = {
            "began": began, "first": first, "processes": here.count, "devices": devices,
            "lost_steps": max((row["step"] - first for row in lost), default=0),
            "lost_seconds": round(seconds_of(lost, tokens, first), 3),
        }  # fmt: skip

    def note(self, step: int) -> None:
        """Appends a row. Raises: UserError where it cannot be written."""
        if not self._job.main:
            return
        spent = {place: round(seconds, 3) for place, seconds in self._job.spent().items()}
        row = self._row | {"step": step, "now": time.time(), "seconds": spent}
        with writing(self._path), open(self._path, "a") as file:
            file.write(json.dumps(row) + "\n")


def seconds_of(rows: list[dict], tokens: int, first: int = 0) -> float:
    """How long the steps of these rows took, with those between the rows; `first` is the step before them."""
    total, before = 0.0, first
    for row in rows:
        if row.get("tokens_per_second"):
            total += tokens / row["tokens_per_second"] * (row["step"] - before)
            before = row["step"]
    return total


def measure(workdir: Path) -> dict:
    """Seconds of a run by kind, and "goodput", the share of them in steps that were kept.

    Raises: UserError where the directory has no run that says so.
    """
    lives: dict[float, dict] = {row["began"]: row for row in _lives(Path(workdir) / NAME)}
    if not lives:
        raise UserError(f"{workdir}: no {NAME} there; it is no run, or one of an earlier version")
    try:
        config = json.loads((Path(workdir) / "config.json").read_text())
        tokens = config["batch_size"] * config["seq_len"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{workdir}/config.json is missing or damaged, so nothing says how many tokens a step has"
        ) from error
    ordered = [lives[began] for began in sorted(lives)]
    total = ordered[-1]["now"] - ordered[0]["began"]
    kinds = {"kept": seconds_of(_rows(workdir), tokens)}
    kinds["lost"] = sum(life["lost_seconds"] for life in ordered)
    for place in PLACES:
        kinds[place] = sum(life["seconds"].get(place, 0.0) for life in ordered)
    kinds["stopped"] = max(total - sum(kinds.values()), 0.0)
    counts = {"lives": len(ordered), "lost_steps": sum(life["lost_steps"] for life in ordered)}
    return {"seconds": total, **counts, "kinds": kinds, "goodput": kinds["kept"] / total if total else 0.0}


def text(found: dict) -> str:
    """The table that the command prints."""
    lost = f"steps that were lost to restarts ({found['lost_steps']:,})"
    stopped = f"stopped, waiting, or not noted ({found['lives']:,} lives)"
    names = {"kept": "steps that were kept", "lost": lost, **PLACES, "stopped": stopped}
    total = found["seconds"] or 1.0
    lines = [f"{names[kind]:<48}{s:>12,.1f} s{s / total:>8.1%}" for kind, s in found["kinds"].items()]
    return "\n".join([*lines, f"{'in all':<48}{found['seconds']:>12,.1f} s", f"goodput {found['goodput']:.1%}"])


def _lives(path: Path) -> list[dict]:
    """The rows of `lives.jsonl`; without one that a crash cut short."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    needed = {"began", "now", "seconds", "lost_steps", "lost_seconds"}
    return [row for row in rows if isinstance(row, dict) and needed <= row.keys()]


def _rows(workdir: Path) -> list[dict]:
    path = Path(workdir) / "metrics.jsonl"
    return [row for row in metrics.read(path) if "loss" in row] if path.exists() else []


def main(arguments: list[str]) -> int:
    """Prints the goodput of the run directories that are named."""
    try:
        if not arguments:
            raise UserError("name a run directory: python -m seqmodels.training.goodput runs/mamba")
        for workdir in arguments:
            print(text(measure(Path(workdir))), flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
