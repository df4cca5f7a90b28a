"""What a sweep is: its trials, their commands, and the tables and pictures of what came out."""

import csv
import importlib
import itertools
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from scipy.stats import t as student
from scipy.stats import ttest_rel

from seqmodels import cli
from seqmodels.configs import densemamba, denseretnet
from seqmodels.configs.trials import chain, product, vary, zipped
from seqmodels.errors import UserError
from seqmodels.model import build
from seqmodels.scripts import sweep
from seqmodels.sweeps import curves, definition, devices, marks, markup, placing, plots, report, results, tables
from seqmodels.sweeps.labels import labels
from seqmodels.sweeps.spread import mean_and_spread
from tests.sweep_fakes import ROOT, Fakes

DENSEMAMBA = str(ROOT / "configs" / "densemamba.py")


# Lists of trials


def test_product_is_every_combination():
    assert product(vary("a", 1, 2), vary("b", 3, 4)) == [
        {"a": 1, "b": 3}, {"a": 1, "b": 4}, {"a": 2, "b": 3}, {"a": 2, "b": 4},
    ]  # fmt: skip
    assert product([{"a": 1, "c": 5}], vary("b", 3)) == [{"a": 1, "c": 5, "b": 3}]
    with pytest.raises(ValueError, match="two lists of trials set a"):
        product(vary("a", 1), vary("a", 2))


def test_zipped_is_side_by_side_and_chain_one_after_another():
    assert zipped(vary("a", 1, 2), vary("b", 3, 4)) == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
    with pytest.raises(ValueError):
        zipped(vary("a", 1, 2), vary("b", 3))
    assert chain(vary("a", 1), product(vary("b", 2), vary("c", 3))) == [{"a": 1}, {"b": 2, "c": 3}]


def test_labels_say_what_differs():
    trials = [
        {"steps": 9, "model.width": 8, "seed": 0},
        {"steps": 9, "model.dense.variant": "read", "optimizer.learning_rate": 0.001, "seed": 1},
    ]
    assert labels(trials) == ["width=8", "variant=read, learning_rate=0.001"]
    assert labels([{"a.norm": 1, "seed": 0}, {"b.norm": 2, "seed": 0}]) == ["a.norm=1", "b.norm=2"]
    assert labels([{"a.b": 1, "seed": 0}, {"a.b": 1, "seed": 1}]) == ["b=1", "b=1"]
    assert labels([{"seed": 0}]) == ["as configured"]
    mixers = [{"model.pattern": "s5", "model.s5.state": 8}, {"model.pattern": "lstm", "model.width": 9}]
    assert labels(mixers) == ["pattern=s5", "pattern=lstm"]
    assert labels([*mixers, mixers[0] | {"model.s5.state": 16}])[2] == "pattern=s5, state=16"


# Definition


def define(tmp_path, name="ablation", seeds=1, spec=DENSEMAMBA, **fields):
    config = cli.load_config(spec)
    config.update_from_flattened_dict(fields)
    return definition.define(spec, config, name, seeds, tmp_path)


@pytest.mark.parametrize("name", ["ablation", "miniature"])
def test_a_trial_is_an_ordinary_command_that_gives_its_config(tmp_path, name):
    """What train.py makes of the command's flags is the config whose hash is the trial's name."""
    trials = define(tmp_path, name, 2, **{"steps": 7, "evaluation.lengths": (1, 8), "sample.prompt": "it's"})
    assert len({trial.id for trial in trials}) == len(trials)
    for trial in trials:
        argv = shlex.split(trial.line.split(" && ")[0])[1:]
        values = flags.FlagValues()
        cli.define_config(values, argv)
        flags.DEFINE_string("workdir", None, "", flag_values=values)
        values(argv)
        assert json.loads(json.dumps(dict(cli.fields(values.config)))) == trial.fields
        assert values.workdir == str(trial.workdir) and trial.workdir.name == trial.id
        for field, value in trial.overrides.items():
            assert dict(cli.fields(values.config))[field] == value


def test_miniature_has_two_trials_and_ablation_those_of_the_study(tmp_path):
    assert len(define(tmp_path, "miniature")) == 2
    trials = [trial.overrides for trial in define(tmp_path, seeds=1)]
    assert trials[0] == {"model.dense.variant": "none", "seed": 0}
    read = [t for t in trials if t["model.dense.variant"] == "read"]
    assert [t["model.dense.gate"] for t in read if "model.dense.gate" in t] == ["channel", "both", "none"]
    assert [t["model.dense.depth"] for t in read if "model.dense.depth" in t] == [1, 4]  # 2 is the config's
    assert {t["model.dense.norm"] for t in trials if t["model.dense.variant"] == "input"} == {False, True}
    deep = [trial.overrides for trial in define(tmp_path, **{"model.repeats": 8})]
    assert [t["model.dense.every"] for t in deep if "model.dense.every" in t] == [2, 4]


