"""A VM that is kept running: its QEMU and its vhost-device-vsock."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import trio

from lab.vm import device
from lab.vm.errors import MachineError
from lab.vm.machine import Machine
from taploom.address import connect, parse_address
from taploom.supervise import SupervisedProcess

logger = logging.getLogger("taploom.lab")

_POLL = 0.05
_PANIC_POLL = 0.5


class KeptMachine:
    """A machine whose processes are started again whenever they end.

    A VM whose QEMU ended boots anew. A VM whose vhost-device-vsock ended goes on and gets a new device; when it does
    not take that, it boots anew.

    Args:
        name: what its QEMU is called in logs and status; its vsock is NAME/vsock.
        port: it is ready when it takes connections there.
        logs: where the processes' output goes: NAME.log and NAME-vsock.log, with dashes for slashes.
        netns: QEMU's network namespace.
    """

    def __init__(
        self,
        name: str,
        machine: Machine,
        port: int,
        *,
        logs: Path,
        env: Mapping[str, str],
        netns: str | None,
        on_change: Callable[[SupervisedProcess], None],
    ) -> None:
        self.machine = machine
        self._port = port
        self._on_change = on_change
        self._lost = False  # QEMU runs with a device whose process has ended
        base = name.replace("/", "-")
        self._vsock_log = logs / f"{base}-vsock.log"
        self.vsock = SupervisedProcess(
            f"{name}/vsock",
            machine.vsock_command(),
            env=env,
            log=self._vsock_log,
            backoff_max=0.5,
            prepare=machine.prepare_vsock,
            ready=self._vsock_ready,
            on_change=self._vsock_changed,
        )
        self.qemu = SupervisedProcess(
            name,
            machine.qemu_command(),
            env=env,
            log=logs / f"{base}.log",
            netns=netns,
            backoff_max=0.5,
            prepare=self._prepare_qemu,
            ready=self._qemu_ready,
            on_change=on_change,
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keeps it running until cancelled; reports started when it was ready for the first time."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.vsock.run)
            nursery.start_soon(self._end_wedged)
            await nursery.start(self.qemu.run)
            task_status.started()

    def _prepare_qemu(self) -> None:
        self.machine.prepare_qemu()
        self._lost = False
        if not device.serves(self.vsock.pid):
            self.vsock.kill(signal.SIGKILL)

    async def _qemu_ready(self) -> None:
        await self.machine.wait_qmp()
        while True:
            try:
                await self.machine.open_vsock(self.vsock.pid)
                break
            except MachineError as error:  # it is ending, or its device is being replaced
                logger.debug("%s: %s", self.qemu.name, error)
                await trio.sleep(_POLL)
        while True:
            try:
                await trio.aclose_forcefully(await connect(parse_address(self.machine.address(self._port))))
                return
            except OSError:
                await trio.sleep(_POLL)

    def _vsock_changed(self, process: SupervisedProcess) -> None:
        if process.state == "down":
            self.machine.vsock_socket.unlink(missing_ok=True)
            self._lost = bool(self.qemu.pid)
        self._on_change(process)

    async def _vsock_ready(self) -> None:
        await self.machine.wait_vsock_listens(self.vsock.pid)
        if not self._lost:
            return
        try:
            await self.machine.replace_vsock()
            await self.machine.open_vsock(self.vsock.pid)
            logger.warning("%s has a new vsock device", self.qemu.name)
        except MachineError as error:
            logger.error("%s boots anew: %s", self.qemu.name, error)
            self.qemu.kill(signal.SIGKILL)
        self._lost = False

    async def _end_wedged(self) -> None:
        read = self._vsock_log.stat().st_size
        while True:
            await self.vsock.wait_ready()
            pid = self.vsock.pid
            read = await until_wedged(pid, self._vsock_log, read)
            if pid and self.vsock.pid == pid and Path(f"/proc/{pid}/task").exists():  # it has not just ended itself
                logger.warning("%s lost a thread; see %s", self.vsock.name, self._vsock_log)
                self.vsock.kill(signal.SIGKILL)
            await trio.sleep(_PANIC_POLL)


async def until_wedged(pid: int, log: Path, start: int = 0) -> int:
    """Returns once a vhost-device-vsock has lost a thread, by a panic or without a word: it stays, and answers nobody.

    Args:
        pid: its process.
        log: what it says.
        start: how many bytes of that are older.

    Returns:
        How many bytes were read.
    """
    while True:
        with log.open("rb") as file:
            file.seek(start)
            said = file.read()
        whole = said.rfind(b"\n") + 1
        start += whole
        if b"panicked at" in said[:whole] or not device.serves(pid):
            return start
        await trio.sleep(_PANIC_POLL)
