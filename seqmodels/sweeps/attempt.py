"""One attempt at a trial: runs its commands one after another and records how they ended."""

import contextlib
import datetime
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seqmodels import interrupt
from seqmodels.errors import NOT_FINITE
from seqmodels.source import commit
from seqmodels.sweeps.devices import Slot
from seqmodels.sweeps.trial import Trial

PREEMPTED = 75  # exit status of train.py after a checkpoint on a signal
ENDED = tuple(128 + number for number in interrupt.SIGNALS)  # exit statuses of commands that a signal ended
CACHE = "JAX_COMPILATION_CACHE_DIR"
POLL = 0.05  # seconds between looks at a process


class Stop:
    """Asks trials to end. Called once, they save a checkpoint and end; called twice, they are killed."""

    def __init__(self) -> None:
        self.asked, self.insisted = threading.Event(), threading.Event()

    def __call__(self, *_: Any) -> None:
        (self.insisted if self.asked.is_set() else self.asked).set()


def attempt(trial: Trial, slot: Slot, descriptors: Sequence[int], stop: Stop) -> dict:
    """Runs a trial that the caller has claimed, or continues it if it was interrupted, and keeps its record.

    Args:
      descriptors: file descriptors of the claims that the processes of the trial inherit.

    Returns: the record, with a status of FINAL, "preempted" or "interrupted". A trial that cannot start is "failed".
    Raises: OSError where the record cannot be kept.
    """
    before, start = trial.record(), time.monotonic()
    record = {
        "status": "running",
        "attempts": before.get("attempts", 0) + 1,
        "host": socket.gethostname(),
        "commit": commit(),
        "started": now(),
        "sharing": max(slot.sharing, before.get("sharing", 1)),  # enough if only a part of the training was run
    }

    def seconds() -> float:
        return round(before.get("seconds", 0.0) + time.monotonic() - start, 3)

    begin = code = 0
    stage = "train"
    try:
        with open(trial.log, "ab", buffering=0) as log:
            begin = log.tell()
            for stage, command in trial.commands.items():
                if stage == "train" and trial.trained():  # only to be evaluated
                    record |= {name: before[name] for name in ("started", "commit", "sharing") if name in before}
                    continue
                record |= {"stage": stage, "stage_started": now(), "seconds": seconds()}
                trial.write(record)
                heading = f"=== {record['stage_started']} on {record['host']}, attempt {record['attempts']}: {stage}\n"
                log.write(heading.encode())
                # Seeds of a trial are one program. Evaluators are to measure what compiling takes, and get no cache.
                cache = {CACHE: str(trial.compiled / record["host"])} if stage == "train" else {}
                code = _run(command, log, cache | os.environ | slot.environment, slot, descriptors, stop)
                if code:
                    break
            reason = _reason(trial.log, begin, code) if code else ""
            record |= {"status": _status(trial, stage, code, reason), "exit": code}
            if code:
                record["reason"] = reason
            log.write(f"=== {': '.join(record[name] for name in ('status', 'reason') if name in record)}\n".encode())
    except OSError as error:
        record |= {
            "status": "failed",
            "reason": f"{error.strerror}: {error.filename}" if error.filename else str(error),
        }
    record |= {"ended": now(), "seconds": seconds(), "device": _device(trial.log, begin) or _device(trial.log, 0)}
    trial.write(record)
    return record


def _run(command, log, environment: dict, slot: Slot, descriptors: Sequence[int], stop: Stop) -> int:
    """Exit status of a command; negative where a signal ended it."""
    process = subprocess.Popen(
        [*slot.prefix, sys.executable, *command[1:]],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        pass_fds=tuple(descriptors),
        start_new_session=True,  # Ctrl-C is for the sweep, which passes it on once
    )
    if slot.cores is not None:
        with contextlib.suppress(ProcessLookupError):  # over already
            os.sched_setaffinity(process.pid, slot.cores)
    told = False
    while True:
        try:
            code = process.wait(POLL)
            return 128 - code if code in ENDED else code
        except subprocess.TimeoutExpired:
            if stop.insisted.is_set():
                process.kill()
            elif stop.asked.is_set() and not told:
                process.terminate()
                told = True


def _status(trial: Trial, stage: str, code: int, reason: str) -> str:
    if code == 0:
        return "done"
    if code == PREEMPTED:
        return "preempted"
    if code < 0:
        return "interrupted"
    row = last_row(trial.workdir / "metrics.jsonl") if stage == "train" else {}
    diverged = "loss" in row and (row["loss"] is None or row.get("grad_norm", 0) is None)
    return "diverged" if diverged or (stage == "train" and NOT_FINITE in reason) else "failed"


def _reason(log: Path, begin: int, code: int) -> str:
    """Why an attempt failed: the last line of its log, or the signal that ended it."""
    if code < 0:
        return f"signal {-code}"
    lines = [line.strip() for line in _tail(log, begin).splitlines() if line.strip() and not line.startswith("===")]
    return lines[-1].removeprefix("error: ")[:300] if lines else f"exit status {code}"


def _device(log: Path, begin: int) -> str:
    """The device that train.py names in its log; "" if it ended before that line."""
    try:
        with open(log, "rb") as file:
            file.seek(begin)
            found = re.search(rb"^device +(.*)$", file.read(65536), re.MULTILINE)
    except OSError:
        return ""
    return found[1].decode(errors="replace").strip() if found else ""


def _tail(path: Path, begin: int = 0, size: int = 65536) -> str:
    with open(path, "rb") as file:
        file.seek(max(begin, path.stat().st_size - size))
        return file.read().decode(errors="replace")


def last_row(path: Path) -> dict:
    """The last complete row of a metrics.jsonl that has a loss; empty if there is none."""
    try:
        lines = _tail(path).splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "loss" in row:
            return row
    return {}


def now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
