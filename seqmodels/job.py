"""A job of several processes that run the same command: they compare what they were given, stop after the same step,
and none of them waits for one that is gone.

JAX's coordination service, in the first process, keeps small values by name for all. Here they are

    host/<i>        the host of process i
    beat/<i>        where process i is (`seqmodels.watch`), every few seconds, by a thread of its own
    broken/<i>      what process i failed with, where it may be another's fault
    point/<i>       the next point at which process i can stop
    notice/stop     somebody was told to stop
    notice/end      the job ends: what is to be said, and the exit status
    left/<i>        process i has read that
    alert           there is a notice

A process without others has a job too, in which nothing is to be agreed on.
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from seqmodels import interrupt
from seqmodels.errors import UserError, describe
from seqmodels.watch import BEAT, HURT_SILENCE, SAY_EVERY, SILENCE, Beat, Watch, hang_line, stuck

ROOT = "seqmodels/"
TRY_AGAIN = 75  # EX_TEMPFAIL: the same command goes on
START = 300  # seconds in which the processes of a job have to begin
SEEN = 20.0  # seconds in which a file of one host has to appear on the others
FIRST_WORD = 1.0  # seconds that the first process has to say by itself what all of them find wrong
HURT = 10.0  # seconds in which it has to become clear that a failed process failed because of another
LEAVING = 5.0  # seconds that the first process, which keeps the values, waits for the others at a bad end

UNKNOWN = "an unknown host"

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Ending:
    """The end of a job before its time: a line for the first process to say, and the exit status of all.

    Attributes:
      stacks: processes whose stacks are shown.
    """

    line: str
    status: int
    stacks: tuple[int, ...] = ()


class Job:
    """This process, as one of `count`.

    Args:
      client: of JAX's coordination service; None in a process without others.
      leave: ends the process with a status.
    """

    def __init__(
        self, client: Any = None, index: int = 0, count: int = 1, leave: Callable[[int], Any] = os._exit
    ) -> None:
        self.client, self.index, self.count, self._leave = client, index, count, leave
        self.hang_after = 0.0
        self._at = (0, "start", time.monotonic())  # step, place, since when
        self._spent: defaultdict[str, float] = defaultdict(float)  # seconds by place
        self._beats, self._watch, self._said, self._hurt = 0, Watch(), -SAY_EVERY, 0.0
        self._points, self._stop_at, self._stopping, self._alerted = 0, 0, False, False
        self._lock, self._over = threading.Lock(), threading.Event()
        self._turns: Counter[str] = Counter()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    @property
    def main(self) -> bool:
        """Whether this is the first process, which writes and speaks for all."""
        return self.index == 0

    # What the work tells

    def at(self, step: int, place: str) -> None:
        """Notes where this process is. It takes a microsecond."""
        now, (_, before, since) = time.monotonic(), self._at
        if before == "idle":  # a program that trains once more
            self._spent.clear()
        else:
            self._spent[before] += now - since
        self._at = step, place, now

    def spent(self) -> dict[str, float]:
        """Seconds that this process has spent at each place since it was "idle"."""
        _, place, since = self._at
        return {**self._spent, place: self._spent.get(place, 0.0) + time.monotonic() - since}

    @contextlib.contextmanager
    def visiting(self, place: str) -> Iterator[None]:
        """A context in which this process is at another place of the same step."""
        step, before, *_ = self._at
        self.at(step, place)
        try:
            yield
        finally:
            self.at(step, before)

    def watch(self, hang_after: float = 0.0) -> None:
        """From now on a thread sends beats, and hears those of others.

        Args:
          hang_after: seconds without progress after which the job ends; 0: it is only said.
        """
        self.hang_after = hang_after
        if self._thread is None and (self.client or hang_after):
            self._thread = threading.Thread(target=self._run, name="job", daemon=True)
            self._thread.start()

    # What the processes agree on

    def agree(self, topic: str, facts: Mapping[str, str]) -> None:
        """Compares facts by name. Raises: UserError in the first process, where another has others; it ends them."""
        if not self.client:
            return
        topic = self._turn(topic)
        self._set(f"{topic}/{self.index}", json.dumps(dict(facts)))
        if self.index:
            self._wait(f"{topic}/agreed")
            return
        for process in range(1, self.count):
            theirs = json.loads(self._wait(f"{topic}/{process}", START))
            names = [name for name in {**facts, **theirs} if theirs.get(name) != facts.get(name)]
            if names:
                shown = ", ".join(f"{n}={theirs.get(n)} ({facts.get(n)} in the first process)" for n in names[:3])
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise UserError(f"{self.name(process)} has {shown}{more}: all processes of a job need the same")
        self._set(f"{topic}/agreed", "")

    def first(self, topic: str, work: Callable[[], T]) -> T:
        """The result of `work`, which the first process does first: what it builds, such as a cache, serves all."""
        if not self.client:
            return work()
        done = f"{self._turn(topic)}/done"
        if self.index:
            self._wait(done)
            return work()
        result = work()
        self._set(done, "")
        return result

    def check_shared(self, field: str, folder: Path) -> None:
        """Raises: UserError where a process does not see what the first one writes into a folder."""
        if not self.client:
            return
        topic = self._turn(field)
        mark = folder / f".seen-by-all-{self._of_first(f'{topic}/mark', lambda: os.urandom(6).hex())}"
        if self.index:
            self._wait(f"{topic}/marked")
            seen, until = mark.exists(), time.monotonic() + SEEN
            while not seen and time.monotonic() < until:
                with contextlib.suppress(OSError):
                    seen = mark in folder.iterdir()  # as a file system of the network may remember a miss
                time.sleep(0.2)
            self._set(f"{topic}/{self.index}", "seen" if seen else "")
            self._wait(f"{topic}/agreed")
            return
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
        try:
            self._set(f"{topic}/marked", "")
            for process in range(1, self.count):
                if not self._wait(f"{topic}/{process}", START):
                    raise UserError(
                        f"{field}={folder}: {self.name(process)} does not see what the first process writes there; "
                        "name a folder of a file system that all hosts share"
                    )
        finally:
            mark.unlink(missing_ok=True)
        self._set(f"{topic}/agreed", "")

    def _turn(self, topic: str) -> str:
        """The topic with the number of times that it came up: what was agreed on before does not count."""
        self._turns[topic] += 1
        return f"{topic} {self._turns[topic]}"

    def _of_first(self, topic: str, make: Callable[[], str]) -> str:
        if not self.index:
            self._set(topic, make())
        return self._wait(topic)

    # Stopping together

    def ask_to_stop(self) -> None:
        """All processes are to stop at the same point, soon."""
        if self.client:
            self._set("notice/stop", "")
            self._set("alert", "")

    def stops_here(self) -> bool:
        """Whether to stop at this point of the work. All processes come to the same points, and get the same answer."""
        if not self.client:
            return False
        with self._lock:
            self._points += 1
            if not self._stopping:
                return False
        if not self._stop_at:
            # Each has said, by its thread, which point it has not passed: the last of these none has passed.
            self._stop_at = max(int(self._wait(f"point/{process}", START)) for process in range(self.count))
        return self._points >= self._stop_at

    def _say_next_point(self) -> None:
        with self._lock:  # the work does not pass the point meanwhile
            if not self._stopping:
                self._set(f"point/{self.index}", str(self._points + 1))
                self._stopping = True

    # The end

    def close(self) -> None:
        """Waits until all processes have come to their end."""
        if not self.client:
            self._over.set()
            return
        import jax

        self.at(0, "done")
        with contextlib.suppress(RuntimeError):  # of one that ended otherwise; this one is done
            jax.distributed.shutdown()
        self._over.set()

    def fail(self, error: BaseException) -> NoReturn:
        """Ends this process and, by a notice, the others. One line is said, by the first process.

        A UserError is its own reason. Anything else may come from the death of another process, which is then named.
        """
        self._error = error
        try:
            if self.index:
                time.sleep(FIRST_WORD)
            if isinstance(error, UserError):
                self._end(Ending(describe(error) if not self.index else f"{self.name(self.index)}: {error}", 1))
            else:
                self._set(f"broken/{self.index}", f"{self.name(self.index)}: {describe(error)}")
        except RuntimeError:  # the first process is gone, or has seen to it
            pass
        self._over.wait(HURT + 3 * SILENCE)  # the thread ends this process
        traceback.print_exception(error)
        self._leave(1)
        raise AssertionError

    def told_to_leave(self, number: int) -> None:
        """Before a signal ends this process at once: the others end too."""
        ending = Ending(f"{self.name(self.index)}: stopped by signal {number}", 128 + number)
        thread = threading.Thread(target=self._end, args=(ending,), daemon=True)
        thread.start()
        thread.join(2.0)  # the first process may be gone

    def _end(self, ending: Ending) -> None:
        self._set("notice/end", json.dumps(dataclasses.astuple(ending)), once=True)
        self._set("alert", "")

    def _obey(self, ending: Ending) -> None:
        """Ends this process as a notice says."""
        if self.index in ending.stacks:
            with contextlib.suppress(OSError, ValueError):  # no such stderr
                faulthandler.dump_traceback()
        if self._error and not isinstance(self._error, UserError) and ending.status != TRY_AGAIN:
            traceback.print_exception(self._error)
        if self.index:
            self._set(f"left/{self.index}", "")
        else:
            print(f"error: {ending.line}", file=sys.stderr, flush=True)
            until = time.monotonic() + LEAVING
            while len(self._get("left/")) < self.count - 1 and time.monotonic() < until:
                time.sleep(0.1)
        sys.stdout.flush()
        self._leave(ending.status)
        self._over.set()

    # The thread

    def _run(self) -> None:
        while not self._paused():
            try:
                self._beat(time.monotonic())
            except RuntimeError:  # the first process does not answer; if it is gone, JAX ends this one
                continue

    def _paused(self) -> bool:
        """Waits until the next beat is due, or a notice is there; returns whether the thread is to end."""
        if self._alerted or self._error or not self.client:
            return self._over.wait(0.2 if self.client else BEAT)
        try:
            self.client.blocking_key_value_get(ROOT + "alert", int(1000 * BEAT))
            self._alerted = True
        except RuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):  # the first process is gone
                self._over.wait(BEAT)
        return self._over.is_set()

    def _beat(self, now: float) -> None:
        """One round of the thread: says where this process is, and does what the others' values ask for."""
        self._beats += 1
        step, place, since = self._at
        waited = self._spent.get("data", 0.0) + (now - since if place == "data" else 0.0)
        beat = Beat(self._beats, step, place, now - since, waited)
        if not self.client:
            self._judge({0: beat}, now)
            return
        self._set(f"beat/{self.index}", beat.text())
        notices = self._get("notice/")
        if "end" in notices:
            line, status, stacks = json.loads(notices["end"])
            self._obey(Ending(line, status, tuple(stacks)))
        elif "stop" in notices:
            self._say_next_point()
        if not self.index:
            self._judge({int(i): Beat.of(text) for i, text in self._get("beat/").items()}, now)

    def _judge(self, beats: dict[int, Beat], now: float) -> None:
        """Ends the job where a process is silent or has failed, or nothing moves; says who is slow."""
        broken = self._get("broken/")
        if broken and not self._hurt:
            self._hurt = now
        gone = self._watch.silent(beats, now, HURT_SILENCE if broken else SILENCE)
        if gone:
            names = ", ".join(f"{self.name(i)} (silent for {age:.0f} s, last at {beats[i]})" for i, age in gone[:3])
            more = f" and {len(gone) - 3} more" if len(gone) > 3 else ""
            line = f"gone: {names}{more}; the same command goes on from the last checkpoint"
            return self._end(Ending(line, TRY_AGAIN))
        if broken and now - self._hurt > HURT:
            return self._end(Ending(next(iter(broken.values())), 1))
        if len(beats) < self.count:  # some have only just begun
            return None
        culprits = stuck(beats, self.hang_after or SAY_EVERY)
        if culprits and self.hang_after:
            self._finish_stuck(Ending(self._named(hang_line(beats, culprits)), TRY_AGAIN, tuple(culprits)))
        elif culprits and now - self._said > SAY_EVERY:
            self._said = now
            self._say(hang_line(beats, culprits))
        if slow := self._watch.straggler(beats, now):
            self._say(slow)
        return None

    def _finish_stuck(self, ending: Ending) -> None:
        if self.client:
            self._end(ending)
        else:
            self._obey(ending)

    def _say(self, line: str) -> None:
        print(self._named(line), file=sys.stderr, flush=True)

    def _named(self, line: str) -> str:
        if not self.client:
            return line.format(self.name(0))
        hosts = self._get("host/")
        return line.format(*(f"process {i} on {hosts.get(str(i), UNKNOWN)}" for i in range(self.count)))

    # The values

    def name(self, process: int) -> str:
        """Such as "process 3 on node7"."""
        if not self.client:
            return f"process {os.getpid()} on {socket.gethostname()}"
        return f"process {process} on {self._get('host/').get(str(process), UNKNOWN)}"

    def _set(self, key: str, value: str, once: bool = False) -> None:
        try:
            self.client.key_value_set(ROOT + key, value, allow_overwrite=not once)
        except RuntimeError as error:
            if not once or "ALREADY_EXISTS" not in str(error):
                raise

    def _get(self, folder: str) -> dict[str, str]:
        if not self.client:
            return {}
        return {key.rpartition("/")[2]: value for key, value in self.client.key_value_dir_get(ROOT + folder)}

    def _wait(self, key: str, seconds: float = 0) -> str:
        """A value, as soon as it is there. Raises: UserError where it is not, after so many seconds; 0: any number."""
        until = time.monotonic() + seconds
        while True:
            left = min(until - time.monotonic(), 60.0) if seconds else 60.0
            try:
                return self.client.blocking_key_value_get(ROOT + key, max(int(1000 * left), 1))
            except RuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
            if seconds and time.monotonic() >= until:
                raise UserError(f"--distributed: {key}: no answer of a process within {seconds:.0f} s")


_current = Job()


def current() -> Job:
    """The job of this process: also where a program has called `jax.distributed.initialize` itself."""
    global _current
    jax = sys.modules.get("jax._src.distributed")  # the client of the coordination service has no public name
    if _current.client is None and jax is not None and (state := jax.global_state).client is not None:
        # jax.process_index() would look for the devices, for which it may be too early
        _current = Job(state.client, state.process_id, state.num_processes)
        _current._set(f"host/{_current.index}", socket.gethostname())
        _current.watch()
    return _current


@contextlib.contextmanager
def member() -> Iterator[Job]:
    """A context in which this process is one of several, which JAX has connected (`seqmodels.cluster.connect`).

    An error inside ends all processes. At the end they wait for each other.
    """
    job = current()
    interrupt.before_leaving(job.told_to_leave)
    try:
        yield job
    except (SystemExit, GeneratorExit):
        job.close()
        raise
    except BaseException as error:
        job.fail(error)
    job.close()
