"""Stopped by SIGTERM, by Ctrl-C or by kill -9 and started again: the losses are those of a run that never stopped."""

import json
import os
import signal
import subprocess
import time

import pytest

from seqmodels.training import checkpoint, metrics
from tests.run_fixtures import write_text
from tests.run_processes import ROOT, STEPS, command, finish, losses


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"), lines=200)


def start(workdir, text, *overrides):
    arguments, environment = command(workdir, text, *overrides), os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def stop_at(process, workdir, step, number):
    """Sends a signal as soon as the row of `step` is there."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        path = workdir / "metrics.jsonl"
        if path.exists() and any(row["step"] >= step for row in metrics.read(path)):
            process.send_signal(number)
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} never came: {process.communicate()[1]}")


OVERRIDES = {
    "muon, bptt, accumulation, ema": [
        "--config.optimizer.name=muon", "--config.optimizer.schedule=wsd", "--config.training.bptt=True",
        "--config.training.accumulate=2", "--config.optimizer.ema=0.9",
    ],
    "schedule_free": ["--config.optimizer.name=schedule_free", "--config.optimizer.schedule=constant"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("overrides", OVERRIDES.values(), ids=OVERRIDES)
def test_stopped_and_resumed_is_bit_for_bit_the_same(tmp_path, text, overrides):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start(whole, text, *overrides), 0)

    process = start(broken, text, *overrides)
    stop_at(process, broken, 20, signal.SIGTERM)
    assert "the same command goes on" in finish(process, 75)
    saved = checkpoint.steps(broken / "checkpoints")[0]
    assert saved == len(losses(broken)) < STEPS  # the step under way was finished and saved

    process = start(broken, text, *overrides)
    stop_at(process, broken, saved + 25, signal.SIGKILL)
    finish(process, -signal.SIGKILL)
    assert saved <= checkpoint.steps(broken / "checkpoints")[0] < STEPS

    assert "resuming" in finish(start(broken, text, *overrides), 0)
    assert losses(broken) == losses(whole)
    ends = [json.loads((folder / "summary.json").read_text()) for folder in (whole, broken)]
    assert ends[0]["splits"] == ends[1]["splits"]


@pytest.mark.slow
def test_second_interrupt_quits_at_once(tmp_path, text):
    process = start(tmp_path / "run", text, "--config.steps=100000", "--config.checkpoint.every=100000")
    stop_at(process, tmp_path / "run", 3, signal.SIGINT)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (75, -signal.SIGINT) and "Traceback" not in err
