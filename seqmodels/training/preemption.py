"""Notices requests to stop: Ctrl-C, SIGTERM of a scheduler, or either of them on another machine of the job."""

import contextlib
import signal
import sys
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

from seqmodels import interrupt


class Preempted(SystemExit):
    """The run was asked to stop and has saved a checkpoint: exit status 75 (EX_TEMPFAIL), try again."""

    def __init__(self, step: int) -> None:
        super().__init__(75)
        self.step = step


class StopSignal:
    """Notes the first SIGINT or SIGTERM, so that the step under way can finish; a second one ends the process at once.

    `noted` says whether this process got one, and `promise` is what the user is then told. In a job of several
    processes JAX's coordinator handles SIGTERM, and all processes stop after the same step.
    """

    def __init__(self) -> None:
        self.noted = False
        self.promise = "saving a checkpoint after this step"
        self._context = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if jax.process_count() == 1:
            self._context.enter_context(interrupt.told(self._note))
        return self

    def __exit__(self, *_: Any) -> None:
        self._context.close()

    def asked(self, step: int) -> bool:
        """Whether to stop after this step; every process of a job gets the same answer."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.noted

    def _note(self, number: int) -> None:
        name = signal.Signals(number).name
        if self.noted:
            interrupt.leave(number, f"{name} again: stopped at once")
        self.noted = True
        with contextlib.suppress(OSError):  # of a terminal that is gone
            print(f"\n{name}: {self.promise}; again to quit at once", file=sys.stderr, flush=True)
