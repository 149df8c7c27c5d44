"""Finding and removing what belongs to a lab, whoever started it and whoever died since."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import time
from pathlib import Path

from lab.state import MARKER, ROOT, Lab, LabError

NETNS = Path("/run/netns")
_MNT_DETACH = 2


def processes(lab: Lab) -> list[int]:
    """The pids of every process of the lab.

    They are found by the marker in their environment, and those of containers, whose environment is their own, by
    the lab's files that are mounted where they are.
    """
    marker = f"{MARKER}={lab.path}".encode()
    mounted = f"upperdir={lab.containers}/".encode()
    own = Path("/proc/self/ns/mnt").stat().st_ino
    of_lab = {own: False}  # by mount namespace
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if marker in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
                continue
            namespace = (entry / "ns/mnt").stat().st_ino
            if namespace not in of_lab:
                of_lab[namespace] = mounted in (entry / "mountinfo").read_bytes()
        except OSError:  # it has just ended
            continue
        if of_lab[namespace]:
            found.append(int(entry.name))
    return found


def namespaces(lab: Lab) -> list[str]:
    """The names of the lab's network namespaces."""
    if not NETNS.is_dir():
        return []
    return sorted(path.name for path in NETNS.iterdir() if path.name.startswith(lab.netns_prefix))


def remove_netns(name: str) -> None:
    """Removes a named network namespace; nothing when it is not there."""
    path = NETNS / name
    libc = ctypes.CDLL(None, use_errno=True)
    libc.umount2(os.fsencode(path), _MNT_DETACH)  # fails where it is a leftover file, which the next line removes
    path.unlink(missing_ok=True)


def stop(lab: Lab, timeout: float = 15.0) -> None:
    """Ends every process of the lab: orderly when its supervisor lives, by force otherwise.

    Raises:
        LabError: a process did not end within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    supervisor = lab.supervisor_pid()
    if supervisor is not None:
        fd = os.pidfd_open(supervisor)
        try:
            signal.pidfd_send_signal(fd, signal.SIGTERM)
            _wait(fd, min(timeout, 8.0))
        except ProcessLookupError:
            pass
        finally:
            os.close(fd)
    while remaining := processes(lab):
        if time.monotonic() > deadline:
            raise LabError(
                f"processes {remaining} of lab {lab.name!r} do not end; look at them, then try 'lab down' again"
            )
        for pid in remaining:
            try:
                fd = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            try:
                signal.pidfd_send_signal(fd, signal.SIGKILL)
                _wait(fd, 1.0)
            except ProcessLookupError:
                pass
            finally:
                os.close(fd)


def remove(lab: Lab) -> None:
    """Removes the namespaces and files of a lab whose processes have ended."""
    for name in namespaces(lab):
        remove_netns(name)
    shutil.rmtree(lab.path, ignore_errors=True)
    (ROOT / f".{lab.name}.lock").unlink(missing_ok=True)
    if ROOT.is_dir() and not any(ROOT.iterdir()):
        ROOT.rmdir()


def _wait(pidfd: int, timeout: float) -> None:
    import select

    select.select([pidfd], [], [], timeout)
