"""TensorBoard's files in a run directory, written row by row, so that a killed process loses and doubles none.

The format is TensorFlow's: records of a length, a checksum of it, a serialised `Event`, and a checksum of that. The
writers of tensorboardX keep events in a queue, of which a kill takes the rest, so only its messages are used. They
import PyTorch where it is installed: import this module only where it is needed.
"""

import errno
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from seqmodels.training.metrics import is_final

PREFIX = "events.out.tfevents."


class Board:
    """Appends to a new event file. Events that an earlier process wrote after `step` are cut off.

    Args:
      again: whether the evaluation after the last step is done again: its events, of `step` itself, are cut off too.
    """

    def __init__(self, workdir: Path, step: int, again: bool) -> None:
        names = sorted(Path(workdir).glob(PREFIX + "*"))
        for path in names:
            cut_after(path, step, again)
        # TensorBoard reads the files in the order of their names, whose numbers are seconds; clocks may differ.
        newest = max((_seconds(path) for path in names), default=0)
        name = f"{PREFIX}{max(int(time.time()), newest + 1)}.{socket.gethostname()}"
        self._file = open(Path(workdir) / name, "wb", buffering=0)  # noqa: SIM115 - it lives as long as the run
        self._append(Event(file_version="brain.Event:2"))
        if step:  # for a TensorBoard that has read what was cut off
            self._append(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one event with all values."""
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._append(Event(step=step, summary=Summary(value=scalars)))

    def sync(self) -> None:
        """Returns when all is on the disk itself."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _append(self, event: Event) -> None:
        event.wall_time = time.time()
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        record = length + struct.pack("<I", _masked(length)) + content + struct.pack("<I", _masked(content))
        if self._file.write(record) < len(record):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)


def cut_after(path: Path, step: int, again: bool) -> None:
    """Cuts an event file before the first event that comes after `step`, or that a crash cut short."""
    end = 0
    for at, values, behind in events(path):
        after = at > step or (again and at == step and is_final(values))
        if values and after:
            break
        end = behind
    if end < path.stat().st_size:
        os.truncate(path, end)


def events(path: Path) -> Iterator[tuple[int, dict[str, float], int]]:
    """Step, values and end of each event of a file, up to the first that is not whole."""
    with open(path, "rb") as file:
        end = 0
        while len(head := file.read(12)) == 12:
            length, check = struct.unpack("<QI", head)
            if check != _masked(head[:8]):
                return
            content = file.read(length + 4)
            if len(content) < length + 4 or struct.unpack("<I", content[-4:])[0] != _masked(content[:-4]):
                return
            end += 12 + len(content)
            event = Event.FromString(content[:-4])
            yield event.step, {value.tag: value.simple_value for value in event.summary.value}, end


def _masked(content: bytes) -> int:
    """TensorFlow's masked CRC-32C."""
    check = crc32c(content)
    return ((check >> 15 | check << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _seconds(path: Path) -> int:
    number = path.name.removeprefix(PREFIX).split(".")[0]
    return int(number) if number.isascii() and number.isdecimal() else 0
