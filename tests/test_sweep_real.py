"""The sweep that a script would run first, with real training and evaluation, on a little text."""

import csv
import os
import subprocess
import sys

import pytest

from tests.sweep_fakes import ROOT


@pytest.mark.slow
def test_miniature(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"It is {n} o'clock, and all is well. " * 9 for n in range(100)))
    command = [
        sys.executable, "sweep.py", "--config=configs/densemamba.py", "--sweep=miniature", f"--out={tmp_path / 'out'}",
        "--config.data.name=text", f"--config.data.path={text}", f"--config.data.cache={tmp_path}/cache",
        "--config.metrics.tensorboard=False", "--parallel=2", "--evals=perplexity",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 trials done" in done.stdout
    with open(tmp_path / "out" / "results.csv") as file:
        none, read = csv.DictReader(file)
    assert (none["model.dense.variant"], read["model.dense.variant"]) == ("none", "read")
    for row in (none, read):
        assert row["status"] == "done" and row["steps_done"] == "60"
        # The same split, read by train.py and by eval.py; and it has learned: bytes at random are 5.5 nats each.
        assert abs(float(row["validation.loss"]) - float(row["eval.loss.validation"])) < 1e-4
        assert float(row["validation.loss"]) < 3
    assert int(read["parameters"]) - int(none["parameters"]) == 32 + 64  # one gate of rank 1, D to E
    for name in ("report.md", "report.html", "tables.tex", "losses.png", "metric.svg", "speed.png"):
        assert (tmp_path / "out" / name).stat().st_size > 500
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0 and "running" not in again.stdout
