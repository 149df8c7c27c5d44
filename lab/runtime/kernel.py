"""System calls that Python 3.11 has no function for. Linux only; all need root."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import stat
import struct
import threading
from pathlib import Path

CLONE_NEWNS = 0x00020000
CLONE_NEWNET = 0x40000000
CLONE_NEWPID = 0x20000000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
_MNT_DETACH = 2

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_SIOCSIFFLAGS = 0x8914  # linux/sockios.h
_IFF_UP = 1
_SYS_OPENAT2 = 437  # the same number on every architecture (linux 5.6)
_RESOLVE_IN_ROOT = 0x10
_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    """unshare(2)."""
    _check(_libc.unshare(flags), "unshare")


def setns(fd: int, kind: int) -> None:
    """setns(2)."""
    _check(_libc.setns(fd, kind), "setns")


def die_with_parent(signum: int) -> None:
    """This process gets the signal when the thread that forked it ends (PR_SET_PDEATHSIG, prctl(2))."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signum, 0, 0, 0), "prctl")


def name_process(name: str) -> None:
    """What ps and top call this process: up to 15 bytes (PR_SET_NAME, prctl(2))."""
    _libc.prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode()), 0, 0, 0)


def mount(source: str, target: Path, kind: str, flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    result = _libc.mount(
        os.fsencode(source), os.fsencode(target), kind.encode() or None, ctypes.c_ulong(flags), data.encode() or None
    )
    _check(result, f"mount {kind or source} on {target}")


def unmount(target: Path) -> None:
    """Takes the mount out of sight at once; nothing when there is none (umount2(2), MNT_DETACH)."""
    _libc.umount2(os.fsencode(target), _MNT_DETACH)


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def read_in_root(root: Path, path: str, limit: int = 1 << 20) -> bytes:
    """The first `limit` bytes of a regular file, with every symbolic link resolved inside `root` (openat2(2)).

    Raises OSError, also when it is no regular file.
    """
    root_fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        how = _OpenHow(os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, 0, _RESOLVE_IN_ROOT)
        fd = _check(
            _libc.syscall(
                ctypes.c_long(_SYS_OPENAT2),
                ctypes.c_int(root_fd),
                ctypes.c_char_p(os.fsencode(path.lstrip("/"))),
                ctypes.byref(how),
                ctypes.c_size_t(ctypes.sizeof(how)),
            ),
            path,
        )
    finally:
        os.close(root_fd)
    with open(fd, "rb") as file:  # noqa: PTH123 -- a descriptor
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(f"{path} is no regular file")
        return file.read(limit)


def new_network_namespace(sysctls: dict[str, str]) -> int:
    """A new network namespace that lives as long as the returned file descriptor or a process in it.

    Its loopback interface is up. `sysctls` are written in it: paths below /proc/sys and their values. Blocks for some
    milliseconds.
    """
    created: list[int | OSError] = []

    def create() -> None:
        try:
            unshare(CLONE_NEWNET)  # of this thread only
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as any_socket:
                fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", _IFF_UP))  # netdevice(7)
            for name, value in sysctls.items():
                Path("/proc/sys", name).write_text(value)
            created.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            created.append(error)

    thread = threading.Thread(target=create, name="netns")  # it ends with its namespace: no worker is to get into it
    thread.start()
    thread.join()
    if isinstance(created[0], OSError):
        raise created[0]
    return created[0]
