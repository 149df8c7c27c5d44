"""Child processes, waited for by pidfd.

The runtime is the first process of its PID namespace, so that what crun leaves behind becomes its child too. Nothing
here may wait for just any child (SIGCHLD handlers, `subprocess`): each is waited for by who knows it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

import trio

# Python ignores these; programs expect them as they were.
_DEFAULT_SIGNALS = (signal.SIGPIPE, signal.SIGXFSZ)


def spawn(
    argv: Sequence[str],
    *,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    env: Mapping[str, str] | None = None,
) -> int:
    """Starts a program by its path; returns its pid. Streams that are not given are /dev/null."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        actions = [
            (os.POSIX_SPAWN_DUP2, null if given is None else given, number)
            for number, given in enumerate((stdin, stdout, stderr))
        ]
        return os.posix_spawn(
            argv[0],
            list(argv),
            os.environ if env is None else env,
            file_actions=actions,
            setsigdef=_DEFAULT_SIGNALS,
            setsigmask=(),
        )
    finally:
        os.close(null)


async def wait(pidfd: int) -> int:
    """The exit code of a child of ours when it has ended, negative for a signal; the child is gone after that."""
    await trio.lowlevel.wait_readable(pidfd)
    result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)  # noqa: ASYNC222 -- it has ended
    assert result is not None
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


async def run(
    argv: Sequence[str],
    *,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    env: Mapping[str, str] | None = None,
) -> int:
    """Runs a program to its end and returns its exit code, negative for a signal; ends it when cancelled."""
    pidfd = os.pidfd_open(spawn(argv, stdin=stdin, stdout=stdout, stderr=stderr, env=env))
    try:
        try:
            return await wait(pidfd)
        except BaseException:
            with trio.CancelScope(shield=True):
                kill(pidfd)
                await wait(pidfd)
            raise
    finally:
        os.close(pidfd)


def kill(pidfd: int, signum: int = signal.SIGKILL) -> bool:
    """Sends a signal; False when the process is gone."""
    try:
        signal.pidfd_send_signal(pidfd, signum)
    except ProcessLookupError:
        return False
    return True


class MachinePids:
    """Pids as the machine sees them.

    Args:
        proc: the machine's own /proc, opened before the runtime got a PID namespace.
    """

    def __init__(self, proc: int) -> None:
        self._proc = proc

    def pid(self, pidfd: int) -> int:
        """The pid; 0 when the process is gone (proc(5): /proc/PID/fdinfo of a pidfd)."""
        fd = os.open(f"self/fdinfo/{pidfd}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._proc)
        with open(fd) as file:  # noqa: PTH123 -- a descriptor
            for line in file:
                name, _, value = line.partition(":")
                if name == "Pid":
                    return max(int(value), 0)
        return 0


def program(name: str) -> str:
    """A program's path. FileNotFoundError with what to install when it is not there."""
    for directory in (*os.environ.get("PATH", "").split(":"), "/usr/sbin", "/usr/bin", "/sbin", "/bin"):
        path = Path(directory, name)
        if directory and os.access(path, os.X_OK):
            return str(path)
    raise FileNotFoundError(f"{name} is not installed: run 'make setup'")
