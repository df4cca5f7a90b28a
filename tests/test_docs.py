"""The mixer that docs/mixers.md adds: followed word by word in a copy of the project, it works like any other."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "mixers.md").read_text()
SMALL = ["--config.seq_len=32", "--config.batch_size=4", "--config.model.width=16", "--config.model.repeats=1",
         "--config.evaluation.limit=8", "--config.sample.tokens=4"]  # fmt: skip


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The project with the page's two files, and its line in the table."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("configs", "kernels", "seqmodels", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "fixtures")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    for name in ("train.py", "eval.py", "sweep.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    mixer, config = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    (folder / "seqmodels" / "mixers" / "ema.py").write_text(mixer)
    (folder / "configs" / "ema.py").write_text(config)
    line = re.search(r'^ +"ema": .*\n', TEXT, re.MULTILINE)[0]
    table = folder / "seqmodels" / "branches.py"
    before, brace, after = table.read_text().partition("BRANCHES = Table(\n    {\n")
    table.write_text(before + brace + line + after)
    return folder


# Commands one after the other, each as it would be typed; a process for all of them imports the libraries once.
COMMANDS = """
import json, runpy, sys
for command in json.loads(sys.argv[1]):
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as error:
        if error.code:
            raise
    print("the next command", flush=True)
"""


def run(folder, *command):
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_mixer_trains_evaluates_continues_a_prompt_and_sweeps(copy):
    train = ["train.py", "--config=configs/ema.py", *SMALL]
    evaluate = ["eval.py", "--workdir=runs/ema", "--prompt=To be", "--tokens=5"]
    sweep = ["sweep.py", "--config=configs/ema.py", "--evals=none", "--config.steps=2", *SMALL]
    commands = [[*train, "--config.steps=10"], [*train, "--config.steps=12"], evaluate, sweep]
    trained, resumed, continued, swept, _ = run(copy, "-c", COMMANDS, json.dumps(commands)).split("the next command\n")
    assert "trained 10 steps" in trained
    assert "resuming runs/ema after step 10" in resumed
    assert continued.startswith("To be")
    assert "2 of 2 trials done" in swept


@pytest.mark.slow
def test_the_mixer_is_tested_by_the_contract(copy):
    tests = ["causal", "pieces", "packed", "padding and interior", "state", "bfloat16", "sharded"]
    chosen = "ema and not bi and (" + " or ".join(f"({test})" for test in tests) + ")"
    out = run(copy, "-m", "pytest", "-vv", "-p", "no:cacheprovider", "tests/test_branches.py", "-k", chosen)
    assert len(re.findall(r"PASSED", out)) >= 8, out
