"""Configs that can be computed but that nobody means: refused for a new run, said in a line where one goes on.

Kinds: silent change of what is computed; work that is thrown away at the end.
"""

import json

import jax
import jax.numpy as jnp
import pytest

from seqmodels import cli, plausible
from seqmodels.config import upgrade, validate
from seqmodels.configs import densemamba, mamba, mamba3, transformer
from seqmodels.errors import UserError
from seqmodels.pattern import parse
from seqmodels.scripts import train
from seqmodels.training import finish, loop
from seqmodels.training.optimizer import make_schedule
from tests.overrides import with_fields
from tests.run_fixtures import tiny, write_text


def changed(module, **fields):
    return with_fields(upgrade(module.get_config()), fields)


@pytest.mark.parametrize(
    "module, fields, words",
    [
        (
            densemamba,
            dict(model__dense__every=99),
            "config.model.dense.every=99: must be less than the number of blocks",
        ),
        (densemamba, dict(model__repeats=1), "config.model.dense.variant='read': must be 'none'"),
        (mamba, dict(optimizer__warmup=1.0), "config.optimizer.warmup=1.0: must be below 1"),
        (mamba, dict(training__profile_start=1001), "config.training.profile_start=1001: must be at most steps=1000"),
        (mamba, dict(checkpoint__best="validation_loss", evaluation__every=2000), "config.evaluation.every=2000"),
        (mamba, dict(evaluation__classification="/nowhere/*"), "config.evaluation.classification='/nowhere/*'"),
        (mamba, dict(evaluation__task_folder="9" * 300), "config.evaluation.task_folder='999"),
        (mamba, dict(evaluation__task_folder="/nowhere"), "config.evaluation.task_folder='/nowhere'"),
        (mamba, dict(model__mamba__dt_floor=5.0), "config.model.mamba.dt_floor=5.0: must be at most dt_max=0.1"),
        (mamba, dict(seed=-1), "config.seed=-1: must be at least 0"),
    ],
)
def test_what_nobody_means_is_refused_for_a_new_run_only(module, fields, words):
    config = changed(module, **fields)
    with pytest.raises(UserError) as error:
        validate(config)
    assert words in str(error.value) and "\n" not in str(error.value)
    validate(config, begun=True)
    assert any(words in line and line.startswith("warning: ") for line in plausible.doubts(config, begun=True))


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(steps=40, optimizer__warmup=5000.0), "warmup=5000.0 of steps=40: the learning rate rises to 1 %"),
        (
            dict(optimizer__schedule="wsd", steps=100, optimizer__warmup=0.9, optimizer__decay=0.9),
            "config.optimizer.warmup=0.9 and decay=0.9 of steps=100",
        ),
        (dict(steps=100, optimizer__warmup=100.0), "is all of steps=100, so the learning rate never falls"),
    ],
)  # fmt: skip
def test_a_learning_rate_that_does_not_peak_is_said(fields, words):
    config = changed(mamba, **fields)
    validate(config)  # presets are tried with few steps
    (line,) = plausible.doubts(config)
    assert words in line
    if " %" in words or "decay" in words:
        schedule = make_schedule(config.optimizer, config.steps)
        largest = max(float(schedule(step)) for step in range(config.steps)) / config.optimizer.learning_rate
        assert f"to {100 * largest:.0f} % of" in line


def test_usual_schedules_raise_no_doubt():
    for fields in ({}, dict(steps=1), dict(steps=7), dict(optimizer__schedule="wsd", optimizer__decay=1.0)):
        assert plausible.doubts(changed(mamba, **fields)) == []


def test_every_part_of_a_block_counts():
    assert parse("attention+mlp+mlp") == [(("attention",), ("mlp",), ("mlp",))]
    validate(changed(transformer, model__pattern="attention+mlp+mlp"))


def test_the_field_that_is_wrong_is_named():
    with pytest.raises(UserError, match=r"config\.model\.mamba3\.state=7: must be a multiple of 4 with rotated=0\.5"):
        validate(changed(mamba3, model__mamba3__state=7))


@pytest.mark.parametrize("steps", ["9999999999999999999999", "2147483648", "0"])
def test_numbers_of_any_size_are_one_line(capsys, steps):
    argv = ["train.py", "--config=configs/mamba.py", f"--config.steps={steps}"]
    assert cli.run(lambda flags: validate(flags.config), train.define, "", argv) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "steps" in error


# The end of a run


def test_no_report_fails_a_finished_run(tmp_path, monkeypatch, capsys):
    """Splits, evaluators, the sample and the picture raise what they like: the summary is written, with what failed."""
    figures = finish.Finish.figures

    def broken(*_, **__):
        raise RuntimeError("boom\nin two lines")

    def one_split(self, params, split, rows, after=None):
        if split == "validation":
            raise MemoryError
        return figures(self, params, split, rows, after)

    monkeypatch.setattr(finish.Finish, "figures", one_split)
    monkeypatch.setattr(finish, "generate", broken)
    monkeypatch.setattr(finish.report, "plot_loss", broken)
    monkeypatch.setattr(finish.evals.EVALUATORS["loss_by_position"], "evaluate_run", broken)
    config = tiny(write_text(tmp_path), steps=2, sample__tokens=3, evals="loss_by_position,perplexity")
    summary = loop.train(config, tmp_path / "run")
    printed = capsys.readouterr().out
    stored = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert stored["steps"] == summary["steps"] == 2 and set(stored["splits"]) == {"test"}
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["loss"]["test"] > 0  # the other evaluator's
    assert stored["failed"][0].startswith("validation: MemoryError")
    assert any("loss_by_position: RuntimeError: boom in two lines" in line for line in stored["failed"])
    assert printed.count("boom in two lines") >= 2
    loop.train(config, tmp_path / "run")  # done


@pytest.mark.parametrize("prompt", ["caf\udce9", "a\x00b"])
def test_a_prompt_that_is_no_text_is_refused_at_the_start(prompt):
    with pytest.raises(UserError, match=r"config\.sample\.prompt="):
        validate(changed(mamba, sample__prompt=prompt))


def test_a_schedule_of_a_huge_warm_up_is_finite():
    config = changed(mamba, optimizer__warmup=10**30)
    validate(config)
    rate = jax.jit(make_schedule(upgrade(config).optimizer, 10))(jnp.int32(3))
    assert 0 <= float(rate) < 1e-6
