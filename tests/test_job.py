"""A job of several processes, as threads of this one with a store of values in place of JAX's coordination service.

tests/test_processes.py starts real ones.
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from jax.errors import JaxRuntimeError

from seqmodels import cluster, watch
from seqmodels.errors import UserError
from seqmodels.job import HURT, Ending, Job
from seqmodels.watch import Beat, Watch, hang_line, stuck


class Store:
    """The part of JAX's client that a job uses, for all processes."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self.changed:
            if key in self.values and not allow_overwrite:
                raise JaxRuntimeError(f"ALREADY_EXISTS: key {key} already exists.")
            self.values[key] = value
            self.changed.notify_all()

    def key_value_dir_get(self, folder):
        with self.changed:
            return [(key, value) for key, value in self.values.items() if key.startswith(folder)]

    def blocking_key_value_get(self, key, timeout):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, timeout / 1000):
                raise JaxRuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out")
            return self.values[key]


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr("seqmodels.job.LEAVING", 0.0)


def jobs(count):
    """The processes of a job; `status` of each is that of its end, None while it goes on."""
    store, made = Store(), []
    for index in range(count):
        job = Job(store, index, count, leave=lambda status, index=index: setattr(made[index], "status", status))
        job.status = None
        job._set(f"host/{index}", f"node{index}")
        made.append(job)
    return made


def together(made, work):
    """`work(job)` of all processes at the same time: what each returned or raised."""

    def one(job):
        try:
            return work(job)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(made)) as pool:
        return list(pool.map(one, made))


def test_what_differs_is_named_by_the_first_process():
    same = {"jax": "0.10.2", "config.seed": "0"}
    assert together(jobs(3), lambda job: job.agree("the command", same)) == [None] * 3

    def differing(job):
        job._wait = lambda key, seconds=0, wait=job._wait: wait(key, min(seconds or 0.3, 0.3))
        return job.agree("the command", same | ({"config.seed": "1"} if job.index == 2 else {}))

    said = together(jobs(3), differing)
    assert str(said[0]).startswith("process 2 on node2 has config.seed=1 (0 in the first process)")


def test_a_folder_that_one_host_does_not_see(tmp_path, monkeypatch):
    monkeypatch.setattr("seqmodels.job.SEEN", 0.3)
    assert together(jobs(2), lambda job: job.check_shared("--workdir", tmp_path / "shared")) == [None, None]
    assert not list((tmp_path / "shared").iterdir())

    def check(job):
        job._wait = lambda key, seconds=0, wait=job._wait: wait(key, min(seconds or 1, 1))
        return job.check_shared("config.data.cache", tmp_path / f"host{job.index}")

    said = str(together(jobs(2), check)[0])
    assert said.startswith(f"config.data.cache={tmp_path}/host0: process 1 on node1 does not see what the first")


def test_the_first_process_builds_and_the_others_wait():
    built = []

    def build(job):
        time.sleep(0.05 if job.index == 0 else 0.0)
        return job.first("the cache", lambda: built.append(job.index) or job.index)

    assert together(jobs(3), build) == [0, 1, 2] and built[0] == 0


@pytest.mark.parametrize("told", [0, 2])
def test_all_stop_after_the_same_step(told):
    """The processes run apart by up to a step, and hear of the request at different times."""
    made, reached = jobs(3), [0, 0, 0]
    barrier = threading.Barrier(3)

    def run(job):
        rng = np.random.default_rng(job.index)
        over = threading.Event()

        def listen():
            while not over.wait(0.004 * (1 + job.index)):
                job._beat(0.0)

        thread = threading.Thread(target=listen)
        thread.start()
        try:
            for step in range(1, 200):
                time.sleep(rng.uniform(0, 0.002))
                barrier.wait(10)  # the devices wait for each other
                reached[job.index] = step
                if job.index == told and step == 7:
                    job.ask_to_stop()
                if job.stops_here():
                    return step
        finally:
            over.set()
            thread.join()
        return None

    stopped = together(made, run)
    assert len(set(stopped)) == 1 and 7 <= stopped[0] < 199, stopped


def rounds(made, start=0.0, seconds=1.0, step=0.5, alive=None):
    """Beats of the processes that are alive, until so many seconds have passed on a clock of their own."""
    for now in np.arange(start, start + seconds, step):
        for job in made:
            if job.status is None and (alive is None or job.index in alive):
                job._beat(float(now))


def test_one_that_died_is_named_and_the_others_end(capsys):
    made = jobs(3)
    made[2].at(41, "step")
    rounds(made)
    made[1]._set("broken/1", "process 1 on node1: Gloo failed")  # as its collective with process 2 did
    rounds(made, 1.0, HURT, alive=[0, 1])
    rounds(made, 12.0, alive=[0, 1])
    assert [job.status for job in made] == [75, 75, None]
    line = capsys.readouterr().err
    assert line.startswith("error: gone: process 2 on node2 (silent for ") and "the devices in step 41)" in line
    assert line.count("\n") == 1 and "from the last checkpoint" in line


def test_a_mistake_of_one_ends_all_and_is_said_once(capsys, monkeypatch):
    monkeypatch.setattr("seqmodels.job.FIRST_WORD", 0.0)
    made = jobs(2)
    made[1]._over.set()
    with pytest.raises(AssertionError):  # the process would have ended
        made[1].fail(UserError("config.data.path='x': matches no file"))
    capsys.readouterr()
    rounds(made)
    assert [job.status for job in made] == [1, 1]
    assert capsys.readouterr().err == "error: process 1 on node1: config.data.path='x': matches no file\n"


def test_an_error_of_its_own_ends_all_with_its_line(capsys):
    made = jobs(2)
    made[1]._set("broken/1", "process 1 on node1: ValueError: no such row")
    rounds(made, seconds=HURT + 2)
    assert [job.status for job in made] == [1, 1] and "ValueError: no such row" in capsys.readouterr().err


