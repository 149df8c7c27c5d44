"""A client for QEMU's machine protocol: one connection, one command at a time, events kept.

Source: https://www.qemu.org/docs/master/interop/qmp-spec.html
"""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import trio

from lab.vm.errors import MachineError

_CHUNK = 64 * 1024
_MAX_LINE = 4 << 20


class QmpError(MachineError):
    """QEMU refused a command, or is gone."""


class Qmp:
    """A connection on which commands can be given."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._received = bytearray()
        self._events: deque[dict[str, Any]] = deque()

    async def negotiate(self) -> None:
        """Reads the greeting and enters command mode."""
        greeting = await self._message()
        if "QMP" not in greeting:
            raise QmpError(f"not QEMU's machine protocol: {greeting}")
        await self.execute("qmp_capabilities")

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Gives a command; returns what QEMU returns.

        Raises:
            QmpError: QEMU refused it, with its words, or is gone.
        """
        message = {"execute": command, **({"arguments": arguments} if arguments else {})}
        try:
            await self._stream.send_all(json.dumps(message).encode() + b"\n")
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise QmpError(f"{command}: QEMU has ended") from None
        while True:
            answer = await self._message()
            if "event" in answer:
                self._events.append(answer)
            elif "error" in answer:
                raise QmpError(f"{command}: {answer['error'].get('desc', answer['error'])}")
            else:
                return answer.get("return")

    async def event(self, name: str) -> dict[str, Any]:
        """The data of the next event of that name; those before it are dropped."""
        while True:
            event = self._events.popleft() if self._events else await self._message()
            if event.get("event") == name:
                data = event.get("data", {})
                assert isinstance(data, dict)
                return data

    async def _message(self) -> dict[str, Any]:
        while True:
            line, newline, rest = self._received.partition(b"\n")
            if newline:
                self._received = rest
                message = json.loads(line)
                assert isinstance(message, dict)
                return message
            if len(self._received) > _MAX_LINE:
                raise QmpError("QEMU sent a line without an end")
            try:
                data = await self._stream.receive_some(_CHUNK)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                data = b""
            if not data:
                raise QmpError("QEMU has ended")
            self._received += data


@contextlib.asynccontextmanager
async def open_qmp(path: Path) -> AsyncIterator[Qmp]:
    """A connection to the QEMU that listens there.

    Raises:
        QmpError: it does not.
    """
    try:
        stream = await trio.open_unix_socket(path)
    except OSError as error:
        raise QmpError(f"no QEMU answers on {path}: {error.strerror}") from error
    async with stream:
        qmp = Qmp(stream)
        await qmp.negotiate()
        yield qmp
