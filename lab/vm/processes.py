"""Processes in VMs of the lab: the host's side of `guest/server.c`, which describes the frames."""

from __future__ import annotations

import contextlib
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import trio

from taploom.address import connect, parse_address

PORT = 1024
STDOUT: Literal[1] = 1
STDERR: Literal[2] = 2

_HEAD = struct.Struct(">IB")
_NUMBER = struct.Struct(">i")
_SIZE = struct.Struct(">HH")
_WINDOW = 64 * 1024
_PIECE = 16 * 1024
_CHUNK = 64 * 1024
_MAX_FRAME = 1 << 20
# Output that nobody has taken yet; the process waits when it is more.
_MAX_WAITING = 1 << 20


class ProcessError(Exception):
    """A process could not be started; the message is the VM's."""


class FrameError(Exception):
    """What came is not what the process server sends."""


@dataclass(frozen=True)
class Terminal:
    """A terminal's size in characters."""

    rows: int = 24
    columns: int = 80


@dataclass(frozen=True)
class Runtime:
    """The command is an OCI runtime's that leaves a process behind.

    Args:
        pid_file: where it writes the process's pid.
        log: where it says why it failed.
        console_socket: where it sends the process's terminal; "" without one.
    """

    pid_file: str
    log: str
    console_socket: str = ""


@dataclass(frozen=True)
class Command:
    """What is to be run."""

    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    directory: str = "/"
    stdin: bool = False
    terminal: Terminal | None = None
    runtime: Runtime | None = None

    def encode(self) -> bytes:
        """The payload of the frame that starts it. ValueError when a text has a NUL byte."""
        fields = [
            *(f"a{argument}" for argument in self.arguments),
            *(f"e{name}={value}" for name, value in self.environment.items()),
            f"d{self.directory}",
        ]
        if self.stdin:
            fields.append("i")
        if self.terminal is not None:
            fields.append(f"t{self.terminal.rows} {self.terminal.columns}")
        if self.runtime is not None:
            fields += [f"p{self.runtime.pid_file}", f"l{self.runtime.log}"]
            if self.runtime.console_socket:
                fields.append(f"s{self.runtime.console_socket}")
        if any("\0" in text for text in fields):
            raise ValueError("no argument or variable may have a NUL byte")
        return b"".join(text.encode("utf-8", "surrogateescape") + b"\0" for text in fields)


def frame(kind: str, payload: bytes = b"") -> bytes:
    """A frame's bytes."""
    return _HEAD.pack(len(payload), ord(kind)) + payload


class FrameReader:
    """Takes bytes, gives frames."""

    def __init__(self) -> None:
        self._received = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[str, bytes]]:
        """The frames that are complete now: kind and payload. FrameError when one is too long."""
        self._received += data
        start = 0
        try:
            while len(self._received) - start >= _HEAD.size:
                length, kind = _HEAD.unpack_from(self._received, start)
                if length > _MAX_FRAME:
                    raise FrameError(f"a frame of {length} bytes")
                end = start + _HEAD.size + length
                if end > len(self._received):
                    break
                payload = bytes(self._received[start + _HEAD.size : end])
                start = end
                yield chr(kind), payload
        finally:
            del self._received[:start]


class Output:
    """One of a process's output streams."""

    def __init__(self) -> None:
        self._waiting: deque[bytes] = deque()
        self._size = 0
        self._ended = False
        self._readable = trio.lowlevel.ParkingLot()
        self._writable = trio.lowlevel.ParkingLot()

    async def put(self, data: bytes) -> None:
        """Adds output; waits while too much is waiting already."""
        while self._size > _MAX_WAITING and not self._ended:
            await self._writable.park()
        if not self._ended:
            self._waiting.append(data)
            self._size += len(data)
            self._readable.unpark_all()

    async def receive_some(self, _max_bytes: int | None = None) -> bytes:
        """The next piece; nothing at the end."""
        while not self._waiting and not self._ended:
            await self._readable.park()
        if not self._waiting:
            await trio.lowlevel.checkpoint()
            return b""
        data = self._waiting.popleft()
        self._size -= len(data)
        self._writable.unpark_all()
        return data

    def end(self) -> None:
        """Nothing more comes."""
        self._ended = True
        self._readable.unpark_all()
        self._writable.unpark_all()

    def close(self) -> None:
        """Nobody wants more."""
        self._waiting.clear()
        self._size = 0
        self.end()


class Input:
    """A process's standard input."""

    def __init__(self, process: RemoteProcess) -> None:
        self._process = process
        self._credit = _WINDOW
        self._changed = trio.lowlevel.ParkingLot()

    def acknowledge(self, size: int) -> None:
        """The VM has taken so much."""
        self._credit += size
        self._changed.unpark_all()

    async def send_all(self, data: bytes) -> None:
        """Returns when all is under way; trio.BrokenResourceError when the process is gone."""
        view = memoryview(data)
        while view:
            while not self._credit and not self._process.gone.is_set():
                await self._changed.park()
            if self._process.gone.is_set():
                raise trio.BrokenResourceError("the process has ended")
            piece = bytes(view[: min(_PIECE, self._credit)])
            self._credit -= len(piece)
            self._process.send("I", piece)
            view = view[len(piece) :]
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        """The process reads the end."""
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        self._process.send("C")
        self._changed.unpark_all()

    def wake(self) -> None:
        """Who waits looks again."""
        self._changed.unpark_all()


