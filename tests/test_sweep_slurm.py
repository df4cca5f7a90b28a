"""Sweeps through submitit, with small scripts in place of Slurm's commands: sbatch, srun, scontrol, sacct."""

import json
import os
import re
import signal
import sys

import pytest

from tests.sweep_fakes import Fakes, wait_for

pytest.importorskip("submitit", reason="submitit is optional: pip install submitit")

# Starts every task of the array at once; `requeue` starts a task again, as soon as the process that asks for it ended.
SLURM = r"""#!{python}
import os, re, subprocess, sys
from pathlib import Path

here, name = Path(__file__).parent, Path(__file__).name
def start(task, after=None):
    wait = f"while kill -0 {{after}} 2>/dev/null; do sleep 0.02; done; " if after else ""
    environment = dict(SLURM_JOB_ID="77", SLURM_ARRAY_JOB_ID="77", SLURM_ARRAY_TASK_ID=str(task))
    log = open(here / f"task{{task}}.out", "a")
    subprocess.Popen(["bash", "-c", wait + f"exec bash {{here}}/script"], env=os.environ | environment,
                     stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

if name == "sbatch":
    text = Path(sys.argv[1]).read_text()
    if "partition=nowhere" in text:
        sys.exit("sbatch: error: invalid partition specified: nowhere")
    (here / "script").write_text(text)
    for task in range(int(re.search(r"--array=0-(\d+)%", text)[1]) + 1):
        start(task)
    print("Submitted batch job 77")
elif name == "srun":
    rest = sys.argv[1:]
    while rest[0].startswith("--"):
        rest = rest[1:] if rest[0] == "--unbuffered" else rest[2:]
    (here / f"pid{{os.environ['SLURM_ARRAY_TASK_ID']}}").write_text(str(os.getpid()))
    os.execvp(rest[0], rest)
elif name == "scontrol":
    (here / "requeued").write_text(" ".join(sys.argv[1:]))
    start(sys.argv[2].split("_")[1], after=os.getppid())
elif name == "sacct":
    print("JobID|State|NodeList")
"""


class FakeSlurm(Fakes):
    def __init__(self, folder, behaviours):
        super().__init__(folder, behaviours)
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in ("sbatch", "srun", "scontrol", "sacct"):
            (self.bin / name).write_text(SLURM.format(python=sys.executable))
            (self.bin / name).chmod(0o755)

    def start(self, *arguments, **environment):
        path = os.pathsep.join([str(self.bin), os.environ["PATH"]])
        return super().start("--engine=slurm", *arguments, PATH=path, **environment)


def test_trials_are_tasks_of_an_array(tmp_path):
    fakes = FakeSlurm(tmp_path, ("fine", "diverges", "better"))
    options = "--slurm=slurm_partition=gpu,gpus_per_node=1,timeout_min=60"
    out = fakes.run(options, "--parallel=2", status=1)
    assert "submitted 3 tasks, 77_0 to 77_2" in out and "2 of 3 trials done" in out
    script = (fakes.bin / "script").read_text()
    for line in ("--array=0-2%2", "--partition=gpu", "--gpus-per-node=1", "--time=60", "--signal=USR2@90"):
        assert f"#SBATCH {line}\n" in script
    assert [row["status"] for row in fakes.rows()] == ["done", "diverged", "done"]
    assert len(fakes.calls()) == 3
    (fakes.bin / "script").unlink()
    fakes.run(options, status=1)  # nothing is left to submit
    assert not (fakes.bin / "script").exists() and len(fakes.calls()) == 3


@pytest.mark.slow
def test_preempted_task_is_put_back_into_the_queue(tmp_path):
    """Slurm's warning reaches the task and the trial alike; the trial saves, and goes on in another task."""
    fakes = FakeSlurm(tmp_path, ("fine", "better"))
    process = fakes.start(FAKE_STEP="0.05")
    fakes.await_step(5, number=2)
    for call in fakes.calls():
        os.kill(call["pid"], signal.SIGUSR2)  # ignored
    os.kill(int((fakes.bin / "pid0").read_text()), signal.SIGUSR2)
    wait_for((fakes.bin / "requeued").exists)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    assert (fakes.bin / "requeued").read_text() == "requeue 77_0"
    fakes.check_done(("fine", "better"))
    workdir = fakes.out / "trials" / fakes.rows()[0]["id"]
    log = (workdir / "trial.log").read_text()
    assert re.findall("=== (preempted|interrupted|done)", log) == ["preempted", "done"]
    assert json.loads((workdir / "trial.json").read_text())["attempts"] == 2


@pytest.mark.parametrize(
    "argument, words",
    [
        ("--slurm=timeout", ["--slurm=timeout", "NAME=VALUE"]),
        ("--slurm=slurm_partion=gpu", ["--slurm", "partion"]),
        ("--slurm=slurm_partition=nowhere", ["--engine=slurm", "invalid partition"]),
    ],
)
def test_mistakes_are_one_line(tmp_path, argument, words):
    fakes = FakeSlurm(tmp_path, ("fine", "better"))
    out = fakes.run(argument, status=1)
    (error,) = [line for line in out.splitlines() if line.startswith("error:")]
    assert all(word in error for word in words), error
    assert not fakes.calls()


def test_without_slurm(tmp_path):
    fakes = Fakes(tmp_path, ("fine",))
    assert "error: --engine=slurm: " in fakes.run("--engine=slurm", status=1)


def test_without_submitit(tmp_path):
    fakes = Fakes(tmp_path, ("fine",))
    (fakes.folder / "submitit.py").write_text("raise ImportError")
    assert "error: --engine=slurm: needs submitit: pip install submitit" in fakes.run("--engine=slurm", status=1)
