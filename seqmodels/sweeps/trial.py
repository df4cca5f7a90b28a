"""A trial: one config, the commands that train and evaluate it, and the record of how that went."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

from seqmodels.atomic import replace_file
from seqmodels.sweeps.claim import claimed

# done; diverged and failed are not run again unless asked; the others go on where they are.
FINAL = ("done", "diverged", "failed")
OPEN = ("waiting", "running", "preempted", "interrupted")


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """Plain data, so that it can be handed to other hosts.

    Attributes:
      id: hash of the resolved config.
      workdir: its run directory, which also holds `trial.json` (the record), `trial.log` and `trial.lock`.
      overrides: the fields that the sweep sets for it, the seed among them.
      fields: every field of its config, by dotted name.
      commands: stage ("train", "eval") to what is run, one after another.
      evals: evaluators by name; "" for those that eval.py takes by itself, "none" where there is no evaluation.
    """

    id: str
    workdir: Path
    overrides: dict[str, Any]
    fields: dict[str, Any]
    commands: dict[str, tuple[str, ...]]
    evals: str = ""

    @property
    def log(self) -> Path:
        return self.workdir / "trial.log"

    @property
    def lock(self) -> Path:
        return self.workdir / "trial.lock"

    @property
    def compiled(self) -> Path:
        """Of the sweep: programs that JAX keeps for the next trial, by host, as CPUs differ."""
        return self.workdir.parent.parent / "compiled"

    @property
    def line(self) -> str:
        """The commands as one would type them."""
        return " && ".join(map(shlex.join, self.commands.values()))

    def record(self) -> dict:
        """What is known of the trial, `status` among it: one of FINAL and OPEN."""
        record = read_json(self.workdir / "trial.json")
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
        """Keeps a record, whole or not at all. Raises: OSError."""
        head = {"id": self.id, "overrides": self.overrides, "evals": self.evals}
        head["commands"] = [shlex.join(command) for command in self.commands.values()]
        replace_file(self.workdir / "trial.json", json.dumps(head | record, indent=2) + "\n")

    def trained(self) -> bool:
        """Whether train.py has nothing left to do."""
        return read_json(self.workdir / "summary.json").get("steps", -1) >= self.fields["steps"]

    def _ran_by_hand(self) -> bool:
        """Whether the printed commands were run by somebody else, who left no record."""
        summary, evaluation = (read_json(self.workdir / name) for name in ("summary.json", "eval.json"))
        return self.trained() and (self.evals == "none" or evaluation.get("step") == summary["steps"])


def read_json(path: Path) -> dict:
    """The object in a file; empty where there is none or it is not whole."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
