"""Larger receive buffers for the packet sockets by which the userspace data path reads its ports.

ovs-vswitchd reads a system port from an AF_PACKET socket and leaves its buffer at the kernel's default of 208 KiB. That
is three 64 KiB TSO frames: a TCP sender overruns it at once, and every tenth frame is lost. The default is the whole
machine's, not ours to change, so the sockets are set one by one, through pidfd_getfd(2) (Linux 5.6).
"""

from __future__ import annotations

import ctypes
import os
import socket
from pathlib import Path

_SYS_PIDFD_GETFD = 438  # the same on every architecture
_SO_RCVBUFFORCE = 33  # asm-generic/socket.h: not held to net.core.rmem_max
RECEIVE_BUFFER = 8 * 1024 * 1024  # bytes; the kernel counts twice that, for its own overhead
_libc = ctypes.CDLL(None, use_errno=True)


def enlarge_packet_sockets(pid: int, done: set[str], size: int = RECEIVE_BUFFER) -> int:
    """Gives every AF_PACKET socket of a process a receive buffer of at least `size` bytes.

    Args:
        done: the process's sockets that were dealt with before, to be passed over; brought up to date.

    Returns:
        How many sockets were changed. A process or socket that ends meanwhile is passed over.

    Raises:
        OSError: the kernel refuses (no pidfd_getfd, or not our child and no CAP_SYS_PTRACE).
    """
    changed = 0
    found: set[str] = set()
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return 0
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                name = str(entry.readlink())
            except OSError:  # closed since
                continue
            if not name.startswith("socket:"):
                continue
            found.add(name)
            if name in done:
                continue
            fd = _libc.syscall(_SYS_PIDFD_GETFD, pidfd, int(entry.name), 0)
            if fd < 0:
                error = ctypes.get_errno()
                if Path(f"/proc/{pid}/fd/{entry.name}").exists():
                    raise OSError(error, os.strerror(error), "pidfd_getfd")
                continue
            with socket.socket(fileno=fd) as sock:
                # The value that is read back is twice the one that was set (socket(7)).
                if sock.family == socket.AF_PACKET and sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) < 2 * size:
                    sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, size)
                    changed += 1
            done.add(name)
    except FileNotFoundError:  # the process ended
        pass
    finally:
        os.close(pidfd)
    done &= found
    return changed
