"""A trial: one config, the commands that train and evaluate it, and a record of their progress and result."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

from seqmodels.atomic import replace_file
from seqmodels.claim import claimed

# Trials of these states are not run again; failed and diverged ones are with --retry. Others continue where they are.
FINAL = ("done", "diverged", "failed")
OPEN = ("waiting", "running", "preempted", "interrupted")


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """One trial. It holds plain data only, so that it can be sent to other hosts.

    Attributes:
      id: hash of the resolved config.
      workdir: its run directory, which also holds `trial.json` (the record), `trial.log` and `trial.lock`.
      overrides: the fields that the sweep sets for it, the seed among them.
      fields: every field of its config, by dotted name.
      commands: stage ("train", "eval") to the command of the stage; they are run in this order.
      evals: names of evaluators. "": those that eval.py chooses. "none": there is no evaluation.
      against: id of the trial that the report compares this one with. "": the first of the report.
    """

    id: str
    workdir: Path
    overrides: dict[str, Any]
    fields: dict[str, Any]
    commands: dict[str, tuple[str, ...]]
    evals: str = ""
    against: str = ""

    @property
    def log(self) -> Path:
        return self.workdir / "trial.log"

    @property
    def lock(self) -> Path:
        return self.workdir / "trial.lock"

    @property
    def compiled(self) -> Path:
        """Folder of compiled programs that the trials of the sweep share; one for each host, as CPUs differ."""
        return self.workdir.parent.parent / "compiled"

    @property
    def line(self) -> str:
        """The commands as one line for a shell."""
        return " && ".join(map(shlex.join, self.commands.values()))

    def record(self) -> dict:
        """The record of the trial. Its `status` is one of FINAL or OPEN."""
        record = read_json(self.workdir / "trial.json")
        if record.get("status") not in (*FINAL, *OPEN):  # none yet, or the file is damaged
            record = {}
        if record.get("status") == "running" and not claimed(self.lock):
            record |= {"status": "interrupted"}
        if record.get("status") == "done" and self.evals not in ("none", record.get("evals")):
            return record | {"status": "interrupted"}  # trained, but evaluated otherwise
        if record.get("stage") == "eval" and self.evals == "none" and record["status"] != "running":
            return record | {"status": "done"}  # trained; an evaluation that did not end is not asked for here
        if not record and self._ran_by_hand():
            return {"status": "done"}
        return {"status": "waiting"} | record

    def write(self, record: dict) -> None:
        """Writes the record in one atomic step. Raises: OSError."""
        head = {"id": self.id, "overrides": self.overrides, "evals": self.evals}
        head["commands"] = [shlex.join(command) for command in self.commands.values()]
        replace_file(self.workdir / "trial.json", json.dumps(head | record, indent=2) + "\n")

    def trained(self) -> bool:
        """Whether train.py has nothing left to do, and its run did not end with numbers that are not finite."""
        summary = read_json(self.workdir / "summary.json")
        steps = summary.get("steps")
        return isinstance(steps, int) and steps >= self.fields["steps"] and summary.get("status") != "diverged"

    def _ran_by_hand(self) -> bool:
        """Whether the printed commands were run by hand, which leaves no record."""
        summary, evaluation = (read_json(self.workdir / name) for name in ("summary.json", "eval.json"))
        return self.trained() and (self.evals == "none" or evaluation.get("step") == summary["steps"])


def read_json(path: Path) -> dict:
    """The object in a JSON file; empty if there is no such file or if it is damaged."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
