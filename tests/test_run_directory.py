"""A run directory: one process at a time, directories that cannot be written, profiles, and ends that are no end."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from seqmodels import lock
from seqmodels.errors import UserError
from seqmodels.evals import run as evals_run
from seqmodels.scripts import eval as eval_script
from seqmodels.scripts import sweep as sweep_script
from seqmodels.sweeps.trial import Trial
from seqmodels.training import checkpoint, loop, metrics, profile, report, run
from tests.run_fixtures import tiny, write_text
from tests.run_processes import ROOT
from tests.training_model import small_config


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"), lines=40)


# Two processes on one run directory

HOLDER = """
import sys, time
from pathlib import Path
from seqmodels.claim import Claim
print(Claim.named(Path(sys.argv[1])), flush=True)
time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path, text):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    run.write_config(workdir, tiny(text))
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(workdir / "run.lock")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert "Claim" in holder.stdout.readline()
    with pytest.raises(UserError, match=rf"--workdir={workdir}: process {holder.pid} on \S+ trains in it"):
        loop.train(tiny(text), workdir)
    assert (workdir / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n'
    holder.kill()
    holder.communicate()
    with run.held(workdir), pytest.raises(UserError, match=f"process {os.getpid()} on"), run.held(workdir):
        pass
    with run.held(workdir):  # was released
        pass


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock, "lock_descriptor", refuse)
    with run.held(tmp_path / "run"):
        (tmp_path / "run" / "config.json").write_text("{}")
    assert "this file system has no locks; see to it that no other process trains there" in capsys.readouterr().err


def test_a_trial_that_is_trained_by_hand_is_left_alone(tmp_path):
    from seqmodels.sweeps.devices import Slot
    from seqmodels.sweeps.local import Workers

    trial = Trial("one", tmp_path / "one", {"seed": 0}, {"steps": 6}, {"train": ("python", "-c", "0")}, "none")
    with run.held(trial.workdir):
        Workers([trial], [Slot()], wait=False).run()
        assert trial.record()["status"] == "waiting"


# Directories


def under_a_file(folder):
    (folder / "file").write_text("")
    return folder / "file" / "run"


def link_to_nothing(folder):
    (folder / "link").symlink_to("gone")
    return folder / "link"


