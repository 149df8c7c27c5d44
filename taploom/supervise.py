"""Child processes that are kept running.

Used by the helper agent (OVS, OVN, dnsmasq) and by the lab (agents). Linux only: processes are waited for by pidfd
(pidfd_open(2)) and die with their parent (PR_SET_PDEATHSIG, prctl(2)).
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import trio

from taploom.children import Adopted, add_nice, die_with

logger = logging.getLogger("taploom.supervise")

State = Literal["starting", "running", "down"]

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)

# A process that lived this long is healthy: its next end is answered at once.
_HEALTHY_AFTER = 2.0
_FIRST_BACKOFF = 0.05
_STOP_TIMEOUT = 3.0


class SupervisedProcess:
    """A child process that is started again whenever it ends.

    The first restart is immediate; a process that keeps ending within 2 s is restarted with a back-off that doubles
    from 50 ms to `backoff_max`.

    Args:
        name: what it is called in logs and status.
        argv: the program and its arguments.
        env: its whole environment; None inherits ours.
        log: where its standard output and error are appended.
        netns: a network namespace to start in: a name under /run/netns or an absolute path to pin one
            (such as /proc/self/fd/N).
        new_netns: start in a new network namespace of its own.
        nice: added to our own niceness; below 0 it comes before others, where we may do that (CAP_SYS_NICE).
        backoff_max: the longest pause between restarts, in seconds.
        ready: returns once the process answers; None: it is ready when started. Cancelled if the process ends.
        on_change: called (in the trio thread) after each change of `state`.
        prepare: called in the parent before each start, to clean up what the last run left.
        adopt: the process id of a child of ours, run already as `argv` and the rest say: it is taken over in place of
            the first start. 0: there is none.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        netns: str | None = None,
        new_netns: bool = False,
        nice: int = 0,
        backoff_max: float = 5.0,
        ready: Callable[[], Awaitable[None]] | None = None,
        on_change: Callable[[SupervisedProcess], None] | None = None,
        prepare: Callable[[], None] | None = None,
        adopt: int = 0,
    ) -> None:
        self.name = name
        self.argv = list(argv)
        self.state: State = "down"
        self.pid = 0
        self.restarts = 0
        self.last_exit = ""
        self.started_at: datetime | None = None
        self._log = log
        self._env = dict(env) if env is not None else None
        self._netns = netns
        self._new_netns = new_netns
        self._nice = nice
        self._backoff_max = backoff_max
        self._ready = ready
        self._on_change = on_change
        self._prepare = prepare
        self._adopt = adopt
        self._process: subprocess.Popen[bytes] | Adopted | None = None
        self._became_ready = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keeps the process running until cancelled; reports started when it is ready for the first time.

        Raises:
            FileNotFoundError: the program is not there.
        """
        backoff = 0.0
        reported = False
        while True:
            if self._adopt:
                process = self._started(Adopted(self._adopt))
                self._adopt = 0
            else:
                if self._prepare is not None:
                    self._prepare()
                process = self._started(self._start())
            began = time.monotonic()
            pidfd = os.pidfd_open(process.pid)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._probe, nursery.cancel_scope)
                    if not reported:
                        nursery.start_soon(self._report, task_status)
                    await trio.lowlevel.wait_readable(pidfd)
                    reported = reported or self._became_ready.is_set()
                    nursery.cancel_scope.cancel()
            except BaseException:
                await self._stop(process, pidfd)
                raise
            finally:
                os.close(pidfd)
            self.last_exit = _describe(process.wait())
            self._process, self.pid = None, 0
            if self._became_ready.is_set():  # an unset one may have waiters
                self._became_ready = trio.Event()
            self._set("down")
            backoff = (
                0.0
                if time.monotonic() - began > _HEALTHY_AFTER
                else min(self._backoff_max, max(_FIRST_BACKOFF, backoff * 2))
                if backoff or self.restarts
                else 0.0
            )
            logger.warning("%s %s; starting it again in %.2f s", self.name, self.last_exit, backoff)
            if backoff:
                await trio.sleep(backoff)
            self.restarts += 1

    async def wait_ready(self) -> None:
        """Returns once the process is ready (again)."""
        await self._became_ready.wait()

    def kill(self, signum: signal.Signals = signal.SIGTERM) -> None:
        """Sends a signal; the process is started again when that ends it. Nothing when it is not running."""
        if self._process is not None:
            self._process.send_signal(signum)

    def _start(self) -> subprocess.Popen[bytes]:
        parent = os.getpid()
        netns = self._netns
        if netns is not None and not netns.startswith("/"):
            netns = f"/run/netns/{netns}"
        new_netns = self._new_netns
        nice = self._nice

        def in_child() -> None:
            die_with(parent)
            add_nice(nice)
            if netns is not None:
                fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
                if _libc.setns(fd, _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), f"setns {netns}")
                os.close(fd)
            if new_netns and _libc.unshare(_CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "unshare")

        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            # From this thread, not by trio.run_process: PDEATHSIG fires when the *thread* that forked ends, and trio
            # forks in worker threads, which end when idle.
            return subprocess.Popen(
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._env,
                preexec_fn=in_child,  # noqa: PLW1509 -- it makes system calls only; no lock is taken
                start_new_session=True,
            )

    def _started(self, process: subprocess.Popen[bytes] | Adopted) -> subprocess.Popen[bytes] | Adopted:
        self._process, self.pid = process, process.pid
        self.started_at = datetime.now(UTC)
        self._set("starting")
        return process

    async def _probe(self, scope: trio.CancelScope) -> None:
        if self._ready is not None:
            await self._ready()
        if not scope.cancel_called:
            self._set("running")
            self._became_ready.set()

    async def _report(self, task_status: trio.TaskStatus[None]) -> None:
        await self._became_ready.wait()
        task_status.started()

    async def _stop(self, process: subprocess.Popen[bytes] | Adopted, pidfd: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with trio.CancelScope(shield=True):
            with trio.move_on_after(_STOP_TIMEOUT):
                await trio.lowlevel.wait_readable(pidfd)
            process.kill()
            await trio.lowlevel.wait_readable(pidfd)
        self.last_exit = _describe(process.wait())
        self._process, self.pid = None, 0
        self._set("down")

    def _set(self, state: State) -> None:
        if state != self.state:
            self.state = state
            if self._on_change is not None:
                self._on_change(self)


def _describe(returncode: int) -> str:
    if returncode < 0:
        try:
            return f"was ended by {signal.Signals(-returncode).name}"
        except ValueError:
            return f"was ended by signal {-returncode}"
    return f"ended with exit code {returncode}"
