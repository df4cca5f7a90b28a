"""--grid: sweeps of any config that no file defines."""

import pytest

from seqmodels import cli
from seqmodels.branches import BRANCHES
from seqmodels.errors import UserError
from seqmodels.scripts import sweep
from seqmodels.sweeps import definition, grid
from tests.sweep_fakes import ROOT, Fakes

MAMBA = str(ROOT / "configs" / "mamba.py")


def define(folder, *grids, spec=MAMBA, name="", seeds=1):
    return definition.define(spec, cli.load_config(spec), name, seeds, folder, "none", grids)


def test_every_combination_is_a_trial_that_has_the_values_as_typed(tmp_path):
    trials = define(tmp_path, "optimizer.learning_rate=1e-3,2e-3", "model.state=8, 32", seeds=2)
    found = [(t.fields["optimizer.learning_rate"], t.fields["model.mamba.state"], t.fields["seed"]) for t in trials]
    assert found == [(rate, state, seed) for rate in (1e-3, 2e-3) for state in (8, 32) for seed in (0, 1)]
    assert "--config.optimizer.learning_rate=0.001" in trials[0].commands["train"]
    assert "--config.model.mamba.state=8" in trials[0].commands["train"]


def test_a_trial_has_the_name_that_it_has_in_any_sweep(tmp_path):
    """So a grid that was stopped goes on, and more values add trials."""
    path = tmp_path / "mine.py"
    path.write_text("from configs.mamba import get_config\ndef sweep(add, arg=None):\n    add({'model.width': 64})\n")
    (swept,) = define(tmp_path, spec=str(path), name="ablation")
    (alone,) = define(tmp_path, "model.width=64", spec=str(path))
    assert swept.id == alone.id == define(tmp_path, "model.width=32,64", spec=str(path))[1].id
    crossed = define(tmp_path, "seed=3,4", spec=str(path), name="ablation")
    assert [(t.fields["model.width"], t.fields["seed"]) for t in crossed] == [(64, 3), (64, 4)]
    with pytest.raises(UserError, match=r"--grid=model.width=8: the sweep sets model.width too"):
        define(tmp_path, "model.width=8", spec=str(path), name="ablation")


def test_every_branch_of_the_registry_is_a_pattern_of_any_config(tmp_path):
    names = list(BRANCHES)
    trials = define(tmp_path, f"model.pattern={','.join(names)}", spec="transformer")
    assert [trial.fields["model.pattern"] for trial in trials] == names
    both = define(tmp_path, "model.pattern=mamba,mamba2", "model.state=32", spec="transformer")
    assert [t.fields[f"model.{t.fields['model.pattern']}.state"] for t in both] == [32, 32]


def test_values_that_hold_commas():
    texts = ["optimizer.groups='ssm=0.1,embedding=0',''", "evaluation.lengths=(1, 4),[1]", 'sample.prompt=it\'s,"a, b"']
    config = cli.load_config("mamba")
    found = [grid.overrides(combination, config, {}) for combination in grid.combinations(texts)]
    assert len(found) == 8
    assert found[0] == {
        "optimizer.groups": "ssm=0.1,embedding=0",
        "evaluation.lengths": (1, 4),
        "sample.prompt": "it's",
    }
    assert found[-1] == {"optimizer.groups": "", "evaluation.lengths": (1,), "sample.prompt": "a, b"}


@pytest.mark.parametrize(
    "grids, words",
    [
        (["model.width"], "must be FIELD=VALUE,VALUE"),
        (["model.width=8,,16"], None),
        (["model.width=8", "model.width=16"], "model.width has a grid already"),
        (["model.state=8", "model.mamba.state=16"], "another grid sets model.mamba.state too"),
        (["model.widht=8"], "--grid=model.widht: no such field; did you mean model.width"),
        (["model.width=wide"], "--grid=model.width='wide': must be an integer, at least 1"),
        (["model.width=0"], "--grid=model.width=0: must be at least 1"),
        (["data.reset=2"], "--grid=data.reset='2': must be True or False"),
        (["evaluation.lengths=(1,a)"], "--grid=evaluation.lengths='(1,a)': must be a list"),
        (["model.pattern=mmba"], "--grid: config.model.pattern='mmba'"),
        (["model.pattern=mamba mamba2", "model.state=8"], "may be model.mamba.state or model.mamba2.state"),
        (["model.repeats=3", "model.scan_blocks=2"], "--grid: config.model.scan_blocks=2: must be"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, grids, words):
    monkeypatch.chdir(tmp_path)
    argv = ["sweep.py", f"--config={MAMBA}", "--engine=print", *(f"--grid={text}" for text in grids)]
    status = cli.run(sweep.main, sweep.define, "", argv)
    error = capsys.readouterr().err
    if words is None:  # an empty value between two commas is none
        assert status == 0 and not error
    else:
        assert status == 1 and error.startswith("error: ") and error.count("\n") == 1 and words in error


def test_a_grid_runs_and_more_values_run_only_the_new_trials(tmp_path):
    fakes = Fakes(tmp_path, ("fine",))
    fakes.run("--grid=sample.prompt=fine,better", "--evals=none")
    said = fakes.run("--grid=sample.prompt=fine,better,best", "--evals=none")
    assert [row["sample.prompt"] for row in fakes.rows()] == ["fine", "better", "best"] and len(fakes.calls()) == 3
    assert "3 of 3 trials done" in said
    assert (fakes.out / "report.md").read_text().startswith("# grid-prompt of fake.py")
