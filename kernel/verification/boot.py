"""Boots the machine and follows it to its end."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from kernel.verification.guest.checks.base import VSOCK_PORT_GUEST, VSOCK_PORT_HOST
from kernel.verification.report import Report
from lab.vm.machine import Machine, RunningMachine, running

MEMORY_MIB = 1536
_POLL = 0.1


async def follow(
    machine: Machine, report: Report, heard: Callable[[dict[str, Any]], None], *, silence: float, limit: float
) -> str:
    """Runs the machine, feeding the report with its console.

    Args:
        machine: with the initramfs of `image.build`.
        report: where what it says goes.
        heard: called with each message.
        silence: seconds without a message after which it is given up.
        limit: seconds that it may take in all.

    Returns:
        "" when it ran to its end, else why it did not.
    """
    async with running(machine) as vm, trio.open_nursery() as nursery:
        nursery.start_soon(_answer_vsock, vm)
        why = await _read_console(vm, report, heard, silence, limit)
        nursery.cancel_scope.cancel()
    return why


async def _read_console(
    vm: RunningMachine, report: Report, heard: Callable[[dict[str, Any]], None], silence: float, limit: float
) -> str:
    start = last = trio.current_time()
    with vm.console.open(errors="replace") as console:
        while True:
            gone = vm.exited  # before reading: what it said last is read, too
            text = console.read()
            for message in report.feed(text):
                heard(message)
                last = trio.current_time()
            if report.ended:
                return ""
            now = trio.current_time()
            if gone:
                return "the machine ended by itself"
            if now - last > silence:
                return f"the machine said nothing new for {now - last:.0f} s"
            if now - start > limit:
                return f"it took more than {limit:g} s, the limit"
            await trio.sleep(_POLL)


async def _answer_vsock(vm: RunningMachine) -> None:
    """The host's half of the check vsock-host: who dials is dialled back, with its word."""
    path = Path(f"{vm.machine.device_socket}_{VSOCK_PORT_HOST}")
    await trio.Path(path).unlink(missing_ok=True)  # of an earlier run in a directory that was kept
    with trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM) as listener:
        await listener.bind(str(path))
        listener.listen()  # the directory is ours alone (0700)
        while True:
            sock, _ = await listener.accept()
            with contextlib.suppress(OSError, trio.BrokenResourceError, trio.ClosedResourceError):
                async with trio.SocketStream(sock) as asked:
                    word = await _line(asked)
                    async with await vm.wait_connect(VSOCK_PORT_GUEST) as back:
                        await back.send_all(word)
                        await asked.send_all(await _line(back))
                        await asked.receive_some(1)  # until it hangs up: what was sent is not cut off


async def _line(stream: trio.SocketStream) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        part = await stream.receive_some(1000)
        if not part:
            break
        line += part
    return line


@contextlib.contextmanager
def directory(keep: Path | None) -> Any:
    """A directory for the machine's sockets and console; removed afterwards unless it was given."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="taploom-verify-") as made:
        yield Path(made)
