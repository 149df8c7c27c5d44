"""Child processes that end with the one that started them. Imports next to nothing: an agent starts some before all
else. Linux only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1  # prctl(2)
_libc = ctypes.CDLL(None, use_errno=True)


def die_with(parent: int) -> None:
    """To be called in a child between fork and exec: it is killed when the thread that forked it ends.

    Args:
        parent: the process id of who forked it. When that is gone already, the child ends here, with 127.
    """
    if _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) or os.getppid() != parent:
        os._exit(127)


def add_nice(increment: int) -> None:
    """To be called in a child between fork and exec: nice(2). Where that is not allowed, nothing is changed."""
    if increment:
        with contextlib.suppress(OSError):
            os.nice(increment)


class Adopted:
    """A child process that was started without `subprocess`: of its Popen, what supervision needs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._returncode: int | None = None

    def wait(self) -> int:
        """Its exit code, negative for a signal, once it has ended."""
        if self._returncode is None:
            self._returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._returncode

    def send_signal(self, number: int) -> None:
        """Does nothing once its end was waited for."""
        if self._returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
