"""Jobs of several real processes: they train as one does, end together when one is killed or stopped, and go on as
another number of processes, by hand and by launch/train.sbatch. What they agree on is tested in tests/test_job.py."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from seqmodels import cli
from seqmodels.scripts import train
from seqmodels.training import checkpoint, goodput, metrics
from tests.run_fixtures import write_text
from tests.run_processes import ROOT, command, finish, losses

STEPS = 120


def start_job(count, arguments, *others):
    """`others`: more arguments of processes 1, 2, ..."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    job = {"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(count)}
    return [
        subprocess.Popen(
            [*arguments, "--distributed", *(others[process - 1 : process] if process else ())],
            cwd=ROOT,
            env=os.environ | job | {"JAX_PROCESS_ID": str(process)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(count)
    ]


def training(workdir, text, fsdp):
    mesh = ("--config.mesh.data=1", f"--config.mesh.fsdp={fsdp}")
    return command(
        workdir, text, f"--config.steps={STEPS}", "--config.batch_size=12", "--config.evaluation.limit=24", *mesh
    )


# In place of srun: tasks on this host with the variables that Slurm sets, by which JAX finds the others.
SRUN = """#!{python}
import os, pathlib, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
step = dict(SLURM_STEP_NODELIST="localhost", SLURM_STEP_NUM_NODES="1", SLURM_STEP_TASKS_PER_NODE="{tasks}")
tasks = []
for i in range({tasks}):
    task = dict(SLURM_NTASKS="{tasks}", SLURM_PROCID=str(i), SLURM_LOCALID=str(i))
    tasks.append(subprocess.Popen(command, env=os.environ | step | task))
pathlib.Path("{folder}", "pids").write_text(" ".join(str(task.pid) for task in tasks))
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = '#!/bin/sh\necho "$@" >> "{folder}/requeued"\n'


def start_slurm(folder, tasks, arguments):
    """The script that is given to `sbatch`, with a `srun` and a `scontrol` of this test."""
    folder.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text.format(python=sys.executable, tasks=tasks, folder=folder))
        (folder / name).chmod(0o755)
    with socket.socket() as probe:  # JAX makes the port of the number of the job
        probe.bind(("localhost", 0))
        number = str(probe.getsockname()[1])
    path = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": sys.executable, "SLURM_JOB_ID": number}
    return subprocess.Popen(
        ["bash", "launch/train.sbatch", *arguments[2:]], cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"} | path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(step, workdir, process):
    """Returns when the row of `step` is there."""
    path, deadline = workdir / "metrics.jsonl", time.monotonic() + 240
    while not (path.exists() and any(row["step"] >= step for row in metrics.read(path))):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


def said_by(job, statuses):
    """What each process wrote on stderr, without a traceback; they must end with these exit statuses."""
    said = [process.communicate(timeout=200)[1] for process in job]
    assert [process.returncode for process in job] == statuses, "\n".join(said)
    assert not any("Traceback" in err for err in said)
    return said


@pytest.mark.slow
def test_killed_stopped_and_gone_on_with_by_other_numbers_of_processes(tmp_path):
    text, run = write_text(tmp_path, lines=200), tmp_path / "run"
    alone = training(tmp_path / "alone", text, 1)
    assert cli.run(train.main, train.define, "", alone[1:]) == 0  # here: no process has to start for it

    job = start_job(2, training(run, text, 2))
    wait_for(9, run, job[0])
    job[1].kill()
    assert f"error: gone: process 1 on {socket.gethostname()}" in said_by(job, [75, -signal.SIGKILL])[0]

    job = start_job(3, training(run, text, 3))  # the first process, in which JAX's coordination service is
    wait_for(20, run, job[0])
    job[0].kill()
    for err in said_by(job, [-signal.SIGKILL, 75, 75])[1:]:
        assert "gone: the first process of the job" in err

    slurm = start_slurm(tmp_path / "slurm", 2, training(run, text, 2))
    wait_for(50, run, slurm)
    os.kill(int((tmp_path / "slurm" / "pids").read_text().split()[1]), signal.SIGTERM)
    finish(slurm, 75)
    assert (tmp_path / "slurm" / "requeued").read_text().startswith("requeue ")
    stopped = checkpoint.steps(run / "checkpoints")[0]
    assert stopped == len(losses(run)) < STEPS

    finish(start_slurm(tmp_path / "slurm", 1, training(run, text, 1)), 0)
    np.testing.assert_allclose(losses(run), losses(tmp_path / "alone"), rtol=1e-4)

    assert goodput.measure(run)["lives"] == 4
    evaluate = [sys.executable, "eval.py", f"--workdir={run}", "--limit=24", "--evals=perplexity"]
    for process in start_job(2, evaluate):
        finish(process, 0)
    at_the_end, again = (json.loads((run / name).read_text()) for name in ("summary.json", "eval.json"))
    for split in ("validation", "test"):
        assert again["loss"][split] == pytest.approx(at_the_end["splits"][split]["loss"], abs=1e-5)


@pytest.mark.slow
def test_a_process_with_another_config_is_refused(tmp_path):
    arguments = training(tmp_path / "run", write_text(tmp_path, lines=20), 2)
    said = said_by(start_job(2, arguments, "--config.seed=1"), [1, 1])
    line = f"error: process 1 on {socket.gethostname()} has config.seed=1 (0 in the first process)"
    assert said[0].count("\n") == 1 and said[0].startswith(line) and said[1] == ""
