"""Jobs of several real processes: they train as one does, end together when one is killed or stopped, and go on as
another number of processes. What they agree on is tested in tests/test_job.py."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from seqmodels.training import checkpoint, metrics
from tests.run_fixtures import write_text
from tests.run_processes import ROOT, command, finish, losses

STEPS = 60


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


def signal_at(job, workdir, step, number, process):
    """Sends a signal to one process of the job when the row of `step` is there."""
    path, deadline = workdir / "metrics.jsonl", time.monotonic() + 240
    while not (path.exists() and any(row["step"] >= step for row in metrics.read(path))):
        assert time.monotonic() < deadline and job[0].poll() is None, job[0].communicate()[1]
        time.sleep(0.01)
    job[process].send_signal(number)


def said_by(job, statuses):
    """What each process wrote on stderr, without a traceback; they must end with these exit statuses."""
    said = [process.communicate(timeout=200)[1] for process in job]
    assert [process.returncode for process in job] == statuses, "\n".join(said)
    assert not any("Traceback" in err for err in said)
    return said


@pytest.mark.slow
def test_killed_stopped_and_gone_on_with_by_other_numbers_of_processes(tmp_path):
    text, run = write_text(tmp_path, lines=200), tmp_path / "run"
    finish(subprocess.Popen(
        training(tmp_path / "alone", text, 1), cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ), 0)  # fmt: skip

    job = start_job(2, training(run, text, 2))
    signal_at(job, run, 9, signal.SIGKILL, process=1)
    assert f"error: gone: process 1 on {socket.gethostname()}" in said_by(job, [75, -signal.SIGKILL])[0]

    job = start_job(4, training(run, text, 4))  # the first process, in which JAX's coordination service is
    signal_at(job, run, 20, signal.SIGKILL, process=0)
    for err in said_by(job, [-signal.SIGKILL, 75, 75, 75])[1:]:
        assert "gone: the first process of the job" in err

    job = start_job(3, training(run, text, 3))
    signal_at(job, run, 32, signal.SIGINT, process=2)
    said_by(job, [75, 75, 75])
    stopped = checkpoint.steps(run / "checkpoints")[0]
    assert stopped == len(losses(run)) < STEPS

    for process in start_job(2, training(run, text, 2)):
        finish(process, 0)
    np.testing.assert_allclose(losses(run), losses(tmp_path / "alone"), rtol=1e-4)

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
