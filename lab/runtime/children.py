"""Child processes.

The runtime is the first process of its PID namespace, so that what crun leaves behind becomes its child too: processes
of containers, and helpers of its own that nobody waits for. The former are waited for by pidfd, by who knows them; the
latter are taken away by `reap`, for a container's namespace does not end before all that was in it has been waited for.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

# Python ignores these; programs expect them as they were.
_DEFAULT_SIGNALS = (signal.SIGPIPE, signal.SIGXFSZ)


# The children that somebody here waits for.
_known: set[int] = set()
# How unknown children ended, for who gets to know them too late.
_strangers: OrderedDict[int, int] = OrderedDict()
_MAX_STRANGERS = 256
_ADOPTION_POLL = 0.001


@dataclass(frozen=True)
class Child:
    """A child that has not been waited for yet; `wait` for it exactly once."""

    pid: int
    pidfd: int

    async def wait(self) -> int:
        """Its exit code when it has ended, negative for a signal; it is gone after that."""
        if self.pidfd < 0:
            await trio.lowlevel.checkpoint()
            return _strangers.pop(self.pid)
        await trio.lowlevel.wait_readable(self.pidfd)
        while True:
            try:
                result = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)  # noqa: ASYNC222 -- it has ended
                break
            except ChildProcessError:
                # It is not ours yet: it is left to us by a process of crun's that outlives crun for a moment.
                await trio.sleep(_ADOPTION_POLL)
        assert result is not None
        _known.discard(self.pid)
        os.close(self.pidfd)
        return _exit_code(result)

    def kill(self, signum: int = signal.SIGKILL) -> bool:
        """Sends a signal; False when it is gone."""
        return self.pidfd >= 0 and kill(self.pidfd, signum)


def adopt(pid: int) -> Child:
    """A child that crun has left us. ProcessLookupError when there was no such child."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        if pid not in _strangers:
            raise
        return Child(pid, -1)
    _known.add(pid)
    return Child(pid, pidfd)


def reap() -> None:
    """Waits for the children that have ended and that nobody knows."""
    for text in Path("/proc/self/task", str(os.getpid()), "children").read_text().split():
        pid = int(text)
        if pid in _known:
            continue
        with contextlib.suppress(ChildProcessError):
            result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
            if result is not None:
                _strangers[pid] = _exit_code(result)
                _strangers.move_to_end(pid)
                if len(_strangers) > _MAX_STRANGERS:
                    _strangers.popitem(last=False)


def _exit_code(result: os.waitid_result) -> int:
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


def spawn(
    argv: Sequence[str],
    *,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    env: Mapping[str, str] | None = None,
) -> Child:
    """Starts a program by its path. Streams that are not given are /dev/null."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        actions = [
            (os.POSIX_SPAWN_DUP2, null if given is None else given, number)
            for number, given in enumerate((stdin, stdout, stderr))
        ]
        return adopt(
            os.posix_spawn(
                argv[0],
                list(argv),
                os.environ if env is None else env,
                file_actions=actions,
                setsigdef=_DEFAULT_SIGNALS,
                setsigmask=(),
            )
        )
    finally:
        os.close(null)


async def run(
    argv: Sequence[str],
    *,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    env: Mapping[str, str] | None = None,
) -> int:
    """Runs a program to its end and returns its exit code, negative for a signal; ends it when cancelled."""
    child = spawn(argv, stdin=stdin, stdout=stdout, stderr=stderr, env=env)
    try:
        return await child.wait()
    except trio.Cancelled:
        with trio.CancelScope(shield=True):
            child.kill()
            await child.wait()
        raise


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

    def pid(self, child: Child) -> int:
        """Its pid; 0 when it is gone (proc(5): /proc/PID/fdinfo of a pidfd)."""
        if child.pidfd < 0:
            return 0
        fd = os.open(f"self/fdinfo/{child.pidfd}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._proc)
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
