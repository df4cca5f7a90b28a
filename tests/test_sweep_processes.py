"""A sweep of fake trials goes through kill -9, a full disk, divergence and company, and its results stay right."""

import contextlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from seqmodels.claim import Claim, claimed
from tests.sweep_fakes import ROOT, Fakes, wait_for

pytestmark = pytest.mark.slow

SLOW = {"FAKE_STEP": "0.05"}


def once_each(fakes: Fakes, trials: int) -> None:
    started = [call["id"] for call in fakes.calls()]
    assert sorted(started) == sorted(set(started)) and len(started) == trials


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_runs_each_trial_once_and_again_nothing(tmp_path):
    fakes = Fakes(tmp_path, ("fine", "better"))
    out = fakes.run("--seeds=2", "--parallel=2")
    assert "4 of 4 trials done" in out
    once_each(fakes, 4)
    fakes.check_done(("fine", "better"), seeds=2)
    before = (fakes.out / "results.csv").read_bytes()
    fakes.run("--seeds=2")
    once_each(fakes, 4)
    assert (fakes.out / "results.csv").read_bytes() == before
    fakes.run("--seeds=3", SEQMODELS_COMMIT="abcdef0")  # more seeds are more trials
    once_each(fakes, 6)
    fakes.check_done(("fine", "better"), seeds=3)
    assert {call["cache"] for call in fakes.calls()} == {f"out/compiled/{socket.gethostname()}"}
    record = json.loads((fakes.out / "trials" / fakes.rows()[0]["id"] / "trial.json").read_text())
    assert record["device"] == "1 x fake (cpu)" and record["attempts"] == 1 and record["exit"] == 0
    record = json.loads((fakes.out / "trials" / fakes.rows()[2]["id"] / "trial.json").read_text())
    assert record["overrides"]["seed"] == 2 and record["commit"] == "abcdef0"


