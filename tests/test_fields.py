"""Declarations of fields: rules, groups, what an older config lacks, what nobody declared, and what --help says."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from seqmodels import cli
from seqmodels.branches import BRANCHES
from seqmodels.config import declared_fields, upgrade, validate
from seqmodels.config_help import describe
from seqmodels.configs import densemamba, mamba, synthetic, transformer
from seqmodels.configs.base import base
from seqmodels.errors import UserError
from seqmodels.fields import Field, above, at_least, between, group, one_of, share
from seqmodels.fields.mamba2 import MAMBA2
from seqmodels.sweeps.definition import define, identify
from tests.golden import trials

ROOT = Path(__file__).parent.parent
FIRST_WAVE = ROOT / "tests" / "fixtures" / "first_wave"


# Rules and groups


@pytest.mark.parametrize(
    "field, good, bad, words",
    [
        (Field(1, "", at_least(1)), (1, 7), (0, -3), "at least 1"),
        (Field(1, "", between(2, 8)), (2, 8), (1, 9), "between 2 and 8"),
        (Field(1.0, "", above(0)), (1e-9, 3), (0, -1.0, float("inf")), "greater than 0"),
        (Field(0.0, "", share), (0, 0.99), (1.0, -0.1), "at least 0 and less than 1"),
        (Field("a", "", one_of("a", "b")), ("a", "b"), ("c", "", 3), "one of 'a', 'b'"),
        (Field(0, "", one_of(0, 2)), (0, 2), (1, 2.5), "one of 0, 2"),
        (Field(1.0, ""), (2, 2.5, float("inf")), (float("nan"), "2", True), "a number"),
        (Field(True, ""), (True, False), (1, 0.0, "True"), "True or False"),
        (Field(3, ""), (0, -7), (3.0, True, "3"), "an integer"),
        (Field("", ""), ("", "word"), (3, None), "a text"),
        (Field((1,), ""), ((), [1, 2]), (1, "1"), "a list"),
    ],
)
def test_a_field_takes_what_its_type_and_rule_allow(field, good, bad, words):
    for value in good:
        field.check("x.y", value)
    for value in bad:
        with pytest.raises(UserError) as error:
            field.check("x.y", value)
        assert str(error.value).startswith(f"config.x.y={value!r}: must be ") and words in str(error.value)


def test_a_group_checks_configs_and_modules_alike():
    for kind in (SimpleNamespace, ConfigDict):
        MAMBA2.validate(kind(dict(head_dim=16)) if kind is ConfigDict else kind(head_dim=16), 32)
        wrong = kind(dict(head_dim=24)) if kind is ConfigDict else kind(head_dim=24)
        with pytest.raises(UserError, match=r"^config.model.mamba2.head_dim=24: must be a divisor of .* 64$"):
            MAMBA2.validate(wrong, 32)
    with pytest.raises(UserError, match=r"^config.model.mamba2.groups=3: must be a divisor of the number of heads, 8$"):
        MAMBA2.validate(SimpleNamespace(groups=3), 32)


def test_a_misspelt_choice_names_the_nearest():
    field = Field("none", "...", one_of("none", "block", "dots"))
    with pytest.raises(UserError, match=r"^config.model.remat='blocks': must be .*'dots'; did you mean 'block'\?$"):
        field.check("model.remat", "blocks")
    with pytest.raises(UserError, match=r"'dots'$"):
        field.check("model.remat", "everything")


def test_defaults_of_a_group():
    options = MAMBA2.defaults(state=64)
    assert options.state == 64 and options.head_dim == 8 and set(options) == set(MAMBA2.fields)
    with pytest.raises(UserError, match=r"config.model.mamba2.sate=3: no such field; did you mean state\?"):
        MAMBA2.defaults(sate=3)


@pytest.mark.parametrize("name", list(BRANCHES))
def test_every_default_is_allowed_and_every_field_has_a_meaning(name):
    branch = group(name)
    branch.validate(branch.defaults(), 128)
    assert all(field.meaning and not field.meaning.endswith(".") for field in branch.fields.values())


def test_a_branch_without_options_needs_no_file():
    assert group("nonesuch") is None and group("run") is None and group("rules") is None


def test_checking_a_config_imports_no_jax():
    program = """
import sys
from seqmodels.config import check_names, upgrade, validate
from seqmodels.config_help import describe
from seqmodels.configs import densemamba, synthetic, transformer
for config in (transformer.get_config(), synthetic.get_config("mqar,mixer=retnet")):
    validate(upgrade(config))
check_names(densemamba.get_config())  # whether dense links fit is for the branches' classes to say, which need JAX
assert list(describe(densemamba.get_config(), 80))
assert not {"jax", "flax", "optax"} & set(sys.modules), "JAX was imported"
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


