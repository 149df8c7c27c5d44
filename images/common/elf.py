"""Which shared libraries ELF files need, read from the files: works for every architecture, runs nothing.

Source: the System V ABI, chapters 4 and 5 (elf(5)).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

from .tools import BuildError

_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NEEDED, _DT_STRTAB = 1, 5
_FOLDERS = ("usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu", "usr/lib64", "usr/lib", "lib64", "lib")


def needed(path: Path) -> list[str]:
    """The names of the libraries that an ELF file asks for (DT_NEEDED), and its interpreter's path first if it has one.

    Returns nothing for a file that is no 64-bit little-endian ELF file, or a static one.
    """
    with path.open("rb") as file:
        if file.read(6) != b"\x7fELF\x02\x01":
            return []
    data = path.read_bytes()
    offset, entry_size, count = struct.unpack_from("<Q", data, 32)[0], *struct.unpack_from("<HH", data, 54)
    headers = [struct.unpack_from("<IIQQQQQQ", data, offset + i * entry_size) for i in range(count)]
    found = [_text(data, at) for kind, _, at, *_ in headers if kind == _PT_INTERP]
    tags: list[tuple[int, int]] = []
    for kind, _, at, _, _, size, *_ in headers:
        if kind == _PT_DYNAMIC:
            tags += [struct.unpack_from("<qQ", data, at + i) for i in range(0, size, 16)]
    strings = next((value for tag, value in tags if tag == _DT_STRTAB), None)
    if strings is None:
        return found
    base = next(
        at + strings - start
        for kind, _, at, start, _, size, *_ in headers
        if kind == _PT_LOAD and start <= strings < start + size
    )
    return found + [_text(data, base + value) for tag, value in tags if tag == _DT_NEEDED]


def libraries(root: Path, files: Iterable[Path], *, folders: Iterable[str] = _FOLDERS) -> set[Path]:
    """All libraries (and dynamic loaders) in a root that these files need, directly or through another.

    Returns:
        Paths below ``root``, symbolic links on the way to a file included.

    Raises:
        BuildError: one is not in the root; the message names who needs it.
    """
    found: set[Path] = set()
    pending = [(path, path) for path in files]
    seen: set[Path] = set()
    while pending:
        path, _ = pending.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in needed(path):
            candidates = [root / name.lstrip("/")] if "/" in name else [root / folder / name for folder in folders]
            place = next((c for c in candidates if c.is_symlink() or c.exists()), None)
            if place is None:
                raise BuildError(f"{path} needs {name}, which no package of the image has")
            place = place.parent.resolve() / place.name
            while place.is_symlink():
                found.add(place)
                place = (place.parent / place.readlink()).parent.resolve() / place.readlink().name
            found.add(place)
            pending.append((place, path))
    return found


def _text(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()
