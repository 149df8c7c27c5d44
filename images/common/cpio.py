"""Initramfs archives: cpio in the "newc" form that the kernel unpacks.

Source: Documentation/driver-api/early-userspace/buffer-format.rst of Linux.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .tools import BuildError, run, source_date_epoch

ZSTD_LEVEL = 12
"""Of all images. 19 would make the helper's initramfs 12 % smaller in eight times the time."""

_ALIGN = 4
_BLOCK = 512
_MAX_SIZE = 0xFFFFFFFF


@dataclass(frozen=True)
class Device:
    """A device node: its name in the archive, "c" or "b", its numbers and permission bits."""

    name: str
    kind: str
    major: int
    minor: int
    mode: int = 0o600


CONSOLE = (Device("dev/console", "c", 5, 1), Device("dev/null", "c", 1, 3, 0o666))
"""What PID 1 needs before it has mounted devtmpfs: without /dev/console it starts with no standard output."""


@dataclass(frozen=True)
class _Entry:
    name: str
    mode: int
    inode: int
    links: int = 1
    size: int = 0
    device: tuple[int, int] = (0, 0)


def write_newc(root: Path, out: Path, *, devices: Iterable[Device] = (), mtime: int | None = None) -> None:
    """Packs a directory tree; the same tree always gives the same bytes.

    Entries are sorted, owned by 0:0 and bear ``mtime`` (seconds since 1970; default SOURCE_DATE_EPOCH or 0); inode
    numbers count from 1. Hard links stay links. Permission bits come from the tree.

    Args:
        devices: nodes to add. Device nodes, sockets and pipes of the tree itself are refused.

    Raises:
        BuildError: the tree holds what cannot be packed.
    """
    when = source_date_epoch() if mtime is None else mtime
    nodes = {device.name: device for device in devices}
    names = set(_names(root))
    for name in nodes:
        names |= {str(parent) for parent in Path(name).parents} - {"."}
    inodes: dict[tuple[int, int], int] = {}
    left: dict[int, int] = {}
    with out.open("wb") as file:
        for number, name in enumerate(sorted(names | set(nodes)), 1):
            if name in nodes:
                node = nodes[name]
                kind = stat.S_IFCHR if node.kind == "c" else stat.S_IFBLK
                _write(file, _Entry(name, kind | node.mode, number, device=(node.major, node.minor)), when)
                continue
            path = root / name
            if not path.is_symlink() and not path.exists():  # the folder of a device node
                _write(file, _Entry(name, stat.S_IFDIR | 0o755, number, links=2), when)
                continue
            found = path.lstat()
            if stat.S_ISDIR(found.st_mode):
                _write(file, _Entry(name, found.st_mode, number, links=2), when)
            elif stat.S_ISLNK(found.st_mode):
                target = os.fsencode(path.readlink())
                _write(file, _Entry(name, stat.S_IFLNK | 0o777, number, size=len(target)), when, target)
            elif stat.S_ISREG(found.st_mode):
                if found.st_size > _MAX_SIZE:
                    raise BuildError(f"{path}: larger than 4 GiB, which this archive cannot hold")
                inode = inodes.setdefault((found.st_dev, found.st_ino), number)
                # Links outside the tree do not count; the content comes with the last name, as GNU cpio writes it.
                left.setdefault(inode, _links(root, found) if found.st_nlink > 1 else 1)
                links = left[inode] if inode == number else 2
                left[inode] -= 1
                data = path.read_bytes() if left[inode] == 0 else b""
                _write(file, _Entry(name, found.st_mode, inode, links=links, size=len(data)), when, data)
            else:
                raise BuildError(f"{path}: neither a file, a folder nor a symbolic link; give device nodes as devices=")
        _write(file, _Entry("TRAILER!!!", 0, 0), 0)
        file.write(b"\0" * (-file.tell() % _BLOCK))


def compress(source: Path, out: Path) -> None:
    """zstd in a single thread: with the same zstd the same bytes, which the kernel (CONFIG_RD_ZSTD) unpacks."""
    run(["zstd", "-q", "-f", f"-{ZSTD_LEVEL}", "--single-thread", "--no-check", source, "-o", out])


def concatenate(parts: Sequence[Path], out: Path) -> None:
    """Joins archives, compressed or not, into one for `-initrd`: later ones add to and replace files of earlier ones.

    The kernel skips zeros between archives and wants an uncompressed one at a multiple of 4 bytes.
    """
    with out.open("wb") as file:
        for part in parts:
            file.write(b"\0" * (-file.tell() % _ALIGN))
            with part.open("rb") as source:
                shutil.copyfileobj(source, file)


def _names(root: Path) -> Iterable[str]:
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            yield os.path.relpath(os.path.join(folder, name), root)  # noqa: PTH118 - os.walk speaks strings


def _links(root: Path, found: os.stat_result) -> int:
    same = (found.st_dev, found.st_ino)
    paths = (root / name for name in _names(root))
    return sum(1 for other in (path.lstat() for path in paths) if (other.st_dev, other.st_ino) == same)


def _write(file: BinaryIO, entry: _Entry, when: int, data: bytes = b"") -> None:
    name = os.fsencode(entry.name) + b"\0"
    fields = (
        entry.inode,
        entry.mode,
        0,
        0,
        entry.links,
        when,
        entry.size,
        0,
        0,
        *entry.device,
        len(name),
        0,
    )
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + name
    file.write(header + b"\0" * (-len(header) % _ALIGN))
    file.write(data + b"\0" * (-len(data) % _ALIGN))
