"""Processes in VMs: frames, the window of standard input, and the conversation with a process server."""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from lab.vm.processes import (
    Command,
    FrameError,
    FrameReader,
    ProcessError,
    RemoteProcess,
    Runtime,
    Terminal,
    frame,
    run,
    start,
)

Server = Callable[[trio.SocketStream, FrameReader], Awaitable[None]]


def test_a_command_is_fields_that_end_with_nul() -> None:
    command = Command(
        ["ls", "-l"],
        {"A": "b"},
        "/tmp",
        stdin=True,
        terminal=Terminal(30, 90),
        runtime=Runtime("/p", "/l", "/s"),
    )
    assert command.encode() == b"als\0a-l\0eA=b\0d/tmp\0i\0t30 90\0p/p\0l/l\0s/s\0"


def test_a_nul_byte_is_refused() -> None:
    with pytest.raises(ValueError, match="NUL"):
        Command(["a\0b"]).encode()


def test_frames_come_out_however_they_arrive() -> None:
    data = frame("O", b"hello") + frame("X", struct.pack(">i", -9)) + frame("Z")
    expected = [("O", b"hello"), ("X", struct.pack(">i", -9)), ("Z", b"")]
    for size in (1, 2, 7, len(data)):
        reader = FrameReader()
        pieces = [data[i : i + size] for i in range(0, len(data), size)]
        assert [found for piece in pieces for found in reader.feed(piece)] == expected


def test_a_frame_that_is_too_long_is_an_error() -> None:
    with pytest.raises(FrameError):
        list(FrameReader().feed(struct.pack(">IB", (1 << 20) + 1, ord("O"))))


async def served(path: Path, server: Server, nursery: trio.Nursery) -> str:
    """The address of a process server that serves one connection as told."""
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(str(path))
    listener.listen(1)

    async def accept() -> None:
        peer, _ = await listener.accept()
        listener.close()
        async with trio.SocketStream(peer) as stream:
            await server(stream, FrameReader())

    nursery.start_soon(accept)
    return f"unix:{path}"


async def next_frame(
    stream: trio.SocketStream, reader: FrameReader, frames: list[tuple[str, bytes]]
) -> tuple[str, bytes]:
    while not frames:
        data = await stream.receive_some()
        assert data
        frames += reader.feed(data)
    return frames.pop(0)


async def test_a_process_runs_to_its_end(tmp_path: Path) -> None:
    async def server(stream: trio.SocketStream, reader: FrameReader) -> None:
        kind, payload = await next_frame(stream, reader, [])
        assert (kind, payload) == ("S", b"aid\0d/\0")
        # All in one piece: also what comes together with the first frame counts.
        await stream.send_all(
            frame("P", struct.pack(">I", 7))
            + frame("O", b"out")
            + frame("R", b"err")
            + frame("X", struct.pack(">i", 3))
            + frame("Z")
        )

    async with trio.open_nursery() as nursery:
        address = await served(tmp_path / "s", server, nursery)
        code, said = await run(address, Command(["id"]))
    assert code == 3
    assert sorted((said[:3], said[3:])) == [b"err", b"out"]


async def test_a_process_that_cannot_be_started(tmp_path: Path) -> None:
    async def server(stream: trio.SocketStream, reader: FrameReader) -> None:
        await stream.send_all(frame("E", b"nosuch: No such file or directory"))

    async with trio.open_nursery() as nursery:
        address = await served(tmp_path / "s", server, nursery)
        with pytest.raises(ProcessError, match="nosuch: No such file or directory"):
            await start(address, Command(["nosuch"]))


async def test_a_vm_that_ends_before_it_answers(tmp_path: Path) -> None:
    async def server(stream: trio.SocketStream, reader: FrameReader) -> None:
        await next_frame(stream, reader, [])

    async with trio.open_nursery() as nursery:
        address = await served(tmp_path / "s", server, nursery)
        with pytest.raises(ConnectionResetError):
            await start(address, Command(["id"]))


async def test_a_process_whose_vm_ends_was_killed(tmp_path: Path) -> None:
    async def server(stream: trio.SocketStream, reader: FrameReader) -> None:
        await stream.send_all(frame("P", struct.pack(">I", 7)) + frame("O", b"half"))

    async with trio.open_nursery() as nursery:
        address = await served(tmp_path / "s", server, nursery)
        process = await start(address, Command(["id"]))
        await process.run()
        assert await process.wait() == -9
        assert await process.stdout.receive_some() == b"half"
        assert await process.stdout.receive_some() == b""
        assert not process.kill()


async def test_input_waits_for_what_the_vm_has_taken(tmp_path: Path) -> None:
    taken = 0
    proceed = trio.Event()

    async def server(stream: trio.SocketStream, reader: FrameReader) -> None:
        nonlocal taken
        frames: list[tuple[str, bytes]] = []
        await next_frame(stream, reader, frames)
        await stream.send_all(frame("P", struct.pack(">I", 7)))
        unacknowledged = 0
        while True:
            kind, payload = await next_frame(stream, reader, frames)
            if kind == "C":
                break
            assert kind == "I" and len(payload) <= 16384
            taken += len(payload)
            unacknowledged += len(payload)
            assert unacknowledged <= 65536
            if unacknowledged == 65536:
                await proceed.wait()
                await stream.send_all(frame("A", struct.pack(">I", unacknowledged)))
                unacknowledged = 0
        await stream.send_all(frame("X", struct.pack(">i", 0)) + frame("Z"))

    async def write(process: RemoteProcess) -> None:
        await process.stdin.send_all(bytes(200_000))
        await process.stdin.aclose()

    async with trio.open_nursery() as nursery:
        address = await served(tmp_path / "s", server, nursery)
        process = await start(address, Command(["cat"], stdin=True))
        nursery.start_soon(process.run)
        nursery.start_soon(write, process)
        while taken < 65536:
            await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert taken == 65536
        proceed.set()
        assert await process.wait() == 0
    assert taken == 200_000


async def test_signals_and_sizes_are_sent(tmp_path: Path) -> None:
    seen: list[tuple[str, bytes]] = []

    async def server(stream: trio.SocketStream, reader: FrameReader) -> None:
        frames: list[tuple[str, bytes]] = []
        await next_frame(stream, reader, frames)
        await stream.send_all(frame("P", struct.pack(">I", 7)))
        seen.append(await next_frame(stream, reader, frames))
        seen.append(await next_frame(stream, reader, frames))
        await stream.send_all(frame("X", struct.pack(">i", -15)) + frame("Z"))

    async with trio.open_nursery() as nursery:
        address = await served(tmp_path / "s", server, nursery)
        process = await start(address, Command(["top"], terminal=Terminal()))
        nursery.start_soon(process.run)
        process.resize(50, 120)
        assert process.kill(15)
        assert await process.wait() == -15
    assert seen == [("W", struct.pack(">HH", 50, 120)), ("K", b"\x0f")]
