"""TensorBoard's files in a run directory, written row by row, so that a killed process loses and doubles none.

The format is TensorFlow's: records of a length, a checksum of it, a serialised `Event`, and a checksum of that. Of an
event only a few fields are needed, so they are written here; other writers import PyTorch or TensorFlow.
"""

import errno
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PREFIX = "events.out.tfevents."
FINAL = "eval."  # begins the names of figures of config.evals, which are written after the last checkpoint


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
        self._append(0, _text(3, b"brain.Event:2"))  # file_version
        if step:  # for a TensorBoard that has read what was cut off
            self._append(step + 1, _text(7, b"\x08\x01"))  # session_log, status START

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one event with all values."""
        scalars = (_text(1, name.encode()) + b"\x15" + struct.pack("<f", value) for name, value in values.items())
        self._append(step, _text(5, b"".join(_text(1, scalar) for scalar in scalars)))  # summary

    def sync(self) -> None:
        """Returns when all is on the disk itself."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _append(self, step: int, content: bytes) -> None:
        content = b"\x09" + struct.pack("<d", time.time()) + b"\x10" + _varint(step) + content
        length = struct.pack("<Q", len(content))
        record = length + struct.pack("<I", _masked(length)) + content + struct.pack("<I", _masked(content))
        if self._file.write(record) < len(record):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)


def cut_after(path: Path, step: int, again: bool) -> None:
    """Cuts an event file before the first event that comes after `step`, or that a crash cut short."""
    end = 0
    for at, values, behind in events(path):
        after = at > step or (again and at == step and any(name.startswith(FINAL) for name in values))
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
            fields = list(_fields(content[:-4]))
            step = next((value for number, value in fields if number == 2), 0)
            scalars = [dict(_fields(value)) for number, summary in fields if number == 5
                       for _, value in _fields(summary)]  # fmt: skip
            values = {scalar[1].decode(): struct.unpack("<f", scalar[2])[0] for scalar in scalars if 2 in scalar}
            yield step, values, end


# Protocol buffers: each field is its number and wire type, then the value.


def _text(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a message: int of a varint, else bytes."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = content[place]
            place, value, shift = place + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while place < len(content):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(key & 7) or varint()
        yield key >> 3, content[place : place + size]
        place += size


def _table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


CRC32C = _table()  # of Castagnoli's polynomial


def _masked(content: bytes) -> int:
    """TensorFlow's masked CRC-32C."""
    check = 0xFFFFFFFF
    for byte in content:
        check = CRC32C[(check ^ byte) & 255] ^ check >> 8
    check ^= 0xFFFFFFFF
    return ((check >> 15 | check << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _seconds(path: Path) -> int:
    number = path.name.removeprefix(PREFIX).split(".")[0]
    return int(number) if number.isascii() and number.isdecimal() else 0
