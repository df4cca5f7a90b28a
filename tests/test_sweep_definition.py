"""What a sweep is: lists of trials, their configs and commands, and the devices that they get."""

import json
import math
import os
import re
import shlex

import jax
import jax.numpy as jnp
import pytest
from absl import flags

from seqmodels import cli
from seqmodels.configs import densemamba, denseretnet
from seqmodels.configs.trials import chain, product, vary, zipped
from seqmodels.errors import UserError
from seqmodels.model import build
from seqmodels.scripts import sweep
from seqmodels.sweeps import definition, devices
from seqmodels.sweeps.labels import labels
from tests.sweep_fakes import DENSEMAMBA, ROOT, define

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