# Older configs


def stored(name):
    """config.json of a run directory that the code of the first wave wrote."""
    return json.loads((FIRST_WAVE / name / "config.json").read_text())


@pytest.mark.parametrize("name", ["densemamba", "zoo"])
def test_what_an_old_run_lacks_is_filled_in(name):
    old = stored(name)
    new = upgrade(old)
    assert "norm" not in old["model"] and new.model.norm == "rms" and new.optimizer.groups == ""
    validate(new)
    flat = dict(cli.fields(new))
    for field, value in cli.fields(ConfigDict(old)):
        assert flat.pop(field) == (tuple(value) if isinstance(value, list) else value)  # nothing else is changed
    declared = declared_fields(new)
    assert flat and all(value == declared[field].default for field, value in flat.items())
    assert upgrade(new).to_dict() == new.to_dict() == upgrade(FrozenConfigDict(old)).to_dict()


def test_a_config_that_is_upgraded_is_not_changed_itself():
    config = base().lock()
    upgrade(config).model.width = 7
    assert config.model.width == 128 and "mamba" not in config.model and config.is_locked


def test_options_of_branches_that_the_pattern_names():
    config = base()
    config.model.pattern = "mamba2+mlp"
    new = upgrade(config)
    assert new.model.mamba2.to_dict() == MAMBA2.defaults().to_dict() and new.model.mlp.hidden == 0
    assert "mamba" not in new.model
    validate(config)


# The command line


def call(tmp_path, text, *argv):
    """Exit status of a command with a config file of the user's own; the config it came to."""
    (tmp_path / "mine.py").write_text(text)
    found = []

    def main(flag_values):
        validate(flag_values.config)
        found.append(flag_values.config)

    status = cli.run(main, cli.define_config, "Doc.", ["x.py", f"--config={tmp_path}/mine.py", *argv])
    return status, *found


OLD = """
from ml_collections import ConfigDict
from seqmodels.configs.base import base, finish, preset

def get_config(arg=None):
    chosen = preset(arg, ["small"])
    config = base()
    config.model.pattern = "attention+mlp"
    config.model.attention = ConfigDict(dict(heads=4, kv_heads=2, head_dim=0, rope_theta=1e4))
    config.model.mlp = ConfigDict(dict(hidden=176))
    {line}
    return finish(config, "mine", chosen)

def sweep(add, arg=None):
    for hidden in (176, 352):
        add({{"model.mlp.hidden": hidden}})
"""


def test_flags_reach_fields_that_a_users_config_lacks(tmp_path):
    flags = ["--config.model.attention.window=16", "--config.model.mlp.activation=gelu", "--config.model.norm=layer"]
    status, config = call(tmp_path, OLD.format(line=""), *flags)
    assert status == 0 and config.model.attention.window == 16 and config.model.mlp.activation == "gelu"
    flags = ["--config.model.dense.bottleneck_state=8", "--config.model.dense.gate_std=0.02"]
    status, config = call(tmp_path, OLD.format(line=""), *flags)
    assert status == 0 and config.model.dense.bottleneck_state == 8 and config.model.dense.gate_std == 0.02


def test_flags_reach_branches_that_another_flag_names(tmp_path):
    flags = ["--config.model.pattern=gla+mlp", "--config.model.gla.gate_rank=8"]
    status, config = call(tmp_path, OLD.format(line=""), *flags)
    assert status == 0 and config.model.gla.gate_rank == 8 and config.model.pattern == "gla+mlp"


@pytest.mark.parametrize(
    "line, words",
    [
        ("config.stesp = 3", ["config.stesp=3: no such field", "did you mean steps"]),
        ("config.modle = ConfigDict(dict(width=3))", ["config.modle: no such group", "did you mean model"]),
        ("config.model.widht = 3", ["config.model.widht=3: no such field", "model.width"]),
        ("config.model.attention.haeds = 8", ["config.model.attention.haeds=8", "did you mean model.attention.heads"]),
        ("config.model.atention = ConfigDict(dict(heads=8))", ["config.model.atention", "model.attention"]),
        ("config.optimizer.lr = 1e-3", ["config.optimizer.lr=0.001", "did you mean optimizer.learning_rate"]),
        ("config.evaluation.throughput.batch = (1,)", ["evaluation.throughput.batch", "evaluation.throughput.batches"]),
        ("config.optimizer = 3", ["mine.py", "optimizer", "ConfigDict"]),
        ("config.training = ConfigDict(dict(nan=ConfigDict()))", ["config.training.nan={}: must be one of 'stop'"]),
        ("config.model.attention.heads = 5", ["config.model.attention.heads=5: must be a divisor of model.width=128"]),
        ("config.model.attention.heads = 'four'", ["mine.py", "four"]),
        ("config.model.mlp.hidden = -1", ["config.model.mlp.hidden=-1: must be at least 0"]),
        ("config.model.pattern = 'attention+mpl'", ["config.model.pattern='attention+mpl'", "did you mean 'mlp'"]),
        ("config.model.transformer.heads = 5", ["mine.py", "transformer"]),
        ("return None", ["mine.py", "must return a ConfigDict"]),
    ],
)
def test_mistakes_in_a_users_config_are_one_line(tmp_path, capsys, line, words):
    assert call(tmp_path, OLD.format(line=line)) == (1,)
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1 and "Traceback" not in text
    assert all(word in text for word in words), text


