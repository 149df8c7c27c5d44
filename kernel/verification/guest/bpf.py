"""eBPF from Python: bpf(2) for maps and links, bpftool for loading objects.

Numbers: include/uapi/linux/bpf.h of Linux 6.12.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from pathlib import Path

from .check import CheckError, run, step
from .netns import Namespace

OBJECTS = Path("/usr/lib/verify/bpf")
_PINS = Path("/sys/fs/bpf")
_NUMBERS = {"x86_64": 321, "aarch64": 280}
_LOOKUP, _UPDATE, _OBJ_GET, _LINK_CREATE = 1, 2, 7, 28

ATTACH_SK_LOOKUP = 36
ATTACH_XDP = 37
ATTACH_TCX_INGRESS = 46
ATTACH_TCX_EGRESS = 47
ATTACH_NETKIT_PRIMARY = 54
ATTACH_NETKIT_PEER = 55

_libc = ctypes.CDLL(None, use_errno=True)


def _bpf(command: int, attributes: bytes, what: str) -> int:
    buffer = ctypes.create_string_buffer(attributes.ljust(128, b"\0"))
    result = int(_libc.syscall(_NUMBERS[os.uname().machine], command, buffer, 128))
    if result < 0:
        number = ctypes.get_errno()
        raise CheckError(f"bpf(2), {what}: {os.strerror(number)}")
    return result


def pinned(path: Path) -> int:
    """A descriptor of a pinned program or map."""
    name = ctypes.create_string_buffer(str(path).encode())
    return _bpf(_OBJ_GET, struct.pack("QI", ctypes.addressof(name), 0), f"open {path}")


class Map:
    """A pinned map with keys and values of struct formats."""

    def __init__(self, path: Path, key: str = "I", value: str = "Q") -> None:
        self._fd = pinned(path)
        self._key, self._value = key, value
        self._path = path

    def __getitem__(self, key: int | Sequence[int]) -> int:
        """The first field of the value."""
        return int(struct.unpack_from(self._value, self.raw(key))[0])

    def raw(self, key: int | Sequence[int]) -> bytes:
        """The value's bytes."""
        name, found = self._packed(key), ctypes.create_string_buffer(1024)
        attributes = struct.pack("IxxxxQQQ", self._fd, ctypes.addressof(name), ctypes.addressof(found), 0)
        _bpf(_LOOKUP, attributes, f"look {key} up in {self._path.name}")
        return found.raw

    def __setitem__(self, key: int | Sequence[int], value: int | Sequence[int]) -> None:
        name = self._packed(key)
        fields = (value,) if isinstance(value, int) else tuple(value)
        new = ctypes.create_string_buffer(struct.pack(self._value, *fields))
        attributes = struct.pack("IxxxxQQQ", self._fd, ctypes.addressof(name), ctypes.addressof(new), 0)
        _bpf(_UPDATE, attributes, f"put {key} into {self._path.name}")

    def _packed(self, key: int | Sequence[int]) -> ctypes.Array[ctypes.c_char]:
        return ctypes.create_string_buffer(struct.pack(self._key, *((key,) if isinstance(key, int) else key)))


def link(program: Path, target: int, attach: int, what: str) -> int:
    """Attaches a program to an interface (its index) or namespace (its descriptor) as long as the link is open."""
    step(f"attach {program.name}: {what}")
    return _bpf(_LINK_CREATE, struct.pack("IIII", pinned(program), target, attach, 0), f"attach {program.name}, {what}")


class Loaded:
    """The programs of one object file, loaded by bpftool and pinned, with their maps."""

    def __init__(self, name: str, instance: str = "", *options: str) -> None:
        self.object = OBJECTS / f"{name}.o"
        self.programs = _PINS / f"{name}{instance}"
        self.maps = _PINS / f"{name}{instance}-maps"
        run("bpftool", "prog", "loadall", str(self.object), str(self.programs), "pinmaps", str(self.maps), *options)

    def program(self, name: str) -> Path:
        """Where a program is pinned."""
        return self.programs / name

    def map(self, name: str, key: str = "I", value: str = "Q") -> Map:
        """One of the object's maps."""
        return Map(self.maps / name, key, value)


def index(namespace: Namespace, device: str) -> int:
    """An interface's number."""
    return int(namespace.ip_json("link", "show", "dev", device)[0]["ifindex"])
