"""metrics.jsonl: every digit, every step once, after any crash; the run directory; the reports."""

import json
import math
import struct
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from seqmodels.cli import fields
from seqmodels.config import upgrade
from seqmodels.configs import densemamba
from seqmodels.errors import UserError
from seqmodels.kernels import OPERATIONS
from seqmodels.training import metrics, report, run, sharding
from seqmodels.training.progress import Progress, clock
from seqmodels.training.state import abstract_params
from tests.training_model import LeakyModel, small_config

FIRST_WAVE = Path(__file__).parent / "fixtures" / "first_wave" / "densemamba"


def rows_of(tmp_path):
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_floats_come_back_exactly(tmp_path):
    values = np.random.default_rng(0).normal(size=50).astype(np.float32)
    writer = metrics.Metrics(tmp_path, 0, small_config(metrics__tensorboard=False))
    for step, value in enumerate(values, 1):
        writer.write(step, {"loss": value})
    back = np.array([row["loss"] for row in rows_of(tmp_path)])  # before close: every row is flushed
    writer.close()
    assert (back.astype(np.float32) == values).all() and (back == values.astype(np.float64)).all()


def test_what_is_not_finite_is_null(tmp_path):
    writer = metrics.Metrics(tmp_path, 0, small_config())
    writer.write(1, {"loss": float("nan"), "grad_norm": float("inf"), "learning_rate": 1.0})
    writer.close()
    assert rows_of(tmp_path) == [{"step": 1, "loss": None, "grad_norm": None, "learning_rate": 1.0}]


def test_resuming_drops_later_rows_and_a_torn_line(tmp_path):
    writer = metrics.Metrics(tmp_path, 0, small_config(metrics__tensorboard=False))
    for step in range(1, 8):
        writer.write(step, {"loss": step / 3})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')
    writer = metrics.Metrics(tmp_path, 5, small_config(metrics__tensorboard=False))
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4, 5]
    writer.write(6, {"loss": 2.0})
    writer.close()
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert not list(tmp_path.glob("*.tmp"))


def test_tensorboard_has_the_same_figures(tmp_path):
    writer = metrics.Metrics(tmp_path, 0, small_config())
    writer.write(1, {"loss": 2.5})
    writer.close()
    (events,) = tmp_path.glob("events.*")
    assert b"loss" in events.read_bytes()


