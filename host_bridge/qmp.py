"""One command to a QEMU, over its machine protocol, on a connection of its own: the socket takes one client at a time.

Source: https://www.qemu.org/docs/master/interop/qmp-spec.html
"""

from __future__ import annotations

import json
from typing import Any

import trio

from taploom.address import UnixAddress, connect

_TIMEOUT = 5.0
_MAX_LINE = 1 << 20


class QmpError(Exception):
    """QEMU does not answer there, or refused; the message says which."""


async def execute(path: str, command: str, **arguments: Any) -> Any:
    """Gives the command to the QEMU that listens at the path (`-qmp unix:PATH,server=on,wait=off`); what it returns.

    Raises:
        QmpError: it refused the command, or does not answer within 5 s.
    """
    with trio.move_on_after(_TIMEOUT):
        try:
            async with await connect(UnixAddress(path)) as stream:
                lines = _Lines(stream)
                if "QMP" not in await lines.read():
                    raise QmpError(f"who listens at {path} does not speak QEMU's machine protocol")
                await _ask(stream, lines, "qmp_capabilities", {})
                return await _ask(stream, lines, command, arguments)
        except (OSError, trio.BrokenResourceError) as error:
            reason = error.strerror if isinstance(error, OSError) else None
            raise QmpError(f"QEMU does not answer at {path}: {reason or error}") from error
    raise QmpError(f"QEMU does not answer at {path} in time")


async def _ask(stream: trio.SocketStream, lines: _Lines, command: str, arguments: dict[str, Any]) -> Any:
    await stream.send_all(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
    while True:
        answer = await lines.read()
        if "error" in answer:
            raise QmpError(f"QEMU refuses {command}: {answer['error']}")
        if "return" in answer:  # all else are events
            return answer["return"]


class _Lines:
    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._received = b""

    async def read(self) -> dict[str, Any]:
        while b"\n" not in self._received:
            data = await self._stream.receive_some(65536)
            if not data or len(self._received) > _MAX_LINE:
                raise QmpError("QEMU has closed the connection, or sent a line without an end")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError as error:
            raise QmpError(f"QEMU sent what is no JSON: {error}") from error
        if not isinstance(message, dict):
            raise QmpError("QEMU sent what is no message")
        return message
