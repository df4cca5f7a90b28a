"""What the code of the first wave wrote goes on: run directories, checkpoints, configs of users.

tests/fixtures/first_wave holds two run directories as commit 639af01 left them after three steps, and what that commit
made of the next three. `zoo` has every mixer of that time; `densemamba` has dense links under a scan over blocks,
averaged weights, a carried state, dropout and accumulation.
"""

import json
import shutil
from pathlib import Path

import pytest

from seqmodels import cli
from seqmodels.scripts import train
from seqmodels.sweeps import definition
from seqmodels.training import loop, report

ROOT = Path(__file__).parents[1]
HERE = ROOT / "tests" / "fixtures" / "first_wave"
FLAGS = {
    "zoo": ["--config=tests/fixtures/first_wave/zoo.py"],
    "densemamba": [
        "--config=configs/densemamba.py",
        "--config.model.width=32",
        "--config.model.repeats=4",
        "--config.model.scan_blocks=1",
        "--config.model.dense.depth=1",
        "--config.model.dropout=0.1",
        "--config.seq_len=32",
        "--config.batch_size=4",
        "--config.training.bptt",
        "--config.training.accumulate=2",
        "--config.optimizer.ema=0.9",
        "--config.checkpoint.every=3",
        "--config.metrics.tensorboard=false",
        "--config.sample.tokens=0",
        "--config.evaluation.batch_size=64",
    ],
}


def test_trials_of_a_users_old_config_keep_their_names(monkeypatch, tmp_path):
    """Names that the first wave gave them, although the config lacks fields that there are now."""
    monkeypatch.chdir(ROOT)
    spec = "tests/fixtures/first_wave/zoo.py"
    trials = definition.define(spec, cli.load_config(spec), "ablation", 1, tmp_path, "")
    assert [trial.id for trial in trials] == ["6e9a468b09", "12efa37be0", "7276232381"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FLAGS)
def test_a_run_goes_on(tmp_path, monkeypatch, capsys, name):
    """The checkpoint carries a fingerprint of its bits, so what is restored is what was saved; then the next steps."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(loop.Trainer, "_end", lambda self, state: {"steps": int(state.step)})  # no evaluation
    monkeypatch.setattr(report, "result", str)
    workdir = tmp_path / name
    shutil.copytree(HERE / name, workdir)
    arguments = ["train.py", *FLAGS[name], f"--workdir={workdir}", "--config.steps=6", "--config.mesh.data=1"]
    assert cli.run(train.main, train.define, "", arguments) == 0
    assert f"resuming {workdir} after step 3" in capsys.readouterr().out
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row, want in zip(rows[3:], json.loads((HERE / "expected.json").read_text())[name], strict=True):
        # other processors and compiler options round differently; on one machine with one compiler all bits are equal
        assert {key: row[key] for key in want} == pytest.approx(want, rel=2e-5)
