"""The log of a container's main process: a file of entries, readable from both ends.

An entry on disk: length of the data (u32), time in nanoseconds since 1970 (u64), stream (u8), the data, and the length
of all that (u32), all big-endian. An entry is a line, or a part of one that is longer than 16 KiB.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import trio

MAX_ENTRY = 16 * 1024
_HEAD = struct.Struct(">IQB")
_TAIL = struct.Struct(">I")
_READ = 1 << 18


@dataclass(frozen=True, slots=True)
class Entry:
    """`time` is in nanoseconds since 1970; `stream` is 1 for standard output, 2 for standard error."""

    time: int
    stream: int
    data: bytes


class Log:
    """One container's log."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None
        self._incomplete: dict[int, bytearray] = {}
        self._changed = trio.lowlevel.ParkingLot()
        self.open = False

    def start(self) -> None:
        """From here on there is something to follow."""
        if self._file is None:
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            self._cut_incomplete(self._file)
        self.open = True

    def _cut_incomplete(self, file: int) -> None:
        """A runtime that was killed may have left half an entry."""
        whole = 0
        with self._path.open("rb") as reader:
            size = os.fstat(reader.fileno()).st_size
            while whole + _HEAD.size + _TAIL.size <= size:
                reader.seek(whole)
                length = _HEAD.unpack(reader.read(_HEAD.size))[0] + _HEAD.size + _TAIL.size
                if whole + length > size:
                    break
                whole += length
        os.ftruncate(file, whole)

    def write(self, stream: int, data: bytes) -> None:
        """Appends what a stream brought; a line that is not complete yet waits for its end."""
        assert self._file is not None
        pending = self._incomplete.setdefault(stream, bytearray())
        pending += data
        now = time.time_ns()
        parts = []
        start = 0
        while start < len(pending):
            newline = pending.find(b"\n", start, start + MAX_ENTRY)
            end = newline + 1 if newline >= 0 else start + MAX_ENTRY
            if end > len(pending):
                break
            parts.append(_frame(now, stream, bytes(pending[start:end])))
            start = end
        del pending[:start]
        if parts:
            self._append(b"".join(parts))

    def end(self) -> None:
        """Nothing comes any more until the next `start`; what was not a complete line is written as it is."""
        now = time.time_ns()
        rest = b"".join(_frame(now, stream, bytes(data)) for stream, data in self._incomplete.items() if data)
        self._incomplete.clear()
        if rest:
            self._append(rest)
        self.open = False
        if self._file is not None:
            os.close(self._file)
            self._file = None
        self._changed.unpark_all()

    def _append(self, frames: bytes) -> None:
        assert self._file is not None
        view = memoryview(frames)
        while view:
            view = view[os.write(self._file, view) :]
        self._changed.unpark_all()

    async def read(self, *, follow: bool, tail: int | None) -> AsyncIterator[Entry]:
        """The entries: all or the last `tail` of what is there, and with `follow` those that come until the end."""
        try:
            reader = self._path.open("rb", buffering=0)
        except FileNotFoundError:
            if not (follow and self.open):
                return
            reader = self._path.open("rb", buffering=0)
        with reader:
            offset = 0 if tail is None else _tail_offset(reader.fileno(), tail)
            pending = b""
            while True:
                data = os.pread(reader.fileno(), _READ, offset)
                offset += len(data)
                pending += data
                start = 0
                while len(pending) - start >= _HEAD.size:
                    length, when, stream = _HEAD.unpack_from(pending, start)
                    end = start + _HEAD.size + length
                    if len(pending) < end + _TAIL.size:
                        break
                    yield Entry(when, stream, pending[start + _HEAD.size : end])
                    start = end + _TAIL.size
                pending = pending[start:]
                if data:
                    await trio.lowlevel.checkpoint()
                elif follow and self.open:
                    await self._changed.park()
                else:
                    return


def _frame(when: int, stream: int, data: bytes) -> bytes:
    return _HEAD.pack(len(data), when, stream) + data + _TAIL.pack(_HEAD.size + len(data))


def _tail_offset(fd: int, entries: int) -> int:
    offset = os.fstat(fd).st_size
    while entries > 0 and offset >= _TAIL.size:
        offset -= _TAIL.size + _TAIL.unpack(os.pread(fd, _TAIL.size, offset - _TAIL.size))[0]
        entries -= 1
    return max(offset, 0)
