"""A run from its first line to its summary, in this process."""

import json
import re

import jax
import numpy as np
import pytest

from seqmodels.data.contract import FIGURES
from seqmodels.errors import UserError
from seqmodels.training import checkpoint, loop, metrics
from tests.run_fixtures import tiny, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def rows(workdir, name="loss"):
    return {row["step"]: row[name] for row in metrics.read(workdir / "metrics.jsonl") if name in row}


@pytest.mark.slow
def test_a_run_and_the_same_command_again(tmp_path, text, capsys):
    config = tiny(text, sample__tokens=5, evaluation__every=2, evaluation__rows=4, optimizer__ema=0.5, steps=5)
    summary = loop.train(config, tmp_path / "run")
    said = capsys.readouterr().out
    for words in ("device   1 x", "kernel   selective_scan: ", "block_*/mixer/A_log", "total", "bytes a sequence",
                  "validation", "test", "bits per byte", "xz -9", "sample:\nThe ", "loss.png"):  # fmt: skip
        assert words in said, words
    assert summary["splits"]["test"]["xz_bits_per_byte"] > 0 and summary["steps"] == 5
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    assert list(rows(tmp_path / "run")) == [1, 2, 3, 4, 5]
    assert list(rows(tmp_path / "run", "validation_loss")) == [2, 4]
    for split in ("validation", "test"):  # of the evaluation at the end, also where there is none during training
        figures = {name: rows(tmp_path / "run", f"{split}.{name}")[5] for name in FIGURES["perplexity"]}
        assert figures == {name: summary["splits"][split][name] for name in figures}
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    for name in ("learning_rate", "grad_norm", "param_norm", "update_norm", "tokens_per_second"):
        assert all(value > 0 for value in rows(tmp_path / "run", name).values())

    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert loop.train(config, tmp_path / "run") == summary
    again = capsys.readouterr().out
    assert "compiled" not in again and again == said[said.index("\ntrained 5 steps") :]
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_raising_steps_trains_on(tmp_path, text):
    constant = dict(optimizer__schedule="constant", optimizer__warmup=2.0)
    loop.train(tiny(text, steps=4, **constant), tmp_path / "run")
    loop.train(tiny(text, steps=7, **constant), tmp_path / "run")
    loop.train(tiny(text, steps=7, **constant), tmp_path / "whole")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole") and len(rows(tmp_path / "run")) == 7


@pytest.mark.slow
def test_another_config_in_the_same_directory(tmp_path, text):
    loop.train(tiny(text, steps=1), tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(UserError, match=r"another config: model.width=32 \(was 16\)"):
        loop.train(tiny(text, steps=1, model__width=32), tmp_path / "run")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


@pytest.mark.slow
def test_nan_stops_with_its_name_after_a_checkpoint(tmp_path, text):
    """A learning rate that overflows: the message, and a checkpoint that is finite."""
    config = tiny(text, steps=30, optimizer__learning_rate=1e30, optimizer__warmup=0.0, checkpoint__every=100)
    with pytest.raises(UserError) as raised:
        loop.train(config, tmp_path / "run")
    words = re.match(
        r"(loss|grad_norm) is (nan|inf) at step (\d+); the last good state is that of step (\d+)", str(raised.value)
    )
    assert words and int(words[4]) == int(words[3]) - 1 and "\n" not in str(raised.value)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [int(words[4])]
    assert list(rows(tmp_path / "run"))[-1] == int(words[3])
    with pytest.raises(UserError, match=re.escape(words[0])):  # and again, from that checkpoint
        loop.train(config, tmp_path / "run")


@pytest.mark.slow
def test_nan_skip_goes_on(tmp_path, text, monkeypatch):
    """A batch whose gradient is not finite, made by a learning rate of zero and weights that are not: none is lost."""
    config = tiny(text, steps=4, training__nan="skip")
    real = loop.make_train_step

    def poisoned(*args):
        step = real(*args)

        def train_step(state, batch):
            bad = jax.numpy.where(state.step == 1, jax.numpy.nan, 0.0)
            poisoned = jax.tree.map(lambda p: p + bad, state.params)
            new, seen = step(state.replace(params=poisoned), batch)
            kept = jax.tree.map(lambda p, q: jax.numpy.where(state.step == 1, p, q), state.params, new.params)
            return new.replace(params=kept), seen

        return train_step

    monkeypatch.setattr(loop, "make_train_step", poisoned)
    summary = loop.train(config, tmp_path / "run")
    losses = rows(tmp_path / "run")
    assert losses[2] is None and all(losses[n] for n in (1, 3, 4))
    assert list(rows(tmp_path / "run", "skipped").values()) == [0.0, 1.0, 1.0, 1.0]
    assert np.isfinite(summary["splits"]["validation"]["loss"])


@pytest.mark.slow
def test_best_checkpoint_is_kept(tmp_path, text):
    config = tiny(
        text, steps=8, checkpoint__every=1, checkpoint__keep=1, checkpoint__best="validation_loss", evaluation__every=2
    )
    loop.train(config, tmp_path / "run")
    figures = rows(tmp_path / "run", "validation_loss")
    assert set(checkpoint.steps(tmp_path / "run" / "checkpoints")) == {8, min(figures, key=figures.get)}


@pytest.mark.slow
def test_profile_on_demand(tmp_path, text):
    loop.train(tiny(text, steps=4, training__profile_start=2, training__profile_steps=1), tmp_path / "run")
    assert any(path.is_file() for path in (tmp_path / "run" / "profile").rglob("*"))


@pytest.mark.parametrize(
    "overrides, words",
    [
        (dict(checkpoint__best="validation_loss"), "needs validations, set --config.evaluation.every"),
        (dict(checkpoint__best="losss", evaluation__every=1), "checkpoint.best='losss': must be validation_loss"),
        (dict(mesh__data=99), "mesh asks for 99 devices"),
        (dict(mesh__tensor=5), "config.mesh.tensor=5: divides no number of heads or channels"),
        (
            dict(model__implementation__short_conv="cuda"),
            "model.implementation.short_conv='cuda': must be '' or one of",
        ),
        (
            dict(model__implementation__selective_scan="mosaic_tpu"),
            "config.model.implementation.selective_scan: implementation 'mosaic_tpu' cannot serve: ",
        ),
        (dict(model__pattern="attenion"), "model.pattern"),
    ],
)
def test_bad_input_before_anything_is_made(tmp_path, text, overrides, words):
    with pytest.raises(UserError, match=words):
        loop.train(tiny(text, **overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()
