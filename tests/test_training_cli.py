"""The command line: what is wrong is said in one line, with the nearest right thing, and exit status 1."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from seqmodels import cli

ROOT = Path(__file__).parent.parent
MAMBA = f"--config={ROOT}/configs/mamba.py"


def call(*argv, main=lambda values: None):
    def define(values, argv):
        cli.define_config(values, argv)
        flags.DEFINE_string("workdir", None, "Where to.", flag_values=values)

    return cli.run(main, define, "What it does.", ["train.py", *argv])


def config_of(*argv):
    seen = {}
    assert call(*argv, main=lambda values: seen.update(config=values.config, workdir=values.workdir)) == 0
    return seen["config"]


@pytest.mark.smoke
def test_overrides_of_every_type():
    config = config_of(
        MAMBA, "--config.steps=7", "--config.optimizer.learning_rate=1", "--config.training.bptt=True",
        "--config.data.name=text", "--config.evaluation.lengths=(1, 8)", "--config.mesh.data", "2",
    )  # fmt: skip
    assert (config.steps, config.optimizer.learning_rate, config.training.bptt) == (7, 1.0, True)
    assert (config.data.name, config.evaluation.lengths, config.mesh.data) == ("text", (1, 8), 2)
    assert config.is_locked


def test_overrides_may_come_first_and_the_last_config_counts():
    config = config_of("--config.steps=3", MAMBA, "--config", f"{ROOT}/configs/transformer.py")
    assert config.steps == 3 and config.name == "transformer"


def test_preset_and_workdir():
    config = config_of(MAMBA + ":130m", "--workdir=x")
    assert config.model.width == 768 and config.name == "mamba-130m"


@pytest.mark.smoke
@pytest.mark.parametrize(
    "argv, words",
    [
        ([MAMBA, "--config.stepz=3"], ["config.stepz", "did you mean", "steps"]),
        ([MAMBA, "--config.optimizer.warmpu=3"], ["optimizer.warmpu", "optimizer.warmup"]),
        ([MAMBA, "--config.learning_rate=3"], ["learning_rate", "did you mean optimizer.learning_rate"]),
        ([MAMBA, "--config.optimizer=3"], ["config.optimizer is a group", "optimizer.learning_rate"]),
        ([MAMBA, "--config.steps=many"], ["config.steps", "many"]),
        ([MAMBA, "--config.steps=1.5"], ["config.steps", "1.5"]),
        ([MAMBA + ":131m"], ["131m", "130m"]),
        ([f"--config={ROOT}/configs/mmaba.py"], ["no file", "mamba.py"]),
        ([f"--config={ROOT}/README.nothing"], ["no file"]),
        ([f"--config={ROOT}/train.py"], ["does not define get_config"]),
        (["--config.steps=3"], ["--config is missing"]),
        ([MAMBA, "--workdri=x"], ["workdri", "workdir"]),
        ([MAMBA, "runs/x"], ["runs/x", "--name=value"]),
    ],
)
def test_mistakes(argv, words, capsys):
    assert call(*argv) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert all(word in err for word in words), err


def test_help_lists_flags_and_fields(capsys):
    assert call("--help") == 0
    assert "What it does." in (text := capsys.readouterr().out) and "--workdir" in text and "Add --config=FILE" in text
    assert call("--help", MAMBA) == 0
    assert "--config.optimizer.learning_rate=" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "--config is missing"),
        (["--config=configs/mamba.py", "--config.mesh.data=3"], "mesh asks for 3 devices"),
        (["--config=configs/mamba.py", "--config.platform=gpu"], "config.platform=gpu"),
        (["--config=configs/mamba.py", "--config.optimizer.schedule=linear"], "optimizer.schedule"),
        (["--config=configs/mamba.py", "--config.data.name=text", "--config.data.path=nowhere/*.txt"], "nowhere"),
    ],
)
def test_train_says_it_in_one_line(argv, words, tmp_path):
    command = [sys.executable, "train.py", *argv, f"--workdir={tmp_path / 'run'}"]
    if argv:
        command.append(f"--config.data.cache={tmp_path}")
    hidden = {"CUDA_VISIBLE_DEVICES": "", "ROCR_VISIBLE_DEVICES": ""}  # the machine may have what platform=gpu asks for
    process = subprocess.run(command, cwd=ROOT, env=os.environ | hidden, capture_output=True, text=True, timeout=300)
    assert process.returncode == 1 and words in process.stderr
    assert process.stderr.count("\n") == 1 and process.stderr.startswith("error: ")
    assert not (tmp_path / "run").exists()  # nothing begun, nothing lost


HEAD = """
from seqmodels.configs.base import base, finish
from seqmodels.configs.mamba import add_mamba

def get_config(arg=None):
    config = base()
    add_mamba(config)
"""


@pytest.mark.parametrize(
    "lines, words",
    [
        ("config.optimizer.learning_rte = 1e-2", ["mine.py:8", "learning_rte", "did you mean optimizer.learning_rate"]),
        ("config.modle.width = 3", ["mine.py:8", "no such field modle; did you mean model?"]),
        ("config.lock()\n    config.model.widht = 3", ["mine.py:9", "no such field widht; did you mean width?"]),
        ("config.model.mamba.sate = 3", ["mine.py:8", "model.mamba.sate=3", "did you mean model.mamba.state"]),
        ("config.model.width = 'wide'", ["mine.py:8", "width"]),
        ("config.model.width = widht", ["mine.py:8", "NameError: name 'widht' is not defined"]),
        ("config.model.width = = 3", ["mine.py:8", "invalid syntax"]),
        ("raise SystemExit('no')", ["mine.py:8", "SystemExit: no"]),
        ("import nonesuch", ["mine.py:8", "No module named 'nonesuch'"]),
        ("return 3", ["must return a ConfigDict"]),
    ],
)
def test_a_mistake_in_a_config_file_is_one_line_with_its_place(tmp_path, capsys, lines, words):
    """Kinds: tracebacks; misspelt fields in a user's own config."""
    (tmp_path / "mine.py").write_text(f"{HEAD}    {lines}\n    return config\n")
    assert call(f"--config={tmp_path}/mine.py") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --config=") and error.count("\n") == 1
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    "spec, words",
    [
        ("README.md", "is no config, which is a Python file"),
        ("configs", "is a folder"),
        ("configs/mambo.py", "did you mean configs/mamba.py"),
        ("", "there is no file"),
        ("x" * 5000, "is no file name"),
        ("a\x00b", "there is no file"),
    ],
)
def test_what_is_no_config_file_is_one_line(capsys, monkeypatch, spec, words):
    monkeypatch.chdir(ROOT)
    assert call(f"--config={spec}") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error, error
