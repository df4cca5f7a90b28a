"""Where the time of a run went, from its files."""

import json

import pytest

from seqmodels.job import Job
from seqmodels.training import goodput

TOKENS = 40


def write_rows(path, steps, seconds):
    path.write_text("".join(
        json.dumps({"step": n, "loss": 1.0, "tokens_per_second": TOKENS / seconds}) + "\n" for n in steps
    ))  # fmt: skip


def test_time_between_two_trainings_counts_for_neither():
    job = Job()
    job.at(3, "step")
    job._at = (3, "step", job._at[2] - 10.0)
    job.at(3, "idle")
    assert job.spent()["step"] >= 10.0
    job._at = (3, "idle", job._at[2] - 50.0)
    job.at(0, "start")
    assert sum(job.spent().values()) < 5.0


def test_steps_that_are_done_again_do_not_count(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"batch_size": 4, "seq_len": 10}))
    write_rows(tmp_path / "metrics.jsonl", range(1, 26), 2.0)  # killed after step 25; the checkpoint is of step 20
    life = goodput.Life(tmp_path, Job(), 20, TOKENS, devices=2)
    life.note(20)
    row = json.loads((tmp_path / "lives.jsonl").read_text())
    assert (row["first"], row["lost_steps"], row["lost_seconds"], row["devices"]) == (20, 5, 10.0, 2)

    first = {"began": 1000.0, "now": 1045.0, "first": 0, "lost_steps": 0, "lost_seconds": 0.0,
             "seconds": {"start": 3.0, "compile": 2.0, "step": 40.0}}  # fmt: skip
    second = row | {"began": 1070.0, "now": 1140.0, "seconds": {"start": 3.0, "compile": 1.0, "checkpoint": 1.0}}
    again = second | {"now": 1100.0, "seconds": {"start": 3.0}}  # an earlier row of the same life
    rows = [first, again, second]
    (tmp_path / "lives.jsonl").write_text("".join(json.dumps(life) + "\n" for life in rows) + '{"began": 12')
    write_rows(tmp_path / "metrics.jsonl", range(2, 51, 2), 2.0)  # metrics.every=2
    found = goodput.measure(tmp_path)
    assert found["seconds"] == 140.0 and found["lives"] == 2 and found["lost_steps"] == 5
    assert found["kinds"]["kept"] == pytest.approx(100.0) and found["goodput"] == pytest.approx(100 / 140)
    assert found["kinds"]["lost"] == 10.0 and found["kinds"]["start"] == 6.0 and found["kinds"]["stopped"] == 20.0
    assert goodput.main([str(tmp_path)]) == 0 and "goodput 71.4%" in capsys.readouterr().out
    assert goodput.main([str(tmp_path / "none")]) == 1 and "no lives.jsonl there" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"batch_size": 4')
    assert goodput.main([str(tmp_path)]) == 1 and "config.json is missing or damaged" in capsys.readouterr().err