def test_a_hang_is_named_with_its_step(capsys, monkeypatch):
    monkeypatch.setattr("faulthandler.dump_traceback", lambda: print("stacks"))
    made = jobs(3)
    for job in made:
        job.at(8, "data" if job.index == 1 else "step")
        job._at = (*job._at[:2], 0.0)
    rounds(made, 100.0, 10.0)
    assert capsys.readouterr().err.count("hang") == 1  # once a minute, where the job may go on
    made[0].hang_after = 150.0
    rounds(made, 151.0, 2.0)
    captured = capsys.readouterr()
    assert [job.status for job in made] == [75] * 3 and captured.out == "stacks\n"
    assert "process 1 on node1 at the data of step 8, while the others wait for the devices in step 8" in captured.err


def test_a_process_alone_is_watched_too(capsys):
    status = []
    job = Job(leave=status.append)
    job.hang_after = 5.0
    job.at(3, "data")
    job._at = (3, "data", 0.0)
    job._beat(4.0)
    assert not status
    job._beat(6.0)
    assert status == [75] and "waits for the data of step 3" in capsys.readouterr().err


def beats(*places, age=100.0):
    return {i: Beat(1, step, place, age, 0.0) for i, (step, place) in enumerate(places)}


def test_who_is_stuck():
    assert stuck(beats((5, "step"), (5, "data"), (5, "step")), 60) == [1]
    assert stuck(beats((5, "step"), (4, "checkpoint"), (5, "data")), 60) == [1]
    assert stuck(beats((5, "step"), (5, "step")), 60) == [0, 1]
    assert "all processes wait for the devices in step 5" in hang_line(beats((5, "step"), (5, "step")), [0, 1])
    assert stuck(beats((5, "step"), (5, "data"), age=10.0), 60) == []
    assert stuck(beats((5, "step"), (5, "evaluators")), 60) == []  # which take as long as they take


def test_a_straggler_is_named_once_a_minute():
    judge, said = Watch(), []
    for now in range(0, 200, 2):
        waited = (0.01 * now, 0.4 * now, 0.02 * now)
        at = {i: Beat(now, now, "step", 0.0, waited[i]) for i in range(3)}
        said += filter(None, [judge.straggler(at, float(now))])
        assert not judge.silent(at, float(now), 6.0)
    assert said == [f"straggler: {{1}} waited for its data 40% of the last minute, at step {n}" for n in (60, 120, 180)]


def test_silence_is_counted_from_the_last_beat():
    judge, at = Watch(), beats((5, "step"), (5, "done"))
    assert judge.silent(at, 0.0, 6.0) == []
    assert judge.silent(at | {0: Beat(2, 5, "step", 0.0, 0.0)}, 5.0, 6.0) == []
    assert judge.silent(at | {0: Beat(2, 5, "step", 0.0, 0.0)}, 12.0, 6.0) == [(0, 7.0)]  # who is done may be silent


def test_a_beat_is_read_as_it_was_sent():
    beat = Beat(3, 17, "validation", 1.5, 0.25)
    assert Beat.of(beat.text()) == beat and watch.TIMED.index("data") < watch.TIMED.index("step")


def test_a_signal_before_the_first_step_ends_the_others():
    made = jobs(2)
    made[1].told_to_leave(15)
    rounds(made)
    assert [job.status for job in made] == [143, 143]
    made[0]._end(Ending("another reason", 1))  # the first one counts
    assert "signal 15" in dict(made[0].client.values)["seqmodels/notice/end"]


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES=two: must be a number"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2: must be less than JAX_NUM_PROCESSES=2"),
        ({"JAX_COORDINATOR_ADDRESS": "node1"}, "JAX_COORDINATOR_ADDRESS=node1: must be HOST:PORT of process 0"),
    ],
)
def test_a_job_named_by_hand_is_checked(environment, words):
    with pytest.raises(UserError, match=words):
        cluster.numbers_of(environment)


@pytest.mark.parametrize(
    "said, words",
    [
        ("coordinator_address should be defined.", "no Slurm step .* is found here; set JAX_COORDINATOR_ADDRESS=HOST"),
        ("DEADLINE_EXCEEDED: Barrier timed out.\nTwo lines", "did not come together: DEADLINE_EXCEEDED: .* Two lines"),
    ],
)
def test_a_job_that_is_not_found(monkeypatch, said, words):
    def initialize(**numbers):
        raise ValueError(said)

    monkeypatch.setattr("jax.distributed.initialize", initialize)
    with pytest.raises(UserError, match=f"^--distributed: .*{words}"):
        cluster.connect()


def slurm(tasks, **more):
    return {"SLURM_PROCID": "0", "SLURM_STEP_TASKS_PER_NODE": tasks, **more}


def test_the_gpus_of_a_slurm_task():
    assert cluster.slurm_devices({}, 8) is None
    assert cluster.slurm_devices(slurm("1(x4)"), 8) == list(range(8))  # JAX itself would use one
    assert cluster.slurm_devices(slurm("1(x4)", CUDA_VISIBLE_DEVICES="4,5"), 8) == [0, 1]
    assert cluster.slurm_devices(slurm("8(x4)"), 8) is None  # a task a GPU
    assert cluster.slurm_devices(slurm("4(x2)", CUDA_VISIBLE_DEVICES="3"), 8) == [0]  # srun --gpus-per-task=1
    assert cluster.slurm_devices(slurm("2(x4)"), 0) is None  # CPUs
    with pytest.raises(UserError, match=r"2 tasks on a host with 8 GPUs.*--ntasks-per-node=8"):
        cluster.slurm_devices(slurm("2(x4)"), 8)
