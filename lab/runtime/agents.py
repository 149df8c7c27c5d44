"""The guest agents beside the containers."""

from __future__ import annotations

import array
import errno
import json
import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import trio

from lab.runtime import children

logger = logging.getLogger("taploom.runtime")

_POLL = 0.004
_BACKOFF = 0.5
_ATTEMPTS = 5
_HEALTHY_AFTER = 2.0


class Zygote:
    """The process that agents are forked from (`lab.runtime.zygote`); it is started again when it ends."""

    def __init__(self) -> None:
        self._socket: trio.socket.SocketType | None = None
        self._lock = trio.Lock()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keeps it running until cancelled."""
        while True:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with ours:
                with theirs:
                    theirs.set_inheritable(True)
                    argv = [sys.executable, "-m", "lab.runtime.zygote", str(theirs.fileno())]
                    child = children.spawn(argv, stdout=2, stderr=2)
                self._socket = trio.socket.from_stdlib_socket(ours.dup())
                task_status.started()
                task_status = trio.TASK_STATUS_IGNORED
                try:
                    code = await child.wait()
                finally:
                    self._socket.close()
            logger.warning("the process that agents are forked from ended (%d); starting it again", code)
            await trio.sleep(0.1)

    async def start(self, argv: Sequence[str], log: Path, netns: int) -> int:
        """Starts an agent in a network namespace; returns its pidfd.

        Raises:
            OSError: it could not be started.
        """
        request = json.dumps({"argv": list(argv), "log": str(log)}).encode()
        answer = b""
        for attempt in range(_ATTEMPTS):
            if attempt:
                await trio.sleep(_BACKOFF)  # it is being started again
            async with self._lock:
                # Shielded: an answer that nobody takes would be the next one's.
                with trio.CancelScope(shield=True):
                    try:
                        answer, pidfd = await self._ask(request, netns)
                    except (OSError, trio.ClosedResourceError) as error:
                        logger.warning("cannot ask for an agent: %s", error)
                        continue
            if pidfd is not None:
                return pidfd
        raise OSError(errno.EIO, f"the agent could not be started: {answer.decode(errors='replace') or 'no answer'}")

    async def _ask(self, request: bytes, netns: int) -> tuple[bytes, int | None]:
        assert self._socket is not None
        descriptors = array.array("i", [netns])
        await self._socket.sendmsg([request], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
        answer, ancillary, _, _ = await self._socket.recvmsg(1 << 16, socket.CMSG_LEN(4))
        for _, _, data in ancillary:
            pidfd = array.array("i", data[:4])[0]
            os.set_inheritable(pidfd, False)
            return answer, pidfd
        return answer, None


class Agent:
    """One container's agent, started again whenever it ends.

    Args:
        directory: where its sockets, and the files that it writes, are.
        netns: its network namespace; stays the caller's.
        log: where its output is appended.
    """

    def __init__(self, zygote: Zygote, directory: Path, netns: int, log: Path) -> None:
        self.control = f"unix:{directory}/control.sock"
        self.data = f"unix:{directory}/data.sock"
        self._zygote = zygote
        self._socket = str(directory / "control.sock")
        self._argv = [
            *("--control", self.control, "--data", self.data, "--state-dir", str(directory)),
            *("--resolv-conf", str(directory / "resolv.conf"), "--hosts", str(directory / "hosts")),
        ]
        self._netns = netns
        self._log = log

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keeps the agent running until cancelled; reports started once it takes connections.

        Raises:
            OSError: it ended before it took any.
        """
        ready = False
        while True:
            began = trio.current_time()
            try:
                pidfd = await self._zygote.start(self._argv, self._log, self._netns)
            except OSError as error:
                if not ready:
                    raise
                logger.error("%s", error)
                await trio.sleep(_BACKOFF)
                continue
            try:
                if not ready:
                    await self._until_it_listens(pidfd)
                    task_status.started()
                    ready = True
                await trio.lowlevel.wait_readable(pidfd)
            finally:
                with trio.CancelScope(shield=True):
                    if children.kill(pidfd):
                        await trio.lowlevel.wait_readable(pidfd)
                os.close(pidfd)
            lived = trio.current_time() - began
            logger.warning("the agent of %s ended after %.1f s; starting it again", Path(self._socket).parent, lived)
            if lived < _HEALTHY_AFTER:
                await trio.sleep(_BACKOFF)

    async def _until_it_listens(self, pidfd: int) -> None:
        """Also the connection's other end is closed again: an agent takes that as a peer that thought better of it."""
        while True:
            with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                try:
                    await probe.connect(self._socket)
                    return
                except OSError as error:
                    if error.errno not in (errno.ENOENT, errno.ECONNREFUSED):
                        raise
            with trio.move_on_after(_POLL):
                await trio.lowlevel.wait_readable(pidfd)
                raise OSError(errno.EIO, f"the agent ended at its start; see {self._log}")
