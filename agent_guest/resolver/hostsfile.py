"""/etc/hosts (hosts(5)): written for the container, kept up beside what others write into it, and given back."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LOCALHOST = (
    "127.0.0.1\tlocalhost",
    "::1\tlocalhost ip6-localhost ip6-loopback",
    "fe00::0\tip6-localnet",
    "ff00::0\tip6-mcastprefix",
    "ff02::1\tip6-allnodes",
    "ff02::2\tip6-allrouters",
)
"""What Docker's file starts with."""


class RecordError(ValueError):
    """The record of what was written is not one."""


@dataclass(frozen=True, slots=True)
class Host:
    """A line: an address and its names."""

    address: str
    names: tuple[str, ...]


def content(hosts: Sequence[Host]) -> bytes:
    """The file with these lines after localhost's."""
    lines = [*LOCALHOST, *(f"{host.address}\t{' '.join(host.names)}" for host in hosts)]
    return "".join(line + "\n" for line in lines).encode()


def merge(current: bytes, before: bytes, wanted: bytes) -> bytes:
    """``current``, edited by others since ``before`` was written, with what has changed from there to ``wanted``.

    Lines that are gone are taken out, new ones are added at the end; the others' lines stay as they are.
    """
    gone = _lines(before) - _lines(wanted)
    kept = [line for line in current.split(b"\n") if line not in gone]
    if kept and not kept[-1]:
        kept.pop()  # what follows the last line feed
    present = _lines(before) | set(kept)
    added = [line for line in wanted.split(b"\n") if line and line not in present]
    return b"".join(line + b"\n" for line in kept + added)


@dataclass(frozen=True, slots=True)
class Record:
    """What is remembered of a file: how it was, and what was written last (``after``) and before that.

    Both are ours: an agent that was killed in between has written one or the other. ``original`` None: no file.
    """

    original: bytes | None
    mode: int
    before: bytes
    after: bytes

    def to_bytes(self) -> bytes:
        kind = b"absent" if self.original is None else b"file"
        parts = (self.original or b"", self.before, self.after)
        head = f"{self.mode:o} {len(parts[0])} {len(parts[1])} {len(parts[2])}\n"
        return kind + b" " + head.encode() + b"".join(parts)

    @classmethod
    def parse(cls, data: bytes) -> Record:
        """Raises RecordError."""
        head, _, body = data.partition(b"\n")
        fields = head.split(b" ")
        if len(fields) != 5 or fields[0] not in (b"absent", b"file") or not all(map(bytes.isdigit, fields[1:])):
            raise RecordError
        try:
            mode = int(fields[1], 8)
        except ValueError:
            raise RecordError from None
        first, second, third = map(int, fields[2:])
        if len(body) != first + second + third:
            raise RecordError
        original = body[:first] if fields[0] == b"file" else None
        return cls(original, mode, body[first : first + second], body[first + second :])


class HostsFile:
    """One hosts file. What was there is kept in ``saved``, which outlives the agent but not the VM's boot.

    The file is always written through its inode, as it may be mounted into containers by itself, and in one call.
    """

    def __init__(self, path: Path, saved: Path) -> None:
        self._path = path
        self._saved = saved

    def write(self, hosts: Sequence[Host]) -> None:
        """Makes the file be localhost's lines and these, beside lines that others added since. Raises OSError."""
        wanted = content(hosts)
        current, record = self._read(), self._load()
        if record is None:
            mode = 0o644 if current is None else stat.S_IMODE(self._path.stat().st_mode)
            record = Record(current, mode, wanted, wanted)
            data = wanted
        else:
            ours = current in (record.original, record.before, record.after)
            data = wanted if current is None or ours else merge(current, record.after, wanted)
            record = Record(record.original, record.mode, record.after, wanted)
        if data == current:
            return
        self._save(record)
        self._overwrite(data)

    def restore(self) -> None:
        """Puts back what was there, unless others have written into it since. Raises OSError."""
        record = self._load()
        if record is None:
            return
        current = self._read()
        if current not in (record.original, record.before, record.after):
            return  # theirs counts; the record stays, so that the next agent knows which lines are ours
        if record.original is not None:
            self._overwrite(record.original)
        elif current is not None:
            try:
                self._path.unlink()
            except OSError:
                self._overwrite(b"")  # a mount point, or in a directory that cannot be changed
        self._saved.unlink(missing_ok=True)

    def _read(self) -> bytes | None:
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return None

    def _load(self) -> Record | None:
        try:
            return Record.parse(self._saved.read_bytes())
        except (FileNotFoundError, RecordError):
            return None

    def _save(self, record: Record) -> None:
        self._saved.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = self._saved.with_name(f".{self._saved.name}.new")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(record.to_bytes())
        temporary.replace(self._saved)

    def _overwrite(self, data: bytes) -> None:
        """Overwrites, then cuts: a reader in between never sees an empty file."""
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            written = os.write(fd, data)
            while written < len(data):  # a file system that is nearly full may take less
                written += os.write(fd, data[written:])
            os.ftruncate(fd, len(data))
        finally:
            os.close(fd)


def _lines(data: bytes) -> set[bytes]:
    return set(data.split(b"\n")) - {b""}