class RemoteProcess:
    """A process in a VM; `run` carries what goes to and from it.

    Attributes:
        pid: as the VM sees it.
        stdout: also all that a terminal shows.
        gone: set when it has ended or its VM has.
    """

    def __init__(
        self, stream: trio.SocketStream, reader: FrameReader, early: list[tuple[str, bytes]], pid: int
    ) -> None:
        self.pid = pid
        self.stdin = Input(self)
        self.stdout = Output()
        self.stderr = Output()
        self.gone = trio.Event()
        self._stream = stream
        self._reader = reader
        self._early = early
        self._exit_code: int | None = None
        self._outgoing: deque[bytes] = deque()
        self._more = trio.lowlevel.ParkingLot()

    async def wait(self) -> int:
        """Its exit code, negative for a signal; -9 when its VM is gone."""
        await self.gone.wait()
        return -9 if self._exit_code is None else self._exit_code

    def kill(self, signum: int = 9) -> bool:
        """Sends a signal; False when it is gone."""
        if self.gone.is_set():
            return False
        self.send("K", bytes([signum]))
        return True

    def resize(self, rows: int, columns: int) -> None:
        """Sets its terminal's size."""
        self.send("W", _SIZE.pack(rows, columns))

    def send(self, kind: str, payload: bytes = b"") -> None:
        """Queues a frame; of input, no more than the window waits."""
        self._outgoing.append(frame(kind, payload))
        self._more.unpark_all()

    async def run(self) -> None:
        """Carries everything until the end of its output; ends the process when cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send)
                await self._receive()
                nursery.cancel_scope.cancel()
        finally:
            self.gone.set()
            self.stdin.wake()
            self.stdout.end()
            self.stderr.end()
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(self._stream)

    async def _send(self) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            while True:
                while not self._outgoing:
                    await self._more.park()
                await self._stream.send_all(self._outgoing.popleft())

    async def _receive(self) -> None:
        with contextlib.suppress(trio.BrokenResourceError, FrameError):
            frames: Iterable[tuple[str, bytes]] = self._early
            while True:
                for kind, payload in frames:
                    if kind == "Z":
                        return
                    await self._take(kind, payload)
                data = await self._stream.receive_some(_CHUNK)
                if not data:
                    return
                frames = self._reader.feed(data)

    async def _take(self, kind: str, payload: bytes) -> None:
        match kind:
            case "O":
                await self.stdout.put(payload)
            case "R":
                await self.stderr.put(payload)
            case "A" if len(payload) == _NUMBER.size:
                self.stdin.acknowledge(_NUMBER.unpack(payload)[0])
            case "X" if len(payload) == _NUMBER.size:
                self._exit_code = _NUMBER.unpack(payload)[0]
                self.gone.set()
                self.stdin.wake()
            case _:
                raise FrameError(f"a frame of kind {kind!r} with {len(payload)} bytes")


async def start(address: str, command: Command) -> RemoteProcess:
    """Starts a process in the VM whose process server is there; `run` must follow.

    Raises:
        ProcessError: it could not be started.
        OSError: the VM does not answer.
    """
    request = command.encode()
    stream = await connect(parse_address(address))
    reader = FrameReader()
    try:
        await stream.send_all(frame("S", request))
        frames: list[tuple[str, bytes]] = []
        while not frames:
            data = await stream.receive_some(_CHUNK)
            if not data:
                raise ConnectionResetError(f"{address}: the VM's process server ended the connection")
            frames = list(reader.feed(data))
        kind, payload = frames[0]
        if kind == "E":
            raise ProcessError(payload.decode(errors="replace"))
        if kind != "P" or len(payload) != _NUMBER.size:
            raise ConnectionResetError(f"{address}: the VM's process server sent a frame of kind {kind!r} first")
        return RemoteProcess(stream, reader, frames[1:], _NUMBER.unpack(payload)[0])
    except trio.BrokenResourceError as error:
        await trio.aclose_forcefully(stream)
        raise ConnectionResetError(f"{address}: the VM ended the connection") from error
    except BaseException:
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(stream)
        raise


async def run(address: str, command: Command) -> tuple[int, bytes]:
    """Runs a command to its end without input; its exit code, and all that it said.

    Raises:
        ProcessError, OSError: as `start`.
    """
    process = await start(address, command)
    said = bytearray()

    async def read(output: Output) -> None:
        while data := await output.receive_some():
            said.extend(data)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, process.stdout)
        nursery.start_soon(read, process.stderr)
        await process.run()
    return await process.wait(), bytes(said)
