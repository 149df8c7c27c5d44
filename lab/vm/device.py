"""How a vhost-device-vsock is, seen from outside: it says little, and has no interface for it.

In version 0.3 the thread that serves the queues ends, without a word, when something comes from the host while the
queues are not set up: before the VM's driver is ready, and while QEMU is setting them up on the driver's word. The
process then stays and answers nobody.
"""

from __future__ import annotations

from pathlib import Path

_WORKER = "vring_worker"
_RECVMSG = ("47", "212")  # the system call's number on x86_64 and on arm64


def serves(pid: int) -> bool:
    """Whether the thread that serves the queues is there; False also when the process is not."""
    return any(_read(task / "comm") == _WORKER for task in _tasks(pid))


def has_taken_all(pid: int) -> bool:
    """Whether all that QEMU has told it is done: its other thread waits for the next message (proc(5), syscall)."""
    return any(_read(task / "syscall").split(" ")[0] in _RECVMSG for task in _tasks(pid))


def _tasks(pid: int) -> list[Path]:
    try:
        return list(Path(f"/proc/{pid}/task").iterdir()) if pid else []
    except OSError:
        return []


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
