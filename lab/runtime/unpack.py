"""Unpacks a root file system that somebody else packed: `python -m lab.runtime.unpack DIRECTORY < TAR`.

A process of its own, whose root directory is DIRECTORY: whatever a tar says, it can reach nothing else. Prints one JSON
object: {"digest": sha256 of the plain tar, "size": bytes of its files} or {"error": Docker's text}.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import posixpath
import sys
import tarfile
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, Protocol, Self

_CHUNK = 1 << 18


class _Readable(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...


_MAGIC: tuple[tuple[bytes, Callable[[Any], _Readable]], ...] = (
    (b"\x1f\x8b", lambda file: gzip.GzipFile(fileobj=file)),
    (b"BZh", bz2.BZ2File),
    (b"\xfd7zXZ\x00", lzma.LZMAFile),
)


class UnpackError(Exception):
    """The stream cannot be an image's; the message is Docker's."""


class _Hashed(io.RawIOBase):
    """What is read, through a hash."""

    def __init__(self, file: _Readable) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.length = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(_CHUNK if size < 0 else size)
        self.digest.update(data)
        self.length += len(data)
        return data


def unpack(stream: BinaryIO, root: str = "/") -> dict[str, str | int]:
    """Unpacks a tar, plain or compressed, below `root`.

    Raises:
        UnpackError: it is no tar, it is cut short, or it names something outside.
    """
    start = stream.read(6)
    whole = _Joined(start, stream)
    source: _Readable = whole
    for magic, opener in _MAGIC:
        if start.startswith(magic):
            source = opener(whole)
    hashed = _Hashed(source)
    try:
        size = _extract(hashed, root)
        while hashed.read():  # what follows the archive's end is part of what was sent
            pass
    except (EOFError, tarfile.ReadError, zlib.error, lzma.LZMAError) as error:
        raise UnpackError(_reason(error, hashed.length)) from error
    except OSError as error:
        if error.errno is None:  # gzip's and bzip2's own
            raise UnpackError(
                "unexpected EOF" if "end of" in str(error) else "archive/tar: invalid tar header"
            ) from error
        raise UnpackError(f"{error.strerror}: {error.filename}") from error
    except tarfile.TarError as error:
        raise UnpackError("archive/tar: invalid tar header") from error
    return {"digest": hashed.digest.hexdigest(), "size": size}


class _Member(tarfile.TarInfo):
    """An entry; a header in the middle that is none is an error, where the library takes it for the archive's end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.TruncatedHeaderError as error:  # type: ignore[attr-defined]  # typeshed has it not
            raise UnpackError("unexpected EOF") from error
        except tarfile.InvalidHeaderError as error:  # type: ignore[attr-defined]  # typeshed has it not
            raise UnpackError("archive/tar: invalid tar header") from error


class _Joined(io.RawIOBase):
    """Bytes that have been read already, and the rest."""

    def __init__(self, start: bytes, rest: BinaryIO) -> None:
        self._start = start
        self._rest = rest

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if self._start:
            size = len(self._start) if size < 0 else size
            data, self._start = self._start[:size], self._start[size:]
            return data
        return self._rest.read(_CHUNK if size < 0 else size)


def _reason(error: Exception, length: int) -> str:
    if isinstance(error, EOFError) or length < tarfile.BLOCKSIZE or "end of data" in str(error):
        return "unexpected EOF"
    return "archive/tar: invalid tar header"


def _extract(file: _Hashed, root: str) -> int:
    size = 0
    try:
        archive = tarfile.open(fileobj=file, mode="r|", tarinfo=_Member)  # noqa: SIM115
    except tarfile.ReadError:
        if not file.length:
            return 0  # an image without files, as Docker makes it
        raise
    directories: list[tarfile.TarInfo] = []
    with archive:
        archive.extraction_filter = _as_it_is  # Python 3.11.2 has no filters, and does just that
        for member in archive:
            member.name = _inside(member.name, member.name)
            if member.islnk():
                member.linkname = _inside(member.linkname, member.name)
            elif member.issym() and not member.linkname.startswith("/"):
                _inside(posixpath.join(posixpath.dirname(member.name), member.linkname), member.name)
            if member.name == "." and not member.isdir():
                raise UnpackError("the root of an image must be a directory")
            _make_way(member, root)
            archive.extract(member, root, numeric_owner=True)
            if member.isdir():
                directories.append(member)
            size += member.size if member.isreg() else 0
    for member in reversed(directories):  # making their files has changed their times
        os.utime(os.path.join(root, member.name), (member.mtime, member.mtime), follow_symlinks=False)  # noqa: PTH118
    return size


def _as_it_is(member: tarfile.TarInfo, _path: str) -> tarfile.TarInfo:
    """A root file system keeps its owners, modes and devices."""
    return member


def _inside(name: str, member: str) -> str:
    path = posixpath.normpath(name.lstrip("/") or ".")
    if path == ".." or path.startswith("../") or "\0" in path:
        raise UnpackError(f"{json.dumps(member)} is outside of the image")
    return path


def _make_way(member: tarfile.TarInfo, root: str) -> None:
    """A later entry of the same name replaces the earlier one, and never writes through a link."""
    path = os.path.join(root, member.name)  # noqa: PTH118
    try:
        if os.path.islink(path) or not (os.path.isdir(path) and member.isdir()):  # noqa: PTH112, PTH114
            os.unlink(path)  # noqa: PTH108
    except FileNotFoundError:
        pass
    except IsADirectoryError:
        import shutil

        shutil.rmtree(path)


def main() -> None:
    """Unpacks standard input into the directory that the command line names."""
    os.chroot(sys.argv[1])
    os.chdir("/")
    os.umask(0)
    for encoding in ("utf-8", "ascii", "latin-1"):
        "".encode(encoding)  # loads the codec while the machine's files can be seen
    try:
        result: dict[str, str | int] = unpack(sys.stdin.buffer)
    except UnpackError as error:
        result = {"error": str(error)}
    print(json.dumps(result))


if __name__ == "__main__":
    import shutil  # noqa: F401 -- while the machine's files can be seen

    main()