def test_wandb_missing_is_a_users_error(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(UserError, match=r"metrics\.wandb=project: pip install wandb"):
        metrics.Metrics(tmp_path, 0, small_config(metrics__wandb="project"))


def begun(tmp_path, config):
    run.write_config(tmp_path, config)
    (tmp_path / "metrics.jsonl").write_text("")


def test_config_round_trip(tmp_path):
    config = small_config(seed=3)
    run.write_config(tmp_path, config)
    assert run.read_config(tmp_path).to_dict() == upgrade(config).to_dict()


def test_config_of_an_older_run(tmp_path):
    """It named one implementation for all operations of its time."""
    (tmp_path / "config.json").write_text(json.dumps({"model": {"width": 8, "implementation": "xla"}}))
    model = run.read_config(tmp_path).model
    assert model.width == 8 and model.repeats == 4
    named = dict.fromkeys(("selective_scan", "short_conv", "attention"), "xla")
    assert model.implementation.to_dict() == dict.fromkeys(OPERATIONS, "") | named


def test_what_may_differ_is_named_exactly():
    """A later field whose name begins like one of FREE is not free."""
    free = ("name", "steps", "checkpoint.every", "model.implementation.short_conv", "model.remat", "model.remat_blocks")
    assert all(map(run.is_free, free))
    kept = ("names", "steps_total", "platforms", "model.rematerial", "training.nan_limit", "data.cache_size", "metrics")
    assert not any(map(run.is_free, kept))


def test_run_of_another_config_names_the_fields(tmp_path):
    begun(tmp_path, small_config())
    with pytest.raises(UserError, match=r"another config: batch_size=16 \(was 8\), optimizer.b1=0.8 \(was 0.9\)"):
        run.check_run(tmp_path, small_config(batch_size=16, optimizer__b1=0.8))
    run.check_run(
        tmp_path, small_config(steps=9, mesh__data=2, checkpoint__every=3, metrics__every=2, sample__tokens=1)
    )


def test_a_run_that_older_code_wrote_goes_on_with_todays_config():
    """A field that it lacks had the meaning of the default, so another value is another run."""
    old = json.loads((FIRST_WAVE / "config.json").read_text())
    config = densemamba.get_config()
    config.update_from_flattened_dict(dict(fields(ConfigDict(old))))
    assert "norm" not in old["model"] and config.model.norm == "rms"
    run.check_run(FIRST_WAVE, config)
    config.model.norm = "layer"
    with pytest.raises(UserError, match=r"another config: model.norm=layer \(was rms\);"):
        run.check_run(FIRST_WAVE, config)


def test_what_never_began_may_be_another(tmp_path):
    run.write_config(tmp_path, small_config())
    run.check_run(tmp_path, small_config(batch_size=16))


def test_directories_that_are_no_runs(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        run.check_run(tmp_path / "file", small_config())
    with pytest.raises(UserError, match=r"no config.json there; it is not a run directory"):
        run.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        run.read_config(tmp_path)


def test_parameter_table_counts_and_places():
    config = small_config(mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
    boxed = abstract_params(LeakyModel(), config)
    placed = sharding.param_shardings(boxed, sharding.make_mesh(config))
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), sharding.unbox(boxed), placed
    )
    table = report.parameter_table({"layer_0": params, "layer_1": params})
    assert "layer_*/table" in table and "2 x" in table and "tensor fsdp" in table
    assert table.splitlines()[-1].split() == ["total", f"{2 * (32 * 16 + 2 * 16 * 16 + 16):,}"]


def test_state_bytes():
    assert report.state_bytes(LeakyModel(), 99) == 4 + 16 * 4


def test_progress_in_a_log(capsys):
    with Progress(0, 3, seconds=1e6) as progress:
        for step in (1, 2, 3):
            progress.update(step, 2.0, 1234.0)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("step 1/3  loss 2.0000  1,234 tokens/s")
    assert lines[1].startswith("step 3/3") and lines[1].endswith("0:00 left")


def test_clock():
    assert [clock(s) for s in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]


def events_of(folder):
    """(step, tag, value) of every event in the files themselves, as the writers of TensorBoard's format read them."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    found = []
    for path in sorted(folder.glob("events.*")):
        content, place = path.read_bytes(), 0
        while place < len(content):
            length, check = struct.unpack("<QI", content[place : place + 12])
            assert check == masked_crc32c(content[place : place + 8])
            record = content[place + 12 : place + 12 + length]
            (check,) = struct.unpack("<I", content[place + 12 + length : place + 16 + length])
            assert check == masked_crc32c(record)
            event, place = Event.FromString(record), place + 16 + length
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


def test_tensorboard_has_each_row_once_after_any_kill(tmp_path):
    """Also where rows after the checkpoint were written, the last of them in part, and the evaluation at the end."""
    writer = metrics.Metrics(tmp_path, 0, small_config(steps=5))
    for step in range(1, 6):
        writer.write(step, {"loss": step / 4, "block_0/figure": 300.0 * step})
    writer.write(5, {"eval.loss.test": 1.0})
    writer.close()
    (path,) = tmp_path.glob("events.*")
    path.write_bytes(path.read_bytes()[:-3])
    writer = metrics.Metrics(tmp_path, 3, small_config(steps=5))
    for step in (4, 5):
        writer.write(step, {"loss": step / 4, "block_0/figure": 300.0 * step})
    writer.write(5, {"eval.loss.test": 1.0})
    writer.close()
    writer = metrics.Metrics(tmp_path, 5, small_config(steps=5))  # killed before the summary: evaluated again
    writer.write(5, {"eval.loss.test": 1.0})
    writer.close()
    rows = [(row["step"], name, value) for row in rows_of(tmp_path) for name, value in row.items() if name != "step"]
    both = [(s, tag, value) for s in range(1, 6) for tag, value in (("loss", s / 4), ("block_0/figure", 300.0 * s))]
    assert rows == events_of(tmp_path) == [*both, (5, "eval.loss.test", 1.0)]
    writer = metrics.Metrics(tmp_path, 5, small_config(steps=9))  # trained further: the evaluation at 5 stays
    writer.close()
    assert rows_of(tmp_path)[-1] == {"step": 5, "eval.loss.test": 1.0} and len(events_of(tmp_path)) == 11


def test_a_resume_on_a_host_whose_clock_is_behind_comes_last(tmp_path):
    """TensorBoard reads the files in the order of their names, which begin with a time."""
    (tmp_path / "events.out.tfevents.5999999999.host").write_bytes(b"")
    metrics.Metrics(tmp_path, 0, small_config()).close()
    names = sorted(path.name for path in tmp_path.glob("events.*"))
    assert len(names) == 2 and names[1].startswith("events.out.tfevents.6000000000.")


def test_rows_that_are_no_rows_are_left_out_and_named(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 2.0}\n3\n[]\n\xff\xfe\n{"loss": 1}\n{"step": 2}\n')
    assert metrics.read(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}, {"step": 2}]
    assert "metrics.jsonl: line 2 is no row of metrics, nor are 3 other lines; left out" in capsys.readouterr().err


def test_runs_of_one_name_are_two_runs_of_wandb(tmp_path):
    first, second = (metrics._wandb_id(folder, begun=False) for folder in make_folders(tmp_path, "a/run", "b/run"))
    assert first != second and first.startswith("run-")
    assert metrics._wandb_id(tmp_path / "a" / "run", begun=True) == first
    (old,) = make_folders(tmp_path, "old/run")
    assert metrics._wandb_id(old, begun=True) == "run"  # begun by an earlier version


def test_wandb_gets_the_names_and_all_rows(tmp_path, monkeypatch):
    told, logged = [], []
    fake = types.SimpleNamespace(init=lambda **about: told.append(about) or run_of_wandb)
    run_of_wandb = types.SimpleNamespace(
        log=lambda row, step: logged.append((step, row)), finish=lambda: logged.append("end")
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = small_config(metrics__wandb="project", name="mamba")
    for name in ("mamba-wide", "001f93ed22"):
        (folder,) = make_folders(tmp_path, name)
        writer = metrics.Metrics(folder, 0, config)
        writer.write(1, {"loss": 2.0, "tokens_per_second": 5.0, "grad_norm": math.nan})
        writer.write(1, {"validation.loss": 3.0})
        writer.close()
    assert [about["name"] for about in told] == ["mamba-wide", "mamba-001f93ed22"]
    assert len({about["id"] for about in told}) == 2 and told[0]["config"]["name"] == "mamba" == told[0]["group"]
    assert logged[:3] == [(1, {"loss": 2.0, "tokens_per_second": 5.0}), (1, {"validation.loss": 3.0}), "end"]


def make_folders(tmp_path, *names):
    for name in names:
        (tmp_path / name).mkdir(parents=True)
    return [tmp_path / name for name in names]
