"""A process's standard streams, and who is attached to them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import termios
from collections import deque
from collections.abc import Callable
from typing import Literal, Protocol

import trio

from lab.runtime.log import Log

Stream = Literal[1, 2]
STDOUT: Stream = 1
STDERR: Stream = 2

_CHUNK = 32 * 1024
# What waits for one attachment; the process waits when it is more, as with Docker.
_MAX_WAITING = 1 << 20
# How long output of what a process left behind is waited for after its end, as in Docker.
DRAIN_TIMEOUT = 2.0


class Source(Protocol):
    """What output comes from."""

    async def receive_some(self, max_bytes: int | None = None, /) -> bytes: ...

    def close(self) -> None: ...


class Sink(Protocol):
    """Where input goes."""

    async def send_all(self, data: bytes, /) -> None: ...

    async def aclose(self) -> None: ...

    def close(self) -> None: ...


class Attachment:
    """One reader of a process's output: a bounded queue."""

    def __init__(self, streams: frozenset[Stream]) -> None:
        self._streams = streams
        self._waiting: deque[tuple[Stream, bytes]] = deque()
        self._size = 0
        self._ended = False
        self._readable = trio.lowlevel.ParkingLot()
        self._writable = trio.lowlevel.ParkingLot()

    async def put(self, stream: Stream, data: bytes) -> None:
        """Adds output; waits while too much is waiting already."""
        while stream in self._streams and self._size > _MAX_WAITING and not self._ended:
            await self._writable.park()
        if stream in self._streams and not self._ended:
            self._waiting.append((stream, data))
            self._size += len(data)
            self._readable.unpark_all()

    async def get(self) -> tuple[Stream, bytes] | None:
        """The next output; None at the end."""
        while not self._waiting and not self._ended:
            await self._readable.park()
        if not self._waiting:
            return None
        stream, data = self._waiting.popleft()
        self._size -= len(data)
        self._writable.unpark_all()
        return stream, data

    def end(self) -> None:
        """Nothing more is added."""
        self._ended = True
        self._readable.unpark_all()
        self._writable.unpark_all()


class Streams:
    """The ends of a process's streams that are ours.

    Args:
        log: where its output is kept; None: nowhere.
    """

    def __init__(self, log: Log | None) -> None:
        self._log = log
        self._attachments: list[Attachment] = []
        self._outputs: list[tuple[Stream, Source]] = []
        self._input: Sink | None = None
        self._input_lock = trio.Lock()
        self._input_opened = trio.Event()
        self._resize: Callable[[int, int], None] | None = None
        self._reads: set[trio.CancelScope] = set()
        self._exited_at = float("inf")
        self._exited = trio.Event()
        self.ended = trio.Event()

    def open_terminal(self, master: int, *, stdin: bool) -> None:
        """A terminal's master side carries everything; the descriptor is ours from now on."""
        stream = trio.lowlevel.FdStream(master)
        self._outputs = [(STDOUT, stream)]

        def resize(rows: int, columns: int) -> None:
            fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

        self._resize = resize
        self._open_input(stream if stdin else None)

    def open_pipes(self, stdin: int | None, stdout: int, stderr: int) -> None:
        """The descriptors are ours from now on."""
        self._outputs = [(STDOUT, trio.lowlevel.FdStream(stdout)), (STDERR, trio.lowlevel.FdStream(stderr))]
        self._open_input(None if stdin is None else trio.lowlevel.FdStream(stdin))

    def open_streams(
        self, stdin: Sink | None, stdout: Source, stderr: Source | None, resize: Callable[[int, int], None] | None
    ) -> None:
        """Streams that are no descriptors of ours. `resize` sets a terminal's rows and columns; None: there is none."""
        self._outputs = [(STDOUT, stdout)]
        if stderr is not None:
            self._outputs.append((STDERR, stderr))
        self._resize = resize
        self._open_input(stdin)

    def _open_input(self, stream: Sink | None) -> None:
        self._input = stream
        self._input_opened.set()

    @property
    def has_terminal(self) -> bool:
        """Whether they are a terminal's, and open."""
        return self._resize is not None

    def resize(self, rows: int, columns: int) -> None:
        """Sets the terminal's size, in characters."""
        if self._resize is not None:
            self._resize(rows, columns)

    def attach(self, streams: frozenset[Stream]) -> Attachment:
        """A queue of all output from here on."""
        attachment = Attachment(streams)
        if self.ended.is_set():
            attachment.end()
        else:
            self._attachments.append(attachment)
        return attachment

    @property
    def attached(self) -> int:
        """How many are attached."""
        return len(self._attachments)

    def detach(self, attachment: Attachment) -> None:
        """What is put into it from here on is nobody's."""
        attachment.end()
        with contextlib.suppress(ValueError):
            self._attachments.remove(attachment)

    async def write(self, data: bytes) -> None:
        """Gives the process input, as soon as it runs; input that it does not take is lost, as in a closed pipe."""
        await self._input_opened.wait()
        async with self._input_lock:
            if self._input is not None:
                with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await self._input.send_all(data)

    async def close_input(self) -> None:
        """The process reads the end of its input. A terminal's stays open."""
        await self._input_opened.wait()
        if self._resize is None and self._input is not None:
            await self._input.aclose()

    async def carry(self) -> None:
        """Carries output until its end and `exited`; after that only as long as it comes without a pause."""
        if self._log is not None:
            self._log.start()
        try:
            async with trio.open_nursery() as nursery:
                for stream, source in self._outputs:
                    nursery.start_soon(self._carry, stream, source)
                await self._exited.wait()  # it may have closed its outputs and still read
        finally:
            self.close()

    def exited(self) -> None:
        """The process is gone; others may still have its streams."""
        self._exited_at = trio.current_time()
        self._exited.set()
        for scope in self._reads:
            scope.deadline = self._exited_at + DRAIN_TIMEOUT

    def close(self) -> None:
        """Ends the attachments and closes what is ours."""
        if self.ended.is_set():
            return
        self.ended.set()
        if self._log is not None:
            self._log.end()
        for attachment in self._attachments:
            attachment.end()
        self._attachments.clear()
        self._resize = None
        for source in (*(source for _, source in self._outputs), self._input):
            if source is not None:
                source.close()
        self._input = None
        self._input_opened.set()

    async def _carry(self, stream: Stream, source: Source) -> None:
        while True:
            with trio.CancelScope(deadline=self._exited_at + DRAIN_TIMEOUT) as scope:
                self._reads.add(scope)
                try:
                    data = await source.receive_some(_CHUNK)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    return  # a terminal whose other side is closed (EIO)
                finally:
                    self._reads.discard(scope)
            if scope.cancelled_caught or not data:
                return
            if self._exited_at != float("inf"):
                self._exited_at = trio.current_time()
            if self._log is not None:
                self._log.write(stream, data)
            for attachment in list(self._attachments):
                await attachment.put(stream, data)


def pipe() -> tuple[int, int]:
    """A pipe's reading and writing end."""
    return os.pipe2(os.O_CLOEXEC)
