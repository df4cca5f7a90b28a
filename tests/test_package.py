"""The package: its requirements, its version, what an installation holds, and that it works from any directory."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import seqmodels
from seqmodels import cli, scripts
from seqmodels.errors import UserError

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pinned(name: str) -> list[Requirement]:
    """The requirements of a file, without those that it includes."""
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("-r")]


@pytest.mark.smoke
@pytest.mark.parametrize(
    "file, ranges",
    [
        ("requirements.txt", PROJECT["dependencies"]),
        *((f"requirements-{extra}.txt", PROJECT["optional-dependencies"][extra])
          for extra in ("gpu", "tpu", "eval", "docs", "test")),
    ],
)  # fmt: skip
def test_requirements_files_pin_what_the_package_asks_for(file, ranges):
    ranges = {canonicalize_name(each.name): each for each in map(Requirement, ranges)}
    pins = pinned(file)
    assert {canonicalize_name(pin.name) for pin in pins} == set(ranges)
    for pin in pins:
        asked = ranges[canonicalize_name(pin.name)]
        (only,) = pin.specifier
        assert only.operator == "==" and asked.specifier.contains(only.version), f"{pin} is not {asked}"
        assert asked.extras == pin.extras
        if asked.marker:  # of Python's version; jax, flax and numpy have a pin for each
            assert str(asked.marker) == str(pin.marker)


def test_python_and_version_are_said_alike_everywhere():
    assert PROJECT["requires-python"] == ">=3.11" and sys.version_info >= (3, 11)
    (cited,) = re.findall("^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    changes = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert cited == changes[0] == seqmodels.__version__


# Commands


@pytest.mark.smoke
def test_configs_of_the_package_are_known_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no folder configs/ is
    assert {"mamba", "densemamba", "transformer"} <= set(cli.builtin_configs())
    assert not {"base", "trials", "__init__"} & set(cli.builtin_configs())
    assert cli.load_config("densemamba:25m").to_json() == cli.load_config(f"{ROOT}/configs/densemamba.py:25m").to_json()
    for spec, guess in (("densemambo", "densemamba"), ("configs/mamba.py", "mamba"), ("mamba2:1b", "1.3b")):
        with pytest.raises(UserError, match=f"--config={spec}: .*did you mean .*{guess}"):
            cli.load_config(spec)


def test_a_file_goes_before_a_config_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mamba.py").write_text("from seqmodels.configs.retnet import get_config")
    assert cli.load_config("mamba.py").name == "retnet" and cli.load_config("mamba").name == "mamba"


def test_help_names_the_command_that_was_typed(monkeypatch):
    text = "python train.py --config=configs/densemamba.py, then python eval.py --workdir=runs/densemamba"
    assert scripts.as_typed(text, ["train.py"]) == text
    installed = "seqmodels-train --config=densemamba, then seqmodels-eval --workdir=runs/densemamba"
    assert scripts.as_typed(text, ["/usr/bin/seqmodels-train"]) == installed
    assert scripts.command_line(["sweep.py", "--seeds=2", "--out=a b"]) == "python sweep.py --seeds=2 '--out=a b'"
    assert scripts.command_line(["/usr/bin/seqmodels-sweep", "--seeds=2"]) == "seqmodels-sweep --seeds=2"
    monkeypatch.setattr(scripts, "CHECKOUT", None)  # python -m seqmodels.scripts.sweep
    assert scripts.command_line(["/lib/seqmodels/scripts/sweep.py", "--seeds=2"]) == "seqmodels-sweep --seeds=2"


# Installation


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An environment in which the package is installed, and which borrows all else from this one: no network."""
    folder = tmp_path_factory.mktemp("package")
    source, environment = folder / "source", folder / "environment"
    source.mkdir()
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("seqmodels", "kernels", "configs", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    (packages(environment) / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-build-isolation", source]
    process = subprocess.run(install, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return environment


def packages(environment: Path) -> Path:
    (folder,) = environment.glob("lib/python3*/site-packages")
    return folder


def run(environment: Path, folder: Path, *command: str) -> str:
    """What a command of the environment says in an empty folder. Warnings and the flags of the tests are not its."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    command = (str(environment / "bin" / command[0]), *command[1:])
    process = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.mark.slow
def test_installation_holds_the_package_and_nothing_else(installed):
    (record,) = packages(installed).glob("seqmodels-*.dist-info/RECORD")
    files = {row[0] for row in csv.reader(record.read_text().splitlines())}
    assert {file.split("/")[0] for file in files} == {"..", "seqmodels", record.parent.name}
    commands = {file.rpartition("/")[2] for file in files if file.startswith("..")}
    assert commands == {f"seqmodels-{name}" for name in ("train", "eval", "sweep", "convert")}

    def ours(folder: Path) -> set[str]:
        paths = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        return {str(Path("seqmodels", path.relative_to(ROOT / "seqmodels"))) for path in paths}

    links = (ROOT / "seqmodels" / "kernels", ROOT / "seqmodels" / "configs")
    expected = set().union(*map(ours, (ROOT / "seqmodels", *links)))
    installed_files = {file for file in files if file.startswith("seqmodels/") and not file.endswith(".pyc")}
    assert installed_files == expected and "seqmodels/py.typed" in expected
    assert f"{record.parent.name}/licenses/LICENSE" in files


@pytest.mark.slow
def test_the_readme_s_script_trains_from_an_empty_directory(installed, tmp_path):
    (script,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert "steps=10)" in script
    small = "steps=10, **{'model.width': 16, 'model.repeats': 1})"
    (tmp_path / "script.py").write_text(script.replace("steps=10)", small))
    said = run(installed, tmp_path, "python", "script.py")
    (loss,) = re.findall(r"^\d\.\d+$", said, re.MULTILINE)
    assert "trained 10 steps" in said and 2 < float(loss) < 7  # nats a byte: at random 5.5
    assert "(6, 257) ['0.mixer']" in said


@pytest.mark.slow
def test_the_commands_of_an_installation(installed, tmp_path):
    assert "seqmodels-train --config=densemamba" in run(installed, tmp_path, "seqmodels-train", "--help")
    assert "seqmodels-eval --workdir=runs/densemamba" in run(installed, tmp_path, "seqmodels-eval", "--help")
    line = "python -m seqmodels.scripts.train --config=densemamba "
    sweep = ("--config=densemamba", "--sweep=miniature", "--out=out")
    assert run(installed, tmp_path, "seqmodels-sweep", *sweep, "--engine=print").count(line) == 2
    where = "import json, seqmodels; print(json.dumps([seqmodels.__version__, seqmodels.__file__]))"
    version, file = json.loads(run(installed, tmp_path, "python", "-c", where))
    assert version == seqmodels.__version__ and Path(file).is_relative_to(installed)