def test_other_evaluators_are_run_on_what_is_trained(tmp_path):
    fakes = Fakes(tmp_path, ("fine", "better"))
    fakes.run("--evals=none")
    assert all("eval.recall.64.accuracy" not in row and row["status"] == "done" for row in fakes.rows())
    assert not list(fakes.out.glob("trials/*/eval.json"))
    fakes.run("--evals=perplexity")
    fakes.check_done(("fine", "better"))
    for path in fakes.out.glob("trials/*/eval.json"):
        assert json.loads(path.read_text())["evals"] == "perplexity"
    started = len(fakes.calls())
    fakes.run("--evals=none")
    assert len(fakes.calls()) == started == 2  # what is trained is not trained again
    path = next(fakes.out.glob("trials/*/trial.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "interrupted"}))  # in its evaluation
    fakes.run("--evals=none", "--engine=none")
    fakes.check_done(("fine", "better"))


def test_the_first_seed_of_every_trial_comes_before_the_second_of_any(tmp_path):
    fakes = Fakes(tmp_path, ("fine", "better"))
    fakes.run("--seeds=2", "--evals=none")
    seeds = {row["id"]: row["seed"] for row in fakes.rows()}
    assert [seeds[call["id"]] for call in fakes.calls()] == ["0", "0", "1", "1"]


def test_killed_sweep_leaves_its_trial_alone_and_goes_on(tmp_path):
    """kill -9 of the sweep only: the trial under way runs on, nobody runs it beside, and its work is not lost."""
    fakes = Fakes(tmp_path, ("fine", "better"))
    process = fakes.start(**SLOW)
    (workdir,) = fakes.await_step(3)
    process.kill()
    process.communicate()
    assert claimed(workdir / "trial.lock")  # by the trial itself
    assert not (fakes.out / "results.csv").exists()
    fakes.run()
    fakes.check_done(("fine", "better"))
    first = [call for call in fakes.calls() if call["id"] == workdir.name]
    assert len(first) == 1  # what it left is trained, and only evaluated
    assert len(fakes.calls()) == 2


def test_killed_sweep_and_trials_are_resumed(tmp_path):
    fakes = Fakes(tmp_path, ("fine", "better"))
    process = fakes.start("--parallel=2", **SLOW)
    workdirs = fakes.await_step(5, number=2)
    kill(process.pid)
    for call in fakes.calls():
        kill(call["pid"])
    process.communicate()
    stale = [json.loads((workdir / "trial.json").read_text())["status"] for workdir in workdirs]
    assert stale == ["running", "running"]
    wait_for(lambda: not any(claimed(workdir / "trial.lock") for workdir in workdirs))
    fakes.run("--parallel=2")
    fakes.check_done(("fine", "better"))
    assert len(fakes.calls()) == 4


def test_killed_trial_is_resumed_by_the_same_sweep(tmp_path):
    fakes = Fakes(tmp_path, ("fine", "better"))
    process = fakes.start(**SLOW)
    fakes.await_step(5)
    kill(fakes.calls()[0]["pid"])
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    assert "attempt 2" in out
    fakes.check_done(("fine", "better"))
    assert len(fakes.calls()) == 3
    workdir = fakes.out / "trials" / fakes.calls()[0]["id"]
    assert "=== interrupted: signal 9" in (workdir / "trial.log").read_text()
    assert json.loads((workdir / "trial.json").read_text())["attempts"] == 2


def test_full_disk_of_one_trial_is_its_own_affair(tmp_path):
    fakes = Fakes(tmp_path, ("fine", "full disk", "better"))
    out = fakes.run(status=1)
    assert "2 of 3 trials done" in out and "No space left on device" in out
    fine, full, better = fakes.rows()
    assert (fine["status"], full["status"], better["status"]) == ("done", "failed", "done")
    assert full["steps_done"] == "1" and full["validation.loss"] == "" and full["train_loss"] == ""
    log = (fakes.out / "trials" / full["id"] / "trial.log").read_text()
    assert "No space left on device" in log
    for report in ("report.md", "report.html"):
        assert "No space left on device" in (fakes.out / report).read_text()
    fakes.run(status=1)  # a failed one is not run again
    assert len(fakes.calls()) == 3
    fakes.run("--retry", status=1)  # unless that is asked for
    assert len(fakes.calls()) == 4
    assert len((fakes.out / "trials" / full["id"] / "trial.log").read_text()) > len(log)  # both are kept


def test_full_disk_under_the_record_of_a_trial(tmp_path):
    """The sweep itself cannot write trial.json: it says so, goes on with the others, and another time is as good."""
    fakes = Fakes(tmp_path, ("fine", "better"))
    lines = fakes.run("--engine=print").splitlines()  # they name the directories
    workdir = fakes.folder / lines[0].split("--workdir=")[1].split(" ")[0]
    workdir.mkdir(parents=True)
    (workdir / "trial.json.tmp").symlink_to("/dev/full")
    out = fakes.run(status=1)
    assert "1 of 2 trials done" in out and "No space left on device" in out
    assert [row["status"] for row in fakes.rows()] == ["failed", "done"]
    (workdir / "trial.json.tmp").unlink()
    fakes.run()
    fakes.check_done(("fine", "better"))


def test_full_disk_under_the_results_leaves_the_old_ones(tmp_path):
    fakes = Fakes(tmp_path, ("fine", "better"))
    fakes.run()
    before = (fakes.out / "results.csv").read_bytes()
    (fakes.out / "results.csv.tmp").symlink_to("/dev/full")
    out = fakes.run("--seeds=2", status=1)
    assert "error: --out=out: cannot write the report (No space left on device)" in out
    assert (fakes.out / "results.csv").read_bytes() == before
    (fakes.out / "results.csv.tmp").unlink()
    fakes.run("--seeds=2")
    fakes.check_done(("fine", "better"), seeds=2)
    once_each(fakes, 4)


def test_diverged_trial_is_said_to_be(tmp_path):
    fakes = Fakes(tmp_path, ("diverges", "fine"))
    out = fakes.run("--seeds=2", status=1)
    assert "diverged" in out and "loss is nan at step 7" in out
    assert [row["status"] for row in fakes.rows()] == ["diverged", "diverged", "done", "done"]
    assert [row["validation.loss"] for row in fakes.rows()] == ["", "", "4.0", "4.125"]
    assert "| 1 | sample.prompt" not in (fakes.out / "report.md").read_text()  # the name is as short as it can be
    assert "| 1 | prompt=diverges | 0 of 2 |" in (fakes.out / "report.md").read_text()


def test_preempted_trials_are_retried_but_not_for_ever(tmp_path):
    fakes = Fakes(tmp_path, ("preempted once", "always preempted"))
    out = fakes.run(status=1)
    assert "1 of 2 trials done" in out
    once, always = fakes.rows()
    assert (once["status"], always["status"]) == ("done", "preempted")
    starts = [call["id"] for call in fakes.calls()]
    assert starts.count(once["id"]) == 2 and starts.count(always["id"]) == 4
    fakes.run(status=1)  # and again the next time, from where it is
    assert [call["id"] for call in fakes.calls()].count(always["id"]) == 8


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_sweep_stops_its_trials_after_a_checkpoint(tmp_path, number):
    fakes = Fakes(tmp_path, ("fine", "better"))
    process = fakes.start(**SLOW)
    fakes.await_step(3)
    os.killpg(process.pid, number)  # as a terminal does
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and "the same command goes on" in err and "Traceback" not in err
    assert [row["status"] for row in fakes.rows()] == ["preempted", "waiting"]
    fakes.run()
    fakes.check_done(("fine", "better"))


def test_two_processes_share_a_sweep(tmp_path):
    behaviours = ("a", "bb", "ccc", "dddd", "eeeee", "ffffff")
    fakes = Fakes(tmp_path, behaviours)
    processes = [fakes.start("--parallel=2", FAKE_STEP="0.01") for _ in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, out + err
        assert "6 of 6 trials done" in out  # also of those that the other did
    once_each(fakes, 6)
    fakes.check_done(behaviours)


def test_failed_trial_is_retried_by_one_of_two_processes(tmp_path):
    fakes = Fakes(tmp_path, ("full disk", "diverges"))
    fakes.run(status=1)
    processes = [fakes.start("--retry") for _ in range(2)]
    for process in processes:
        process.communicate(timeout=120)
        assert process.returncode == 1
    assert len(fakes.calls()) <= 6 and len(fakes.calls()) >= 4


def test_printed_commands_are_the_trials(tmp_path):
    fakes = Fakes(tmp_path, ("it's fine", "better"))
    lines = fakes.run("--engine=print", "--seeds=2").splitlines()
    assert len(lines) == 4 and not fakes.calls() and not fakes.out.exists()
    for line in lines:
        subprocess.run(["bash", "-c", line], cwd=fakes.folder, check=True, env=os.environ | {"PATH": path_of_python()})
    once_each(fakes, 4)
    assert fakes.run("--engine=print", "--seeds=2") == ""
    fakes.run("--seeds=2")  # only gathers
    once_each(fakes, 4)
    fakes.check_done(("it's fine", "better"), seeds=2)


def test_report_of_what_is_there(tmp_path):
    """Of more seeds than were run: nothing is started, and what is not done is said."""
    fakes = Fakes(tmp_path, ("fine", "better"))
    fakes.run()
    begun = len(fakes.calls())
    fakes.run("--engine=none", "--seeds=2", status=1)
    assert len(fakes.calls()) == begun == 2
    assert [row["status"] for row in fakes.rows()] == ["done", "waiting", "done", "waiting"]
    report = (fakes.out / "report.md").read_text()
    assert "1 of 2" in report and "## Not done" in report and "--engine=none --seeds=2" in report


def path_of_python() -> str:
    return os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]


def test_table_on_a_terminal(tmp_path):
    """What rich draws: the counts, and a line a trial."""
    fakes = Fakes(tmp_path, ("fine", "diverges"))
    terminal, its = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "driver.py", "--config=fake.py", "--out=out"],
        cwd=fakes.folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "120", "LINES": "30", **SLOW},
        stdout=its,
        stderr=its,
    )
    os.close(its)
    seen = b""
    with contextlib.suppress(OSError):  # the terminal is closed
        while piece := os.read(terminal, 1 << 16):
            seen += piece
    os.close(terminal)
    assert process.wait() == 1
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    assert "1 running, 1 waiting" in text and "1 diverged, 1 done" in text
    assert re.search(r"prompt=fine +running \(train\) +\d+/40 +\d\.\d{4} +160 ", text)
    assert re.search(r"prompt=diverges +diverged +7/40 ", text)


