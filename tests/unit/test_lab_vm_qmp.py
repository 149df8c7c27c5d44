"""QEMU's machine protocol, spoken to a peer that answers as QEMU does."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from lab.vm.qmp import QmpError, open_qmp

Answer = Callable[[dict[str, Any]], list[dict[str, Any]]]
GREETING = {"QMP": {"version": {"qemu": {"major": 7}}, "capabilities": []}}


@asynccontextmanager
async def qemu(path: Path, answer: Answer) -> AsyncIterator[None]:
    """A QMP server; `answer` gives what it sends for each command."""
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(str(path))
    listener.listen(1)

    async def serve() -> None:
        peer, _ = await listener.accept()
        async with trio.SocketStream(peer) as stream:
            await stream.send_all(json.dumps(GREETING).encode() + b"\r\n")
            received = b""
            while data := await stream.receive_some():
                received += data
                while b"\n" in received:
                    line, _, received = received.partition(b"\n")
                    command = json.loads(line)
                    for message in [{"return": {}}] if command["execute"] == "qmp_capabilities" else answer(command):
                        await stream.send_all(json.dumps(message).encode() + b"\r\n")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        yield
        nursery.cancel_scope.cancel()
    listener.close()


async def test_commands_are_answered_and_events_kept(tmp_path: Path) -> None:
    def answer(command: dict[str, Any]) -> list[dict[str, Any]]:
        assert command == {"execute": "device_del", "arguments": {"id": "x"}}
        return [
            {"event": "DEVICE_DELETED", "data": {"path": "/y"}},
            {"return": {}},
            {"event": "DEVICE_DELETED", "data": {"device": "x"}},
        ]

    async with qemu(tmp_path / "q", answer), open_qmp(tmp_path / "q") as qmp:
        assert await qmp.execute("device_del", id="x") == {}
        assert await qmp.event("DEVICE_DELETED") == {"path": "/y"}
        assert await qmp.event("DEVICE_DELETED") == {"device": "x"}


async def test_a_refusal_has_qemus_words(tmp_path: Path) -> None:
    def answer(command: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"error": {"class": "GenericError", "desc": "Device 'x' not found"}}]

    async with qemu(tmp_path / "q", answer), open_qmp(tmp_path / "q") as qmp:
        with pytest.raises(QmpError, match="device_del: Device 'x' not found"):
            await qmp.execute("device_del", id="x")


async def test_no_qemu(tmp_path: Path) -> None:
    with pytest.raises(QmpError, match="no QEMU answers on"):
        async with open_qmp(tmp_path / "q"):
            pass
