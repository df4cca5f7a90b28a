"""Notices requests to stop: Ctrl-C, SIGTERM of a scheduler, or either of them on another machine of the job."""

import contextlib
import signal
import sys
from typing import Any, Self

from seqmodels import interrupt, job


class Preempted(SystemExit):
    """The run was asked to stop and has saved a checkpoint: exit status 75 (EX_TEMPFAIL), try again."""

    def __init__(self, step: int) -> None:
        super().__init__(75)
        self.step = step


class StopSignal:
    """Notes the first SIGINT or SIGTERM, so that the step under way can finish; a second one ends the process at once.

    `promise` is what the user is then told. All processes of a job stop at the same point, whichever of them got the
    signal.
    """

    def __init__(self) -> None:
        self._job = job.current()
        self._told = False
        self.promise = "saving a checkpoint after this step"
        self._context = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._context.enter_context(interrupt.told(self._note))
        return self

    def __exit__(self, *_: Any) -> None:
        self._context.close()

    def asked(self) -> bool:
        """Whether to stop at this point. All processes of a job ask at the same points, and get the same answer."""
        return self._job.stops_here() if self._job.count > 1 else self._told

    def _note(self, number: int) -> None:
        name = signal.Signals(number).name
        if self._told:
            interrupt.leave(number, f"{name} again: stopped at once")
        self._told = True
        with contextlib.suppress(OSError):  # of a terminal that is gone
            print(f"\n{name}: {self.promise}; again to quit at once", file=sys.stderr, flush=True)
        with contextlib.suppress(RuntimeError):  # the first process is gone, which ends this one too
            self._job.ask_to_stop()
