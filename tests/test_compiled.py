"""The cache of compiled programs, and the environment that make installs."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

from seqmodels import compiled

ROOT = Path(__file__).parents[1]
PROGRAM = """
import jax
from seqmodels import compiled

compiled.use()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
count = lambda: sum(path.is_file() for path in compiled.folder().iterdir())
for number, context in enumerate((None, compiled.paused(), None)):
    before = count()
    program = jax.jit(lambda x: x * number + 1).lower(1.0)
    if context:
        with context:
            program.compile()
    else:
        program.compile()
    print(count() - before)
"""


def test_programs_are_kept_unless_paused(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "0", "1"], done.stderr


def test_the_oldest_programs_go_first(tmp_path):
    for number, name in enumerate("abc"):
        (tmp_path / name).write_bytes(b"x" * 10)
        os.utime(tmp_path / name, (number, number))
    compiled.trim(tmp_path, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c"]


def test_make_installs_the_requirements_that_are_named(tmp_path):
    """A stub in place of the environment's Python writes down what it is asked for."""
    log, python = tmp_path / "log", tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    python.chmod(python.stat().st_mode | stat.S_IEXEC)
    (tmp_path / "venv" / ".installed").touch()  # by an earlier version, long ago

    def asked(*arguments):
        log.unlink(missing_ok=True)
        time.sleep(0.05)  # make compares times of files, and a file system's clock ticks every few milliseconds
        subprocess.run(["make", "train", f"VENV={tmp_path / 'venv'}", *arguments], cwd=ROOT, check=True, stdout=-3)
        return [line.split()[-1] for line in log.read_text().splitlines()]

    train, gpu = "--workdir=runs/densemamba", "requirements-gpu.txt"
    assert asked() == ["requirements.txt", train]
    assert asked() == [train]
    assert asked(f"REQUIREMENTS={gpu}") == [gpu, train]
    assert asked(f"REQUIREMENTS={gpu}") == [train]
    assert asked() == ["requirements.txt", train]
