"""Progress of a run: a bar on a terminal, else a line in the log every few seconds."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

SECONDS = 10.0  # between two lines, where there is no terminal


class Progress:
    """Shows loss, tokens/s and time left: as a bar on a terminal, else as a line at most every `seconds` seconds."""

    def __init__(self, first: int, last: int, *, enabled: bool = True, seconds: float = SECONDS) -> None:
        self._last, self._seconds = last, seconds
        self._shown: float | None = None
        self._start = (first, time.monotonic())
        self._enabled = enabled
        self._bar: Any = None
        if enabled and on_terminal():
            from tqdm import tqdm

            self._bar = tqdm(total=last, initial=first, unit="step", dynamic_ncols=True)

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if self._shown is None or now - self._shown >= self._seconds or step == self._last:
            self._shown = now
            first, start = self._start
            left = (now - start) / max(step - first, 1) * (self._last - step)
            self.write(
                f"step {step}/{self._last}  loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  {clock(left)} left"
            )

    def write(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._enabled:
            with contextlib.suppress(OSError):  # of a terminal or a pipe that is gone: a training goes on without
                print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()


def on_terminal() -> bool:
    """Whether a bar can be seen. Some containers give a terminal of no size."""
    return sys.stderr.isatty() and min(os.get_terminal_size(sys.stderr.fileno())) > 0


def counted(
    batches: Iterable[Any], total: int | None, what: str, after: Callable[[], None], shown: bool = True
) -> Iterator[Any]:
    """The batches of an evaluation, with a bar or lines that say how many are done.

    Args:
      total: number of batches; None: unknown.
      what: name of what is measured.
      after: is called after each batch; it may end the process.
      shown: False on all processes of a job but the first.
    """
    if shown and on_terminal():
        from tqdm import tqdm

        for batch in tqdm(batches, desc=what, total=total, unit="batch", dynamic_ncols=True, leave=False):
            yield batch
            after()
        return
    said = time.monotonic()
    for n, batch in enumerate(batches, 1):
        yield batch
        after()
        if shown and time.monotonic() - said >= SECONDS:
            said = time.monotonic()
            with contextlib.suppress(OSError):
                print(f"{what}: {n} of {total or 'all'} batches", file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """A time such as 1:02:03, or 2:03 if it is under an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
