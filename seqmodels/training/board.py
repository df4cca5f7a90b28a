"""TensorBoard's files in a run directory, written row by row, so that a killed process loses and doubles none.

The format is TensorFlow's: records of a length, a checksum of it, a serialised `Event`, and a checksum of that.
"""

import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

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
        self._file.write(record)


def cut_after(path: Path, step: int, again: bool) -> None:
    """Cuts an event file before the first event that comes after `step`, or that a crash cut short."""
    end = 0
    for event, behind in _events(path):
        evaluated = any(value.tag.startswith("eval.") for value in event.summary.value)
        if event.step > step or (again and event.step == step and evaluated):
            break
        end = behind
    if end < path.stat().st_size:
        os.truncate(path, end)


def _events(path: Path) -> Iterator[tuple[Event, int]]:
    """The events of a file and where each ends. Ends at the first that is not whole."""
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
            yield Event.FromString(content[:-4]), end


def _masked(content: bytes) -> int:
    check = crc32c(content)
    return (((check >> 15) | (check << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _seconds(path: Path) -> int:
    number = path.name.removeprefix(PREFIX).split(".")[0]
    return int(number) if number.isascii() and number.isdecimal() else 0
