"""The engine that runs trials as processes of this host. Others may work on the same sweep at the same time."""

import contextlib
import threading
from collections.abc import Callable

from seqmodels.claim import RUN, Claim, claimed
from seqmodels.sweeps.attempt import Stop, attempt
from seqmodels.sweeps.devices import Slot
from seqmodels.sweeps.trial import FINAL, Trial

RETRIES = 3  # of a trial that was preempted or killed, by one run of the sweep
WAIT = 0.5  # seconds between tries, where others hold what is left
MISSES = 2  # failed tries before it counts as claimed: who looks whether a claim is held, holds it for a moment


class Workers:
    """Runs trials in one thread for each slot. A thread takes one trial after another until none is left.

    Args:
      again: also run failed and diverged trials, each once more.
      wait: wait for trials that other processes run, to take them over if those processes are killed.
      stop: ends the work early; trials then save a checkpoint.

    Attributes:
      unkept: records that could not be written to disk, by the id of the trial.
    """

    def __init__(
        self,
        trials: list[Trial],
        slots: list[Slot],
        *,
        again: bool = False,
        wait: bool = True,
        stop: Stop | None = None,
    ) -> None:
        self.stop, self._wait = stop or Stop(), wait
        self.unkept: dict[str, dict] = {}
        self._open = list(trials)
        self._again = {trial.id: trial.record().get("attempts") for trial in trials} if again else {}
        self._tries = dict.fromkeys((trial.id for trial in trials), 0)
        self._active: set[str] = set()
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._threads = [threading.Thread(target=self._guarded, args=(slot,), daemon=True) for slot in slots]

    def run(self, show: Callable[[], None] = lambda: None) -> None:
        """Works until every trial has ended, here or elsewhere, or `stop` is asked; calls `show` twice a second.

        Raises: what went wrong in a thread, such as a UserError of a file system without locks.
        """
        for thread in self._threads:
            thread.start()
        while alive := [thread for thread in self._threads if thread.is_alive()]:
            show()
            alive[0].join(0.5)
        show()
        if self._error:
            raise self._error

    def join(self) -> None:
        """Waits until the trials under way have ended."""
        for thread in self._threads:
            thread.join()

    def _guarded(self, slot: Slot) -> None:
        try:
            self._work(slot)
        except BaseException as error:
            self._error = error
            self.stop()

    def _work(self, slot: Slot) -> None:
        missed = 0
        while self._open and not self.stop.asked.is_set():
            taken = None
            with slot.claimed() as devices:
                if devices is not None and (taken := self._take()):
                    self._attempt(*taken, slot, devices)
            if not taken:
                missed += 1
                if missed > MISSES and not self._wait:
                    return
                self.stop.asked.wait(WAIT)

    def _take(self) -> tuple[Trial, Claim] | None:
        """A trial to run, and the claim on it. Trials that have ended are removed from the list."""
        with self._lock:
            for trial in list(self._open):
                if trial.id in self._active:
                    continue
                try:
                    trial.workdir.mkdir(parents=True, exist_ok=True)
                    claim = Claim.take(trial.lock)
                except OSError as error:
                    self._give_up(trial, error)
                    continue
                if claim is None:
                    continue
                if self._ended(trial):
                    claim.release()
                    self._open.remove(trial)
                    continue
                if claimed(trial.workdir / RUN):  # somebody has given its command by hand
                    claim.release()
                    continue
                self._active.add(trial.id)
                return trial, claim
        return None

    def _ended(self, trial: Trial) -> bool:
        record = trial.record()
        again = trial.id in self._again and record.get("attempts") == self._again[trial.id]  # else another one did it
        return record["status"] == "done" or (record["status"] in FINAL and not again)

    def _attempt(self, trial: Trial, claim: Claim, slot: Slot, devices: list[int]) -> None:
        try:
            status = attempt(trial, slot, [claim.descriptor, *devices], self.stop)["status"]
        except OSError as error:
            with self._lock:
                self._give_up(trial, error)
            status = "failed"
        finally:
            claim.release()
        with self._lock:
            self._active.discard(trial.id)
            self._again.pop(trial.id, None)
            self._tries[trial.id] += 1
            if status in FINAL or self._tries[trial.id] > RETRIES:
                with contextlib.suppress(ValueError):  # given up already
                    self._open.remove(trial)

    def _give_up(self, trial: Trial, error: OSError) -> None:
        self.unkept[trial.id] = {"status": "failed", "reason": f"{error.strerror}: {error.filename}"}
        self._open.remove(trial)