def test_same_config_is_the_same_trial_whatever_the_sweep(tmp_path):
    one, three = define(tmp_path), define(tmp_path, seeds=3)
    assert {trial.id for trial in one} < {trial.id for trial in three} and len(three) == 3 * len(one)
    assert {trial.id for trial in define(tmp_path, **{"steps": 7})}.isdisjoint(trial.id for trial in three)


def test_sweep_starts_from_the_overridden_config(tmp_path):
    """The width that matches is that of the model that is trained, not of the preset."""
    widths = [
        {trial.fields["model.width"] for trial in define(tmp_path, **{"model.width": width})} for width in (192, 256)
    ]
    assert widths[0] == {192, 193} and widths[1] == {256, 257}


def count(model) -> int:
    shapes = jax.eval_shape(build(model, 257).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("fields", [{}, {"depth": 4, "every": 2, "per_source": True}, {"variant": "none"}])
def test_parameters_are_counted_as_the_model_has_them(fields):
    model = densemamba.get_config().model
    model.update(width=48, repeats=5)
    model.dense.update(**fields)
    assert densemamba.parameters(model) == count(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    "module, name",
    [(densemamba, "budgets"), (densemamba, "pair"), (denseretnet, "forms"), (denseretnet, "rates")],
)
def test_other_sweeps_of_25m_are_of_valid_and_different_models(module, name):
    config, trials = module.get_config("25m"), []
    module.SWEEPS[name](trials.append, "25m")
    resolved = [definition.resolve(config, trial, name) for trial in trials]
    assert len({trial.to_json() for trial in resolved}) == len(trials) >= 2
    models = {trial.model.to_json(): trial.model for trial in resolved}
    assert all(2e7 < (size := count(model)) < 3e7 for model in models.values()), size
    if name == "forms":
        none, control, published = (count(trial.model) for trial in resolved[:3])
        assert none < control and abs(control / published - 1) < 0.005


@pytest.mark.parametrize("field, bound", [("width", 0.0005), ("dt_rank", 0.0005)])
def test_controls_have_the_parameters_of_read(field, bound):
    model = densemamba.get_config("130m").model
    other = densemamba.get_config("130m").model
    other.dense.variant = "none"
    (other if field == "width" else other.mamba)[field] = densemamba.matching(model, field)
    assert abs(densemamba.parameters(other) / densemamba.parameters(model) - 1) < 2 * bound
    assert densemamba.parameters(model) == densemamba.parameters(densemamba.get_config("130m").model)  # untouched


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--sweep=miniatur"], ["--sweep=miniatur", "did you mean miniature"]),
        (["--sweep=x"], ["there are ablation, budgets, pair, miniature"]),
        (["--config.stepz=3"], ["config.stepz", "steps"]),
        (["--config.model.width=0"], ["config.model.width=0", "at least 1"]),
        (["--engine=slum"], ["--engine=slum", "local|slurm|print"]),
        (["--seeds=0"], ["--seeds=0"]),
        (["--parallel=-1"], ["--parallel=-1"]),
        (["--compare=nowhere"], ["--compare=nowhere", "neither a run directory nor a sweep's"]),
        (["--out=/dev/null/x"], ["--out=/dev/null/x", "cannot be written"]),
        (["--sweeps=3"], ["sweeps"]),
        (["--evals=perplexty"], ["--evals=perplexty", "must be one of perplexity"]),
        (["--evals=accuracy"], ["--evals=accuracy", "does not fit this run; perplexity"]),
        (["--evals=classification", "--config.evaluation.classification=/nowhere"], ["/nowhere", "matches no file"]),
        (["--metric=bogus"], ["--metric=bogus", "no such figure"]),
        (["--metric=validation.accuracy"], ["--metric=validation.accuracy", "no such figure"]),
        (["--config.evaluation.lengths=abc"], ["evaluation.lengths"]),
        (["--config.seed=18446744073709551616"], ["config.seed=18446744073709551616"]),
    ],
)
def test_mistakes_are_one_line_before_anything_starts(tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    assert cli.run(sweep.main, sweep.define, "", ["sweep.py", f"--config={DENSEMAMBA}", *argv]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert all(word in error for word in words), error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "trial, words",
    [
        ("{'model.widht': 3}", ["model.widht=3", "did you mean model.width"]),
        ("{'model.width': 'wide'}", ["model.width='wide'", "of type int"]),
        ("{'model.dense': 3}", ["model.dense=3", "no such field"]),
        ("{'model.width': -3}", ["config.model.width=-3", "at least 1"]),
    ],
)
def test_bad_trial_of_a_sweep_is_one_line(tmp_path, trial, words):
    path = tmp_path / "bad.py"
    path.write_text(
        f"from configs.mamba import get_config\ndef sweep(add, arg=None):\n    add({{}})\n    add({trial})\n"
    )
    with pytest.raises(UserError) as error:
        define(tmp_path, spec=str(path))
    assert all(word in str(error.value) for word in ["--sweep=ablation", *words]) and "\n" not in str(error.value)


def test_example_of_the_page(tmp_path):
    example = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "sweeps.md").read_text(), re.DOTALL)[1]
    path = tmp_path / "mine.py"
    path.write_text(f"from configs.mamba import get_config\n{example}")
    assert len(define(tmp_path, spec=str(path))) == 5 and len(define(tmp_path, "depths", spec=str(path))) == 3
    fields = [trial.fields for trial in define(tmp_path, spec=str(path), **{"optimizer.learning_rate": 1e-3})]
    assert (fields[0]["model.width"], fields[0]["optimizer.learning_rate"]) == (64, 2e-3)


