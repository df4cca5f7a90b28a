"""Sweeps of fake trials: small scripts in place of train.py and eval.py, which take the same arguments."""

import csv
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

from seqmodels import cli
from seqmodels.sweeps import definition

ROOT = Path(__file__).parent.parent
DENSEMAMBA = str(ROOT / "configs" / "densemamba.py")

# What a trial does is its sample.prompt; its loss depends on that and the seed.
CONFIG = """
from seqmodels.configs.base import base, finish
from seqmodels.configs.mamba import add_mamba
from seqmodels.configs.trials import product, vary

def get_config(arg=None):
    config = base()
    add_mamba(config)
    config.steps = 40
    config.sample.prompt = "fine"
    return finish(config, "fake", "small")

def sweep(add, arg=None):
    for trial in vary("sample.prompt", *{behaviours!r}):
        add(trial)
"""

TRAIN = """
import json, os, signal, sys, time
from pathlib import Path

arguments = dict(a[2:].split("=", 1) for a in sys.argv[1:])
workdir, steps = Path(arguments["workdir"]), int(arguments.get("config.steps", 40))
what, seed = arguments.get("config.sample.prompt", "fine"), int(arguments.get("config.seed", 0))
workdir.mkdir(parents=True, exist_ok=True)
calls = Path(__file__).parent / "calls.jsonl"
call = dict(id=workdir.name, pid=os.getpid(), cuda=os.environ.get("CUDA_VISIBLE_DEVICES"),
            cores=sorted(os.sched_getaffinity(0)), began=time.time(), cache=os.environ.get("JAX_COMPILATION_CACHE_DIR"))
with open(calls, "a") as file:
    file.write(json.dumps(call) + "\\n")
print("device   1 x fake (cpu)", flush=True)
(workdir / "config.json").write_text(json.dumps(dict(seed=seed, batch_size=2, seq_len=8)))
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
path = workdir / "metrics.jsonl"
done = len(path.read_text().splitlines()) if path.exists() else 0
for step in range(done + 1, steps + 1):
    loss = 5 / step + len(what) + seed / 8
    if what == "diverges" and step == 7:
        loss = None
    row = dict(step=step, loss=loss, tokens_per_second=160.0)
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\\n")
    if loss is None:
        sys.exit(f"error: loss is nan at step {step}")
    if what == "full disk":
        with open("/dev/full", "w") as file:
            file.write("a checkpoint")
    if what == "always preempted" or (what == "preempted once" and step == 5):
        sys.exit(75)
    if stop:
        sys.exit(75)
    time.sleep(float(os.environ.get("FAKE_STEP", "0.001")))
loss = len(what) + seed / 8
splits = {"validation": dict(loss=loss, bits_per_byte=loss / 2), "test": dict(loss=loss + 1, bits_per_byte=loss)}
summary = dict(steps=steps, splits=splits, parameters=1000 * len(what), state_bytes_per_sequence=64)
(workdir / "summary.json").write_text(json.dumps(summary))
"""

EVAL = """
import json, sys
from pathlib import Path

arguments = dict(a[2:].split("=", 1) for a in sys.argv[1:])
workdir = Path(arguments["workdir"])
summary = json.loads((workdir / "summary.json").read_text())
deep = {"recall": {"64": {"accuracy": 0.5, "curve": [1, 2, 3], "why": "text"}}, "limit": None, "ok": True}
(workdir / "eval.json").write_text(json.dumps(dict(step=summary["steps"], evals=arguments.get("evals")) | deep))
"""

DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from seqmodels import cli
from seqmodels.scripts import sweep
from seqmodels.sweeps import definition, plots
definition.SCRIPTS = Path({fakes!r})
if not {pictures}:
    plots.pictures = lambda *_: []
sys.exit(cli.run(sweep.main, sweep.define, sweep.__doc__))
"""


class Fakes:
    """A folder with a config `fake.py` of these trials, the scripts, and the sweep's directory `out`.

    Pictures take most of such a sweep's time, and are left out unless they are what is tested.
    """

    def __init__(self, folder: Path, behaviours: tuple[str, ...], pictures: bool = False):
        self.folder, self.out = folder, folder / "out"
        (folder / "fake.py").write_text(CONFIG.format(behaviours=behaviours))
        (folder / "train.py").write_text(TRAIN)
        (folder / "eval.py").write_text(EVAL)
        (folder / "driver.py").write_text(DRIVER.format(root=str(ROOT), fakes=str(folder), pictures=pictures))

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen:
        """The sweep, in a session of its own, with a compilation cache of its own."""
        outside = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        return subprocess.Popen(
            [sys.executable, "driver.py", "--config=fake.py", "--out=out", *arguments],
            cwd=self.folder,
            env=outside | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, status: int = 0, **environment: str) -> str:
        """What the sweep says, both streams. It must end with this exit status, and without a traceback."""
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=120)
        assert process.returncode == status and "Traceback" not in err, out + err
        return out + err

    def calls(self) -> list[dict]:
        """One for each time that a trial's training was started."""
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def rows(self) -> list[dict[str, str]]:
        """results.csv."""
        with open(self.out / "results.csv") as file:
            return list(csv.DictReader(file))

    def await_step(self, step: int, number: int = 1) -> list[Path]:
        """Run directories, as soon as so many of them have come to this step without being done."""
        return wait_for(lambda: self._at(step, number))

    def _at(self, step: int, number: int) -> list[Path] | None:
        paths = [
            path for path in self.out.glob("trials/*/metrics.jsonl") if not (path.parent / "summary.json").exists()
        ]
        there = [path.parent for path in paths if len(path.read_text().splitlines()) >= step]
        return there if len(there) >= number else None

    def check_done(self, behaviours: tuple[str, ...], seeds: int = 1) -> None:
        """Every trial is done, its steps were each made once, and results.csv has its figures."""
        rows = self.rows()
        assert [(row["sample.prompt"], int(row["seed"])) for row in rows] == [
            (what, seed) for what in behaviours for seed in range(seeds)
        ]
        for row in rows:
            loss = len(row["sample.prompt"]) + int(row["seed"]) / 8
            assert row["status"] == "done", row
            assert float(row["validation.loss"]) == loss and float(row["test.loss"]) == loss + 1
            assert float(row["eval.recall.64.accuracy"]) == 0.5 and float(row["steps_done"]) == 40
            text = (self.out / "trials" / row["id"] / "metrics.jsonl").read_text()
            assert [json.loads(line)["step"] for line in text.splitlines()] == list(range(1, 41))
            # The last two losses: a twentieth of 40 rows.
            assert math.isclose(float(row["train_loss"]), loss + (5 / 39 + 5 / 40) / 2)


def wait_for(condition, seconds: float = 60):
    """What the condition gives, as soon as it is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)
    return found


def define(tmp_path, name="ablation", seeds=1, spec=DENSEMAMBA, **fields):
    """The trials of a sweep of a real config, some of whose fields have other values."""
    config = cli.load_config(spec)
    config.update_from_flattened_dict(fields)
    return definition.define(spec, config, name, seeds, tmp_path)