# Devices


def test_gpus_are_pinned_and_not_shared(tmp_path):
    """Two sweeps on a host of two GPUs: four trials at once would need four."""
    behaviours = ("a", "bb", "ccc", "dddd")
    gpus = {"CUDA_VISIBLE_DEVICES": "3,GPU-5", "JAX_PLATFORMS": "", "TMPDIR": str(tmp_path), **SLOW}
    fakes = Fakes(tmp_path, behaviours)
    processes = [fakes.start(**gpus) for _ in range(2)]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, out + err
    calls = sorted(fakes.calls(), key=lambda call: call["began"])
    assert {call["cuda"] for call in calls} == {"3", "GPU-5"} and len(calls) == 4
    for one, another in zip(calls, calls[2:], strict=False):  # 40 steps of 0.05 s each
        assert another["began"] - one["began"] > 1.9
    assert "--parallel=3" in fakes.run("--parallel=3", status=1, **gpus)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no affinities")
def test_cores_are_divided(tmp_path):
    fakes = Fakes(tmp_path, ("a", "bb"))
    fakes.run("--parallel=2", **SLOW)
    there = os.sched_getaffinity(0)
    first, second = (set(call["cores"]) for call in fakes.calls())
    if len(there) > 1:
        assert not first & second
    assert first | second == there


# Claims


def test_claim_of_a_dead_process_is_free(tmp_path):
    path = tmp_path / "lock"
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path; from seqmodels.claim import Claim\n"
            "claim = Claim.take(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)",
            str(path),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    assert Claim.take(path) is None and claimed(path)
    holder.kill()
    holder.communicate()
    claim = Claim.take(path)
    assert claim and claimed(path)
    claim.release()
    assert path.exists() and not claimed(path)


def test_claim_lasts_as_long_as_the_child_that_inherits_it(tmp_path):
    path = tmp_path / "lock"
    claim = Claim.take(path)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[claim.descriptor])
    claim.release()
    time.sleep(0.05)
    assert Claim.take(path) is None
    child.communicate(b"\n")
    assert not claimed(path)
