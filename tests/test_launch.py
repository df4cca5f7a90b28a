"""Jobs of several processes on this host, of a script in place of train.py."""

import signal
import subprocess
import sys
import time

import pytest

from seqmodels import launch
from seqmodels.configs import mamba
from seqmodels.errors import UserError
from seqmodels.sweeps.definition import define
from tests.run_processes import ROOT

SCRIPT = """
import os, pathlib, signal, sys, time
folder, index = pathlib.Path(sys.argv[1]), os.environ["JAX_PROCESS_ID"]
(folder / index).write_text(" ".join([os.environ["JAX_NUM_PROCESSES"], *sys.argv[2:]]))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
time.sleep(30 if "wait" in sys.argv else 0)
"""

STARTING = """
import os, signal, subprocess, sys
from seqmodels import launch

class Process:
    def __init__(self, command, env, **_):
        self.index = env["JAX_PROCESS_ID"]
        if self.index == "0":
            os.kill(os.getpid(), signal.SIGTERM)

    def send_signal(self, number):
        print(self.index, int(number))

    def wait(self):
        return 75

subprocess.Popen = Process
sys.exit(launch.run(2, ["train.py"]))
"""


def test_processes_are_started_and_told_of_signals(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "seqmodels.launch", "3", str(tmp_path / "script.py"), str(tmp_path), "wait"]
    job = subprocess.Popen(command, cwd=ROOT)
    until = time.monotonic() + 60
    while len([name for name in "012" if (tmp_path / name).exists()]) < 3 and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.3)  # they have yet to take the signal over
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 75
    assert {(tmp_path / name).read_text() for name in "012"} == {"3 wait --distributed"}


def test_a_signal_while_processes_start_reaches_those_that_start_later():
    """In a process of its own, as the command is: other threads would take the signal."""
    done = subprocess.run([sys.executable, "-c", STARTING], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (75, ["0", "15", "1", "15"]), done.stderr


def test_gpus_are_shared_out():
    def of(index, gpus):
        return launch.environment_of(index, 2, 1, {"CUDA_VISIBLE_DEVICES": gpus})

    assert [of(i, "4,5,6,7")["JAX_LOCAL_DEVICE_IDS"] for i in range(2)] == ["0,1", "2,3"]
    assert "JAX_LOCAL_DEVICE_IDS" not in of(0, "")
    with pytest.raises(UserError, match="3 GPUs are no multiple of 2 processes"):
        of(0, "0,1,2")


@pytest.mark.parametrize(
    "statuses, status", [([0, 0], 0), ([75, -9], 75), ([1, 1], 1), ([0, -9], 137), ([-signal.SIGABRT, 75], 75)]
)
def test_one_status_for_all(statuses, status):
    assert launch.status_of(statuses) == status


def test_a_trial_of_several_processes(tmp_path):
    trials = [
        define("mamba", mamba.get_config(), "", 1, tmp_path, "", ["seed=0"], processes=processes)[0]
        for processes in (1, 2)
    ]
    one, two = (trial.commands["train"] for trial in trials)
    assert two == ("python", "-m", "seqmodels.launch", "2", *one[1:]) and trials[0].id == trials[1].id
    assert trials[0].commands["eval"] == trials[1].commands["eval"]  # by one process, with all devices of the host