def test_options_that_nobody_declares_are_left_to_the_branch(tmp_path, monkeypatch):
    monkeypatch.setitem(BRANCHES, "ema", "seqmodels.mixers.mamba:Mamba")
    line = "config.model.pattern = 'ema+mlp'; config.model.ema = ConfigDict(dict(rate=0.5))"
    status, config = call(tmp_path, OLD.format(line=line), "--config.model.ema.rate=0.25")
    assert status == 0 and config.model.ema.rate == 0.25
    assert "  --config.model.ema.rate=0.25" in list(describe(config, 80))


@pytest.mark.parametrize("columns", [60, 100])
@pytest.mark.parametrize(
    "config", [densemamba.get_config(), transformer.get_config(), synthetic.get_config("mqar")], ids=lambda c: c.name
)
def test_help_says_value_meaning_and_what_is_allowed(config, columns):
    lines = list(describe(config, columns))
    for name, value in cli.fields(config):
        (line,) = (line for line in lines if line.startswith(f"  --config.{name}="))
        assert line.split("=", 1)[1].strip("'") == str(value)
    assert all(len(line) <= columns for line in lines if not line.startswith("  --config"))
    text = " ".join("\n".join(lines).split())
    for field in declared_fields(config).values():
        assert field.meaning in text and (not field.allowed.words or field.allowed.words in text)


# Names of trials


def test_fields_that_are_added_rename_no_trial(tmp_path):
    """A trial is named after what the config file says; not after what it says nothing about, at its default."""
    (tmp_path / "mine.py").write_text(OLD.format(line=""))
    spec = f"{tmp_path}/mine.py"
    written, loaded = cli.written_config(spec), cli.load_config(spec)
    name = identify(loaded, written)
    fewer = cli.written_config(spec).unlock()
    del fewer.model["bias"], fewer.optimizer["groups"], fewer.model["horizon"]  # as base() was before
    assert identify(upgrade(fewer), fewer) == name
    for field, value in {"model.bias": True, "model.attention.window": 8, "model.mlp.gated": False}.items():
        changed = cli.load_config(spec)
        changed.update_from_flattened_dict({field: value})
        assert identify(changed, written) != name
    trials = define(spec, loaded, "ablation", 1, tmp_path)
    assert trials[0].id == name != trials[1].id


def test_a_trial_may_bring_in_a_branch(tmp_path):
    text = OLD.format(line="") + '    add({"model.pattern": "gla+mlp", "model.gla.heads": 8})\n'
    (tmp_path / "mine.py").write_text(text)
    spec = f"{tmp_path}/mine.py"
    trial = define(spec, cli.load_config(spec), "ablation", 1, tmp_path)[-1]
    flags = [word for word in trial.commands["train"] if word.startswith("--config.")]
    assert sorted(flags) == ["--config.model.gla.heads=8", "--config.model.pattern=gla+mlp"]
    assert mamba.get_config().model.get("gla") is None


def trial_lines():
    """Lines of tests/golden/trials.txt by config and preset. Those of a small preset are a quick test, others slow."""
    found = {}
    for line in trials.FILE.read_text().splitlines():
        found.setdefault(line.split()[0], []).append(line)
    return [
        pytest.param(
            spec, lines, marks=() if spec.endswith(".py") or spec.endswith(":mqar") else pytest.mark.slow, id=spec
        )
        for spec, lines in found.items()
    ]


@pytest.mark.parametrize("spec, before", trial_lines())
def test_trials_of_every_sweep_are_called_as_they_were(spec, before):
    assert list(trials.lines(spec)) == before, (
        "a half-done sweep would begin anew: see identify in sweeps/definition.py"
    )


def test_every_preset_with_a_sweep_has_golden_trials():
    assert {line.split()[0] for line in trials.FILE.read_text().splitlines()} == set(trials.specs())