def test_config_without_a_sweep_and_sweep_without_trials(tmp_path):
    path = tmp_path / "none.py"
    path.write_text("from configs.mamba import get_config\n")
    with pytest.raises(UserError, match="defines no sweep"):
        define(tmp_path, spec=str(path))
    path.write_text("from configs.mamba import get_config\ndef sweep(add, arg=None):\n    pass\n")
    with pytest.raises(UserError, match="adds no trial"):
        define(tmp_path, spec=str(path))


def test_directory_of_another_sweep_is_refused(tmp_path):
    trials = define(tmp_path)
    definition.keep(tmp_path, "a.py", "ablation", trials)
    definition.keep(tmp_path, "a.py", "ablation", trials[:2])
    assert definition.keep(tmp_path, "a.py", "ablation", trials, "one") == ["one"]
    assert definition.keep(tmp_path, "a.py", "ablation", trials, "two") == ["one", "two"]
    assert definition.keep(tmp_path, "a.py", "ablation", trials, "one") == ["one", "two"]
    with pytest.raises(UserError, match=r"holds sweep ablation of a.py, not miniature of a.py"):
        definition.keep(tmp_path, "a.py", "miniature", trials)


def test_evaluators_of_the_config_are_left_to_eval(tmp_path):
    (trial, _) = define(tmp_path, "miniature", evals="perplexity,context_lengths", platform="cpu")
    assert trial.commands["eval"][3:] == ("--evals=perplexity,context_lengths", "--platform=cpu")
    assert trial.fields["evals"] == "perplexity,context_lengths" and "evals" not in str(trial.commands["train"])
    assert trial.id != define(tmp_path, "miniature", platform="cpu")[0].id
    (usual, _) = define(tmp_path, "miniature")
    assert usual.commands["eval"][3:] == ()


# Devices


def test_slots_of_gpus(monkeypatch):
    config = densemamba.get_config()
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0, 2,GPU-a")
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in devices.slots(0, config)] == ["0", "2", "GPU-a"]
    assert len(devices.slots(2, config)) == 2
    with pytest.raises(UserError, match="--parallel=4: trials need 4 GPUs; this host has 3"):
        devices.slots(4, config)
    config.mesh.fsdp = 2
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in devices.slots(0, config)] == ["0,2"]
    config.mesh.tensor = 2
    with pytest.raises(UserError, match="mesh asks for 4 GPUs; this host has 3"):
        devices.slots(0, config)
    config.platform = "cpu"
    assert devices.slots(0, config) == [devices.Slot()]


def test_slots_that_share_a_gpu_have_its_memory_and_locks_between_them(monkeypatch):
    config = densemamba.get_config()
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    alone, shared = devices.slots(0, config), devices.slots(0, config, per_gpu=3)
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in shared] == ["0", "1"] * 3
    assert all(float(slot.environment["XLA_CLIENT_MEM_FRACTION"]) <= 1 / 3 for slot in shared)
    assert "XLA_CLIENT_MEM_FRACTION" not in alone[0].environment
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    renamed = devices.slots(1, config, per_gpu=2)[0].environment
    assert float(renamed["XLA_PYTHON_CLIENT_MEM_FRACTION"]) <= 1 / 2 and "XLA_CLIENT_MEM_FRACTION" not in renamed
    assert {slot.sharing for slot in shared} == {3} and {slot.sharing for slot in alone} == {1}
    of_first = [lock for slot in shared[::2] for lock in slot.locks]  # apart, and together what one alone would take
    assert len(set(of_first)) == len(of_first) and set(of_first) == set(alone[0].locks)
    assert len(devices.slots(5, config, per_gpu=3)) == 5
    with pytest.raises(UserError, match="--parallel=7: trials need 3 GPUs; this host has 2"):
        devices.slots(7, config, per_gpu=3)
    config.mesh.fsdp = 2
    with pytest.raises(UserError, match=r"--per_gpu=2: must be 1 where config\.mesh asks for 2 GPUs"):
        devices.slots(0, config, per_gpu=2)


