"""A job of two processes: trains as one does, stops when one of them is told to, and goes on."""

import os
import signal
import socket
import subprocess
import time

import numpy as np
import pytest

from seqmodels.training import checkpoint, metrics
from tests.run_fixtures import write_text
from tests.run_processes import ROOT, command, finish, losses

STEPS = 60


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"), lines=200)


def start_job(workdir, text, *overrides):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    arguments = command(
        workdir,
        text,
        f"--config.steps={STEPS}",
        "--distributed",
        "--config.mesh.data=1",
        "--config.mesh.fsdp=2",
        *overrides,
    )
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2",
    }  # fmt: skip
    return [
        subprocess.Popen(
            arguments,
            cwd=ROOT,
            env=environment | {"JAX_PROCESS_ID": str(process)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]


@pytest.mark.slow
def test_two_processes_train_as_one_and_stop_together(tmp_path, text):
    alone = subprocess.Popen(
        command(tmp_path / "alone", text, f"--config.steps={STEPS}"),
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    finish(alone, 0)

    job, path = start_job(tmp_path / "job", text), tmp_path / "job" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (path.exists() and len(metrics.read(path)) >= 10):
        assert time.monotonic() < deadline and job[0].poll() is None, job[0].communicate()[1]
        time.sleep(0.01)
    job[1].send_signal(signal.SIGTERM)
    for process in job:
        finish(process, 75)
    stopped = checkpoint.steps(tmp_path / "job" / "checkpoints")[0]
    assert stopped == len(losses(tmp_path / "job")) < STEPS

    for process in start_job(tmp_path / "job", text):
        finish(process, 0)
    np.testing.assert_allclose(losses(tmp_path / "job"), losses(tmp_path / "alone"), rtol=1e-4)