@pytest.mark.parametrize(
    "place, words",
    [
        (under_a_file, "Not a directory"),
        (link_to_nothing, "File exists, it is a link to gone"),
        (lambda folder: Path("/proc/run"), "No such file or directory|Permission denied"),
        (lambda folder: folder / ("x" * 300), "File name too long"),
    ],
    ids=["under a file", "a link to nothing", "/proc", "a long name"],
)
def test_directories_that_cannot_be_made_are_one_line(tmp_path, text, place, words):
    with pytest.raises(UserError, match=rf"--workdir=.*({words})"):
        loop.train(tiny(text), place(tmp_path))


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), ValueError("RESOURCE_EXHAUSTED: [No space left on device]")],
    ids=["OSError", "of TensorStore"],
)
def test_a_full_disk_is_one_line(tmp_path, text, monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(checkpoint.ocp.training.Checkpointer, "save_checkpointables_async", full)
    with pytest.raises(UserError, match=r"run/checkpoints: the checkpoint cannot be written \(No space left on device"):
        loop.train(tiny(text), tmp_path / "run")


def test_a_full_disk_under_the_metrics_is_one_line(tmp_path):
    config = small_config(metrics__tensorboard=False)
    writer = metrics.Metrics(tmp_path, 0, config)
    writer.close()

    class Full:
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    writer._file = Full()
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be written \(No space left on device"):
        writer.write(1, {"loss": 1.0})


def test_the_home_directory_is_expanded_everywhere(tmp_path, text, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{")
    for read in (
        lambda: loop.train(tiny(text, checkpoint__every=1), "~/file/run"),
        lambda: evals_run.load_run("~/run"),
        lambda: eval_script._out("~/run/config.json", tmp_path),
        lambda: sweep_script._of_comparison("~/sweep"),
    ):
        (tmp_path / "file").write_text("")
        (tmp_path / "sweep").mkdir(exist_ok=True)
        (tmp_path / "sweep" / "sweep.json").write_text("{}")
        with pytest.raises(UserError):
            read()
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("name", ["config.json", "summary.json", "metrics.jsonl", "x.png", "loss.json"])
def test_an_evaluation_replaces_no_other_file(tmp_path, name):
    with pytest.raises(UserError, match=r"--out=.*must be the name of a new \.json file"):
        eval_script._out(str(tmp_path / name), tmp_path)
    assert eval_script._out(str(tmp_path / "more.json"), tmp_path) == tmp_path / "more.json"


# Profiles


@pytest.mark.parametrize(
    "first, steps, traced",
    [(0, 20, [5, 6, 7]), (5, 20, [6, 7]), (6, 20, [7]), (7, 20, []), (0, 6, [5, 6]), (0, 5, [5]), (4, 20, [5, 6, 7])],
)
def test_a_profile_traces_what_is_left_of_its_steps(tmp_path, monkeypatch, first, steps, traced):
    """Its window is steps 5 to 7 of a run that goes on after `first`."""
    calls, said = [], []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    config = small_config(steps=steps, training__profile_start=5, training__profile_steps=3)
    window = profile.Profile(config, tmp_path, first, said.append)
    for step in range(first + 1, steps + 1):
        window.before(step, None)
        calls.append(step)
    window.close()
    if traced:
        assert calls[calls.index("start") + 1 : calls.index("stop")] == traced
        assert any(f"profile of {len(traced)} steps" in line for line in said)
    else:
        assert "start" not in calls and "there is no profile" in said[0]
    assert (len(said) == 2) == (first in (5, 6))  # a line says why it is shorter


def test_a_profile_that_cannot_be_written_ends_no_run(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no profiler")

    monkeypatch.setattr(jax.profiler, "start_trace", fail)
    said = []
    config = small_config(steps=9, training__profile_start=5, training__profile_steps=3)
    window = profile.Profile(config, tmp_path, 0, said.append)
    for step in range(1, 10):
        window.before(step, None)
    window.close()
    assert len(said) == 1 and "cannot start the profile" in said[0]


def test_a_profile_behind_the_last_step_is_refused(tmp_path, text):
    with pytest.raises(UserError, match=r"config\.training\.profile_start=7: must be at most steps=6"):
        loop.train(tiny(text, training__profile_start=7), tmp_path / "run")


# Ends that are no end


def strict(path):
    """JSON without NaN."""

    def refuse(name):
        raise AssertionError(f"{path} holds {name}")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_a_run_that_ends_without_finite_numbers_is_not_done(tmp_path, text):
    workdir, config = tmp_path / "run", tiny(text, training__nan="skip", optimizer__learning_rate=1e30, steps=5)
    config.optimizer.warmup = 0
    config.evals = "loss_by_position"
    for _ in range(2):  # the second time from summary.json
        with pytest.raises(UserError, match=r"the run is not done, the .* loss after 5 steps is not finite"):
            loop.train(config, workdir)
    summary = strict(workdir / "summary.json")
    strict(workdir / "eval.json")
    assert summary["status"] == "diverged" and summary["splits"]["validation"]["loss"] is None
    assert "nan" in report.result(report.read_summary(workdir))
    trial = Trial("run", workdir, {"seed": 0}, {"steps": 5}, {"train": ("python",)}, "none")
    assert not trial.trained()


def test_weights_that_are_not_finite_are_never_called_the_last_good_state(tmp_path, text):
    config = tiny(text, optimizer__learning_rate=1e30, optimizer__weight_decay=1e30, optimizer__schedule="constant")
    config.optimizer.warmup = 0
    words = r"loss is nan at step 2: the parameters are not finite after step 1, though its loss was; there is no chec"
    with pytest.raises(UserError, match=words):
        loop.train(config, tmp_path / "run")
    assert not checkpoint.steps(tmp_path / "run" / "checkpoints")


def test_no_checkpoint_is_named_that_is_not_there(tmp_path, text, monkeypatch):
    """The loss of the first step is not finite."""
    make = loop.make_train_step

    def broken(*arguments):
        step = make(*arguments)

        def nan(state, batch):
            _, metrics = step(state, batch)
            return state, metrics | {"loss": metrics["loss"] * float("nan")}

        return nan

    monkeypatch.setattr(loop, "make_train_step", broken)
    with pytest.raises(UserError, match=r"loss is nan at step 1, which the initial parameters gave.* nothing is saved"):
        loop.train(tiny(text), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


# Signals

WAITING = """
import {module}, time
from seqmodels import interrupt
interrupt.install()
print("ready", flush=True)
{call}
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "module, call",
    [("time", "time.sleep(60)"), ("hashlib", "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)")],
    ids=["asleep", "in one long call"],
)
def test_a_signal_ends_a_command_at_once_with_one_line(module, call, number):
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING.format(module=module, call=call)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdout.readline()
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert err.strip() == f"{number.name}: stopped"


COMMANDS = {
    "train": ["train.py", "--config=mamba", "--workdir={folder}/run", "--config.data.cache={folder}/cache"],
    "eval": ["eval.py", "--workdir=tests/fixtures/first_wave/densemamba"],
    "a module": ["-m", "seqmodels.scripts.train", "--config=mamba", "--config.data.cache={folder}/cache"],
    "sweep": ["sweep.py", "--config=mamba", "--out={folder}/sweep"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("seconds", [0, 0.2, 1, 3])
def test_a_signal_at_the_start_of_a_command(tmp_path, name, seconds):
    import time

    arguments = [argument.format(folder=tmp_path) for argument in COMMANDS[name]]
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not caught(process.pid, signal.SIGTERM):
        time.sleep(0.001)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert "Traceback" not in err
    assert process.returncode in (130, 75) or (name == "eval" and process.returncode == 1), err


def caught(pid, number):
    """Whether a process has a handler for a signal."""
    lines = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(lines["SigCgt"], 16) >> (number - 1) & 1
