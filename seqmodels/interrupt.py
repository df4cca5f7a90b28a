"""What Ctrl-C (SIGINT) and SIGTERM do to a command, from its first import on.

A signal ends the command at once, with one line and the exit status 128 + its number, as shells report it. Python runs
a signal handler between two operations of the main thread, which can be long after the signal: a compilation is one
operation. So here a thread waits for the signal. Training takes the signals over while it has something to save.

Imports nothing but the standard library: the commands install it before their imports, which take seconds.
"""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
TOGETHER = 0.3  # seconds: `timeout` and schedulers signal a process and then its group, which is one request

_receiver: Callable[[int], None] | None = None
_parting: Callable[[int], None] | None = None
_installed = False


def install() -> None:
    """From now on a signal ends the process at once. Does nothing outside the main thread, which alone may handle
    signals, and when called again."""
    global _installed
    if _installed or threading.current_thread() is not threading.main_thread():
        return
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, _nothing)
    threading.Thread(target=_wait, args=(read_end,), name="signals", daemon=True).start()
    os.register_at_fork(after_in_child=_reset)
    _installed = True


@contextlib.contextmanager
def told(receiver: Callable[[int], None]) -> Iterator[None]:
    """Within this context `receiver` is called with the number of each signal, in a thread, and the process goes on.

    Where the commands have not called `install`, as in a program that imports the library, signals are taken over for
    this context only.
    """
    global _receiver
    before = _receiver
    restore = _take_over()
    _receiver = receiver
    try:
        yield
    finally:
        _receiver = before
        restore()


def before_leaving(parting: Callable[[int], None]) -> None:
    """`parting` is called with the number of the signal before that ends the process: to tell others of it."""
    global _parting
    _parting = parting


def leave(number: int, line: str = "") -> None:
    """Ends the process at once, with one line on stderr. Nothing is left to clean up: files are replaced in one step,
    and locks end with the process."""
    if _parting is not None:
        _parting(number)
    text = line or f"{signal.Signals(number).name}: stopped"
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
    os._exit(128 + number)


def _take_over() -> Callable[[], None]:
    if _installed or threading.current_thread() is not threading.main_thread():
        return lambda: None

    def handle(number: int, _frame: Any) -> None:
        if _receiver is not None:
            _receiver(number)

    before = {number: signal.signal(number, handle) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    return restore


def _wait(read_end: int) -> None:
    before = -math.inf
    while True:
        (number,) = os.read(read_end, 1)
        now = time.monotonic()
        if number in SIGNALS and now - before > TOGETHER:
            before = now
            (_receiver or leave)(number)


def _nothing(*_: Any) -> None:
    """A handler must be there, or the signal ends the process before the thread hears of it."""


def _reset() -> None:
    """A forked child must not wake the thread of its parent, with which it shares the pipe."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