def test_slots_of_a_cpu_share_its_cores(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    cores = [slot.cores for slot in devices.slots(2, densemamba.get_config())]
    assert cores == [{0, 2}, {1}]
    assert [slot.cores for slot in devices.slots(4, densemamba.get_config())] == [{0}, {1}, {2}, {0}]
    assert devices.slots(1, densemamba.get_config()) == [devices.Slot()]


# Results


def run_directory(folder, *, seed=0, loss=2.0, speed=100.0, steps=10, curve=None, done=True, width=8):
    """As train.py and eval.py make it."""
    folder.mkdir(parents=True)
    config = {"seed": seed, "batch_size": 4, "seq_len": 5, "model": {"width": width}}
    (folder / "config.json").write_text(json.dumps(config))
    losses = curve or [loss + 1 / (step + 1) for step in range(steps)]
    rows = [{"step": i + 1, "loss": value, "tokens_per_second": speed} for i, value in enumerate(losses)]
    rows.insert(5, {"step": 5, "validation_loss": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 11, "lo')
    if done:
        summary = {"steps": steps, "splits": {"validation": {"loss": loss}}, "parameters": 10 * width, "sample": "x"}
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "eval.json").write_text(json.dumps({"step": steps, "a": {"b": [1, 2], "c": loss / 2}, "bad": None}))
    return folder


def test_figures_of_a_run(tmp_path):
    (result,) = results.of_runs([run_directory(tmp_path / "run", speed=50.0)])
    assert result.status == "done" and result.id == result.label == "run"
    figures = result.figures
    assert figures["validation.loss"] == 2.0 and figures["eval.a.c"] == 1.0 and figures["parameters"] == 80
    assert figures["steps_done"] == 10 and figures["train_loss"] == 2.0 + 1 / 10  # a twentieth of 10 rows is one
    assert figures["tokens_per_second"] == 50.0
    assert math.isclose(figures["train_seconds"], 10 * 20 / 50)  # 10 steps of 4 x 5 tokens
    assert set(figures) == {
        "steps_done", "train_loss", "tokens_per_second", "train_seconds", "validation.loss", "parameters",
        "eval.step", "eval.a.c",
    }  # fmt: skip


def test_loss_at_equal_time(tmp_path):
    fast = run_directory(tmp_path / "fast", speed=100.0, curve=[5.0, 4.0, 3.0, 2.0], steps=4)
    slow = run_directory(tmp_path / "slow", speed=50.0, curve=[4.0, 3.0, 2.0, 1.0], steps=4)
    lined = results.of_runs([fast, slow])
    assert math.isclose(results.at_equal_time(lined), 0.8)
    assert [result.figures[results.EQUAL_TIME] for result in lined] == [2.0, 3.0]


def test_a_shared_device_gives_no_speed_and_its_trials_the_time_of_their_like(tmp_path):
    shared, measured, alone, other = (
        run_directory(tmp_path / "trials" / name, seed=seed, speed=speed, steps=4)
        for name, seed, speed in (("a", 0, 7.0), ("b", 1, 7.0), ("c", 2, 80.0), ("d", 0, 7.0))
    )
    (measured / "eval.json").write_text(json.dumps({"training": {"tokens_per_second": 100.0}}))
    for folder, label in ((shared, "x"), (measured, "x"), (alone, "x"), (other, "y")):
        record = {"status": "done", "sharing": 1 if folder is alone else 2, "overrides": {"name": label}}
        (folder / "trial.json").write_text(json.dumps(record))
    (tmp_path / "sweep.json").write_text(json.dumps({"trials": ["a", "b", "c", "d"]}))
    a, b, c, d = results.of_runs([tmp_path])
    assert [r.figures.get("tokens_per_second") for r in (a, b, c, d)] == [None, 100.0, 80.0, None]
    for result, speed in ((a, 90), (b, 90), (c, 80)):  # 20 tokens a step; 90 is the median of 100 and 80
        np.testing.assert_allclose(result.seconds, [20 * step / speed for step in (1, 2, 3, 4)])
        assert math.isclose(result.figures["train_seconds"], 80 / speed)
    assert d.seconds == [] and "train_seconds" not in d.figures
    groups = results.group([a, b, c, d])
    assert results.at_equal_time([a, b, c, d])
    assert [name for name, _, _ in curves.figures(groups)] == ["losses", "losses_by_time", "loss_differences"]
    assert results.EQUAL_TIME in a.figures and results.EQUAL_TIME not in d.figures


def test_unfinished_runs_have_no_figures_to_be_mistaken_for_results(tmp_path):
    (result,) = results.of_runs([run_directory(tmp_path / "run", done=False)])
    assert result.status == "interrupted" and result.figures == {"steps_done": 10} and len(result.losses) == 10


def test_mean_spread_and_paired_differences_against_numpy(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.normal(3, 0.1, (2, 4))
    lined = []
    for row, name in zip(values, ("one", "two"), strict=True):
        for seed, loss in enumerate(row):
            (result,) = results.of_runs([run_directory(tmp_path / f"{name}{seed}", seed=seed, loss=loss)])
            result.label = name
            lined.append(result)
    one, two = results.group(lined)
    assert (one.number, two.number, one.label, two.label) == (1, 2, "one", "two")
    np.testing.assert_allclose(
        mean_and_spread(one.values("validation.loss")), (values[0].mean(), values[0].std(ddof=1))
    )
    np.testing.assert_allclose(two.differences(one, "validation.loss"), values[1] - values[0])
    two.results.pop(0)  # only seeds that both have
    np.testing.assert_allclose(two.differences(one, "validation.loss"), values[1, 1:] - values[0, 1:])
    assert mean_and_spread([2.0]) == (2.0, None) and math.isnan(mean_and_spread([])[0])


def test_compare_lines_up_runs_and_sweeps(tmp_path, monkeypatch, capsys):
    fakes = Fakes(tmp_path, ("fine", "better"))
    fakes.run("--seeds=2")
    run_directory(tmp_path / "other", loss=2.5)
    run_directory(tmp_path / "going", done=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "pictures", lambda *_: [])
    argv = ["sweep.py", "--compare=other,out,going", "--out=lined"]
    assert cli.run(sweep.main, sweep.define, "", argv) == 0
    table = capsys.readouterr().out
    with open("lined/results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["done"] * 5 + ["interrupted"]
    assert [row["validation.loss"] for row in rows] == ["2.5", "4.0", "4.125", "6.0", "6.125", ""]
    for name in ("other", "out: prompt=fine", "out: prompt=better", "going"):
        assert name in table
    again = ["sweep.py", "--compare=other,out", "--out=again", "--metric=validation.los"]
    assert cli.run(sweep.main, sweep.define, "", again) == 1
    assert "--metric=validation.los: no such figure; did you mean validation.loss" in capsys.readouterr().err
    assert (tmp_path / "again" / "results.csv").exists()  # where the names are to be found
    assert cli.run(sweep.main, sweep.define, "", argv[:2]) == 1
    assert "--out is missing" in capsys.readouterr().err


def test_a_sweep_says_what_is_hardly_meant_once(tmp_path, capsys):
    define(tmp_path, "pair", spec=DENSEMAMBA, **{"optimizer.warmup": 5000.0})
    error = capsys.readouterr().err
    assert error.count("warning: config.optimizer.warmup=5000.0 of steps=1000") == error.count("\n") == 1
    with pytest.raises(UserError, match=r"model\.dense\.variant='read': must be 'none'"):
        define(tmp_path, "pair", spec=DENSEMAMBA, **{"model.repeats": 1})
    (tmp_path / "sweep.json").write_text("{}")  # begun under an earlier version
    assert len(define(tmp_path, "pair", spec=DENSEMAMBA, **{"model.repeats": 1})) == 2
    assert "warning: config.model.dense.variant" in capsys.readouterr().err


def compared(tmp_path, *folders):
    """(label, number of results) of each group of the runs in these folders."""
    lined = results.distinct(results.of_runs([tmp_path / folder for folder in folders]))
    return [(group.label, len(group.results)) for group in results.group(lined)]


def test_different_runs_are_not_merged_as_seeds_of_one(tmp_path):
    """Kind: figures that are wrong. However it comes about: names, seeds, links, sweeps."""
    for name, options in {
        "exp1/mamba": {},
        "exp2/mamba": {"width": 16, "seed": 1},  # another config
        "seeds/1/mamba": {"seed": 1},
        "again/mamba": {},  # the same config and seed: another run, not another seed
        "texts/mamba": {"seed": 2},
    }.items():
        run_directory(tmp_path / name, **options)
    (tmp_path / "texts/mamba/data.json").write_text('{"train": "other text"}')
    assert compared(tmp_path, "exp1/mamba", "exp2/mamba") == [("exp1/mamba", 1), ("exp2/mamba", 1)]
    assert compared(tmp_path, "exp1/mamba", "seeds/1/mamba") == [("mamba", 2)]  # two seeds of one
    assert compared(tmp_path, "exp1/mamba", "exp1/mamba", "exp1/../exp1/mamba") == [("mamba", 1)]
    (tmp_path / "link").mkdir()
    (tmp_path / "link/mamba").symlink_to(tmp_path / "exp1/mamba")
    assert compared(tmp_path, "exp1/mamba", "link/mamba") == [("mamba", 1)]
    assert compared(tmp_path, "exp1/mamba", "again/mamba") == [("exp1/mamba", 1), ("again/mamba", 1)]
    assert len(compared(tmp_path, "exp1/mamba", "texts/mamba")) == 2
    three = compared(tmp_path, "exp1/mamba", "exp2/mamba", "seeds/1/mamba")
    assert three == [("exp1/mamba", 2), ("exp2/mamba", 1)]


def test_sweeps_of_one_name_are_not_merged(tmp_path):
    for place, width in (("a", 8), ("b", 16)):
        for seed in (0, 1):
            folder = run_directory(tmp_path / place / "out" / "trials" / f"t{seed}", seed=seed, width=width)
            (folder / "trial.json").write_text(json.dumps({"status": "done", "overrides": {"seed": seed}}))
        (tmp_path / place / "out" / "sweep.json").write_text(json.dumps({"trials": ["t0", "t1"]}))
    assert compared(tmp_path, "a/out", "b/out") == [("a/out: as configured", 2), ("b/out: as configured", 2)]
    # trials that were run by hand, and so left no record of what they are
    run_directory(tmp_path / "c/out/trials/t0", width=8)
    run_directory(tmp_path / "c/out/trials/t1", width=16, seed=1)
    (tmp_path / "c" / "out" / "sweep.json").write_text(json.dumps({"trials": ["t0", "t1"]}))
    found = compared(tmp_path, "c/out")
    assert [number for _, number in found] == [1, 1] and len({label for label, _ in found}) == 2


def test_a_compared_sweep_of_rates_is_one_model_of_its_name(tmp_path):
    for number in (0, 1):
        folder = run_directory(tmp_path / "gla" / "trials" / f"t{number}")
        record = {"status": "done", "overrides": {"optimizer.learning_rate": 10.0**-number, "seed": 0}}
        (folder / "trial.json").write_text(json.dumps(record))
    (tmp_path / "gla" / "sweep.json").write_text(json.dumps({"trials": ["t0", "t1"]}))
    found = results.of_runs([tmp_path / "gla"])
    assert [(result.model, result.rate) for result in found] == [("gla", 1.0), ("gla", 0.1)]


def test_labels_of_values_that_differ_far_behind_are_distinct():
    rates = [{"optimizer.learning_rate": rate, "seed": 0} for rate in (1e-3, 1.00001e-3)]
    assert labels(rates) == ["learning_rate=0.001", "learning_rate=0.00100001"]
    assert labels([rates[0], rates[0] | {"seed": 1}]) == ["learning_rate=0.001"] * 2


def test_a_run_that_is_trained_further_is_not_done(tmp_path):
    folder = run_directory(tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('\n{"step": 11, "loss": 1.0}\n')
    (result,) = results.of_runs([folder])
    assert result.status == "interrupted" and result.figures == {"steps_done": 11}
    folder = run_directory(tmp_path / "raised")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"steps": 20}))
    (result,) = results.of_runs([folder])
    assert result.status == "interrupted"


def test_report_has_the_means_spreads_and_differences(tmp_path):
    losses = {"none": (2.0, 2.2), "read": (1.9, 2.05)}
    lined = []
    for name, values in losses.items():
        for seed, loss in enumerate(values):
            (result,) = results.of_runs([run_directory(tmp_path / f"{name}{seed}", seed=seed, loss=loss)])
            result.label, result.columns = name, {"variant": name, "lengths": [1, 2]}
            result.record |= {"commit": "abc", "device": "1 x <H100>", "started": "2026-01-02T03:04:05"}
            lined.append(result)
    lined += results.of_runs([run_directory(tmp_path / "rank", done=False)])
    lined[4].record |= {"status": "failed", "reason": "a | b <script>alert(1)</script>"}
    (lined[4].workdir / "trial.log").write_text("lots\nthen <b>boom</b>\n")
    report.write(tmp_path, "A & B", lined, "python sweep.py --x=<y>")

    text = (tmp_path / "report.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| 1 | none"))
    half = student.interval(0.95, 1, scale=statistics.stdev(losses["none"]) / math.sqrt(2))[1]
    interval = f"[{2.1 - half:.4f}, {2.1 + half:.4f}]"
    assert f"| 2 | 2.1000 ± {statistics.stdev(losses['none']):.4f} | {interval} |  |  |" in row
    assert "| 2 | read | 2 | 1.9750 ± 0.1061 | [1.0220, 2.9280] | -0.1250 ± 0.0354 | [-0.4427, 0.1927] |" in text
    for part in ("](losses.png)", "python sweep.py --x=<y>", "Commit abc", "1 x <H100>", "2026-01-02"):
        assert part in text
    assert "a \\| b" in text and "Seeds 0, 1" in text and "4 done, 1 failed" in text

    page = (tmp_path / "report.html").read_text()
    assert page.count("<script>") == 1 and "&lt;script&gt;alert(1)" in page and "then &lt;b&gt;boom&lt;/b&gt;" in page
    names = ("losses", "losses_by_time", "loss_differences", "metric", "differences", "parameters", "speed")
    assert page.count("data:image/png;base64,") == len(names)
    assert not re.search(r"""(src|href)=["'](?!data:)|url\(|https?:|@import""", page)
    for name in names:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert ElementTree.parse(tmp_path / f"{name}.svg").getroot().tag.endswith("svg")
    tex = (tmp_path / "tables.tex").read_text()
    assert tex.count(r"\begin{tabular}") == 4 == page.count("<summary>LaTeX</summary>")
    assert r"read & 2 & 1.9750 $\pm$ 0.1061 &" in tex and r"a \textbar{} b \textless{}script" in tex


def test_a_sweep_says_what_a_trial_is_compared_with(tmp_path):
    """Also in a comparison of sweep directories. The interval is that of scipy's paired t-test."""
    path = tmp_path / "config.py"
    path.write_text(
        "from configs.mamba import get_config\n"
        "def sweep(add, arg=None):\n"
        "    for width in (8, 16):\n"
        "        for state in (2, 4):\n"
        "            add({'model.width': width, 'model.mamba.state': state}, "
        "against={'model.width': width, 'model.mamba.state': 2})\n"
        "def alone(add, arg=None):\n"
        "    add({'model.width': 8}, against={'model.width': 16})\n"
        "SWEEPS = {'alone': alone}\n"
    )
    with pytest.raises(UserError, match=r"--sweep=alone: compares .*'model.width': 8.* that the sweep does not have"):
        define(tmp_path / "out", "alone", spec=str(path))
    trials = define(tmp_path / "out", spec=str(path), seeds=3)
    assert [[t.id for t in trials].index(t.against) for t in trials] == [0, 1, 2, 0, 1, 2, 6, 7, 8, 6, 7, 8]
    definition.keep(tmp_path / "out", str(path), "ablation", trials)
    losses = np.random.default_rng(0).uniform(2, 3, (4, 3))
    for trial, loss in zip(trials, losses.flat, strict=True):
        folder = run_directory(trial.workdir, seed=trial.overrides["seed"], loss=float(loss))
        (folder / "trial.json").write_text(json.dumps({"status": "done", "evals": "", "overrides": trial.overrides}))
    for found in (results.of_trials(trials, {}), results.of_runs([tmp_path / "out"])):
        groups = results.group(results.distinct(found))
        table = tables.results(groups, "validation.loss")
        assert table.headers[5:8] == ["compared with", "difference", "95% interval"]
        low, high = ttest_rel(losses[3], losses[2]).confidence_interval()
        less = losses[3] - losses[2]
        cells = ["3", f"{less.mean():+.4f} ± {less.std(ddof=1):.4f}", f"[{low:.4f}, {high:.4f}]"]
        assert table.rows[3][5:8] == cells and table.rows[2][5:8] == ["", "", ""] and table.rows[1][5] == "1"
        assert "less that of the trial that it is compared with" in list(marks.figures(groups, "validation.loss"))[1][1]
        for each, rate in zip(groups, (1e-3, 1e-3, 1e-3, 2e-3), strict=True):
            each.results[0].model, each.results[0].rate = "plain" if each.number in (1, 3) else "form", rate
    _, table, _ = tables.best_rates(groups, "validation.loss")  # each model's best rate, against the plain one's best
    plain, form = (losses[of].mean(1).argmin() for of in ([0, 2], [1, 3]))
    low, high = ttest_rel(losses[[1, 3][form]], losses[[0, 2][plain]]).confidence_interval()
    assert table.rows[1][7] == str([1, 3][plain]) and table.rows[1][9] == f"[{low:.4f}, {high:.4f}]"


def test_report_of_nothing_yet(tmp_path):
    (result,) = results.of_runs([run_directory(tmp_path / "run", done=False)])
    result.losses.clear()
    assert result.figures  # but none to compare by
    report.write(tmp_path, "Nothing", [result], "python sweep.py", "validation.loss")
    assert not (tmp_path / "losses.png").exists() and "| 1 | run | 0 of 1 |" in (tmp_path / "report.md").read_text()


def test_pictures_show_what_there_is(tmp_path):
    """A diverged run is still a curve; without a second trial there are no differences."""
    lined = results.of_runs([run_directory(tmp_path / f"run{i}", seed=i, loss=2.0 + i) for i in range(3)])
    lined[2].record["status"], lined[2].figures = "diverged", {}
    groups = results.group(lined)
    (axes,) = dict((name, figure) for name, _, figure in curves.figures(groups))["losses"].axes
    assert [text.get_text() for text in axes.texts] == ["1", "2", "3"]
    found = [name for name, _, _ in marks.figures(groups, "validation.loss")]
    assert found == ["metric", "parameters", "speed"]  # no seed is in two trials
    assert not list(marks.figures(groups[2:], "validation.loss"))


def test_the_best_rate_of_each_model_is_a_row(tmp_path):
    """Rates of one model have its colour; the best one is by the mean over seeds, upwards for accuracies."""
    lined = []
    for model, rate, losses in [("a", 1e-3, (3.0, 1.0)), ("a", 1e-2, (1.5, 1.7)), ("b", 1e-3, (1.2, 1.4))]:
        for seed, loss in enumerate(losses):
            (result,) = results.of_runs([run_directory(tmp_path / f"{model}{rate}{seed}", seed=seed, loss=loss)])
            result.label, result.model, result.rate = f"{model}, {rate}", model, rate
            result.figures["test.accuracy"] = 1 / loss
            lined.append(result)
    groups = results.group(lined)
    _, table, _ = tables.best_rates(groups, "validation.loss")
    assert [row[:6] for row in table.rows] == [
        ["2", "a", "0.01, the highest", "2", "2", "1.6000 ± 0.1414"],
        ["3", "b", "0.001", "1", "2", "1.3000 ± 0.1414"],
    ]
    _, table, _ = tables.best_rates(groups, "test.accuracy")
    assert table.rows[0][:3] == ["1", "a", "0.001, the lowest"]  # (1/3 + 1)/2 is more than that of 0.01
    style = plots.Style(groups)
    assert style.colour(groups[0]) == style.colour(groups[1]) != style.colour(groups[2])
    assert style.dash(groups[0]) != style.dash(groups[1])
    assert tables.best_rates(groups[1:], "validation.loss") == []


def test_labels_are_moved_apart_as_little_as_possible():
    assert np.allclose(placing.apart([0.5, 0.1, 0.9], 0.1, 0, 1), [0.5, 0.1, 0.9])
    assert np.allclose(placing.apart([0.5, 0.5, 0.5], 0.2, 0, 1), [0.3, 0.5, 0.7])
    assert np.allclose(placing.apart([1.0, 0.99, 0.0], 0.1, 0, 1), [1.0, 0.9, 0.0])
    assert np.allclose(placing.apart([0.2] * 5, 0.5, 0, 1), [0, 0.25, 0.5, 0.75, 1])  # as far as there is room
    places = np.random.default_rng(0).uniform(size=12)
    found = placing.apart(list(places), 0.05, 0, 1)
    assert np.array_equal(np.argsort(found), np.argsort(places)) and np.diff(np.sort(found)).min() > 0.05 - 1e-9


def test_numbers_stand_on_no_other_number_or_mark():
    points = [(float(x), float(y)) for x, y in np.random.default_rng(0).normal(50, 6, (18, 2))]
    offsets = placing.beside(points, [(14.0, 10.0)] * 18, 4.0)
    boxes = [(x + dx, y + dy, 14.0, 10.0) for (x, y), (dx, dy) in zip(points, offsets, strict=True)]
    dots = [(x, y, 8.0, 8.0) for x, y in points]
    assert not any(placing.overlap(one, other) for one, other in itertools.combinations(boxes, 2))
    assert not any(placing.overlap(box, dot) for box in boxes for dot in dots)


def test_markup_in_both_forms():
    blocks = [
        markup.Heading("Two"), markup.Table(["a", "b", "c"], [["x|y", "<", "1"]]), markup.Code("```", "Log"), "Text."
    ]  # fmt: skip
    assert markup.markdown("One", blocks) == (
        "# One\n\n## Two\n\n| a | b | c |\n| --- | --- | ---: |\n| x\\|y | < | 1 |\n\nLog\n\n````\n```\n````\n\nText.\n"
    )
    page = markup.page("One", blocks)
    assert '<td class="text first">x|y</td><td class="text">&lt;</td><td>1</td>' in page
    assert markup.tabular(markup.Table(["50% \\"], [["a_b & 1 ± 2"]], texts=1)).splitlines() == [
        r"\begin{tabular}{l}", r"\toprule", r"50\% \textbackslash{} \\", r"\midrule", r"a\_b \& 1 $\pm$ 2 \\",
        r"\bottomrule", r"\end{tabular}",
    ]  # fmt: skip
    assert "<details><summary>Log</summary><pre>```</pre></details>" in page


def test_sweep_imports_no_jax_and_no_plots():
    """The parent of the trials is light, and takes no device from them."""
    code = "import sys, sweep; print([m for m in ('jax', 'matplotlib', 'torch', 'submitit') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", ["densemamba", "mamba", "transformer"])
def test_sweeps_of_all_configs_are_defined(tmp_path, name):
    spec = str(ROOT / "configs" / f"{name}.py")
    assert len(define(tmp_path, spec=spec)) > 3
    assert hasattr(importlib.import_module(f"seqmodels.configs.{name}"), "sweep")
