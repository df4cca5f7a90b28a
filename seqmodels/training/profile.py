"""The profile of a few steps, `config.training.profile_start` and `profile_steps`."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict


class Profile:
    """Traces the steps of the window. A run that resumes within it traces those that are left; one that ends within it
    writes those that were traced. Whatever goes wrong is said and ends no run.

    Args:
      first: step after which the run goes on.
      say: is given each line for the terminal.
    """

    def __init__(self, config: ConfigDict, workdir: Path, first: int, say: Callable[[str], None]) -> None:
        self._folder, self._say = Path(workdir) / "profile", say
        start, steps = config.training.profile_start, config.training.profile_steps
        self._window = range(max(start, first + 1), start + steps) if start else range(0)
        self._traced: list[int] = []
        self._running = False
        if start and start <= first < config.steps and not self._folder.exists():
            left = f"only the last {len(self._window)} are profiled" if self._window else "there is no profile"
            say(f"training.profile_start={start}: these {steps} steps began before step {first + 1}; {left}")

    def before(self, step: int, state: Any) -> None:
        """Starts or ends the trace, if it is time, before `step` is dispatched; `state` is that of the step before."""
        if step not in self._window:
            self.close(state)
        elif not self._traced:
            with self._reported("start"):
                jax.profiler.start_trace(str(self._folder))
                self._running = True
        if self._running:
            self._traced.append(step)

    def close(self, state: Any = None) -> None:
        """Ends the trace, if one is under way, and writes it."""
        if not self._running:
            return
        self._running = False
        with self._reported("write"):
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            early = " (the run ended within it)" if self._traced[-1] + 1 < self._window.stop else ""
            self._say(f"profile of {len(self._traced)} steps{early}: {self._folder}")

    @contextlib.contextmanager
    def _reported(self, deed: str):
        try:
            yield
        except Exception as error:  # of the profiler, or of the disk: a run does not need its profile
            self._window = range(0)
            self._say(f"cannot {deed} the profile {self._folder} ({type(error).__name__}: {error})")
