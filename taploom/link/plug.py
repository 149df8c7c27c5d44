"""A plug: where the network card of a VM without an agent is joined with its endpoint's link, while it has one.

Runs on the data-plane thread, also on macOS. On one side is the stream of QEMU's `-netdev stream`, which stays for as
long as the VM; on the other the data link to the helper, which comes and goes with networks and with the helper. Both
carry frames without virtio_net_hdr. So that a side that is replaced begins with a frame, only whole frames are handed
on; while the other side is missing, they are dropped, as by a cable that is plugged in nowhere.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Final

from taploom.address import close_stream, write_limit
from taploom.link.frames import FrameError, FrameScanner
from taploom.link.loop import CHUNK, READ, WRITE, Loop

__all__ = ["CARD", "LINK", "Plug"]

CARD: Final = 0
"""The side of the VM's network card."""
LINK: Final = 1
"""The side of the data link."""
_NAMES: Final = ("network card", "helper")


class _Side:
    """A side, and the bytes that its stream has yet to take. ``serial`` is 0 while it has no stream."""

    __slots__ = ("events", "handler", "incomplete", "limit", "serial", "sock", "unsent")

    def __init__(self) -> None:
        self.sock: socket.socket | None = None
        self.serial = 0
        self.limit = 0
        self.events = 0
        self.incomplete = b""  # of a frame from this side
        self.unsent: memoryview | None = None  # of frames to this side
        self.handler: Callable[[int], None] = lambda _mask: None


class Plug:
    """Hands frames on between two streams, each of which may be missing.

    All methods are for the data plane's thread. ``on_lost(side, serial, reason)`` is called there when a stream breaks
    by itself, with the serial that it was set with.
    """

    def __init__(self, loop: Loop, on_lost: Callable[[int, int, str], None]) -> None:
        self._loop: Final = loop
        self._on_lost: Final = on_lost
        self._scanner: Final = FrameScanner(())
        self._sides: Final = (_Side(), _Side())
        self._stopped = False
        for number, side in enumerate(self._sides):
            side.handler = lambda mask, number=number: self._ready(mask, number)  # type: ignore[misc]

    def start(self) -> None:
        """Nothing is there to wait for yet."""

    def stop(self) -> None:
        """Close both streams; idempotent."""
        self._stopped = True
        for number in (CARD, LINK):
            self._drop(number)

    def set(self, number: int, sock: socket.socket, serial: int) -> None:
        """Give a side this stream, which is closed with the plug, in place of the one that it has."""
        self._drop(number)
        if self._stopped:
            sock.close()
            return
        side = self._sides[number]
        side.sock, side.serial, side.limit = sock, serial, write_limit(sock)
        if self._sides[1 - number].unsent is None:
            self._watch(side, READ)

    def clear(self, number: int, serial: int) -> None:
        """Close a side's stream, if it is still the one with this serial."""
        if self._sides[number].serial == serial:
            self._drop(number)

    def _drop(self, number: int) -> None:
        side, other = self._sides[number], self._sides[1 - number]
        sock = side.sock
        if sock is None:
            return
        self._watch(side, 0)
        close_stream(sock)
        side.sock, side.serial, side.incomplete, side.unsent = None, 0, b"", None
        if other.sock is not None:
            self._watch(other, other.events | READ)

    def _lose(self, number: int, reason: str) -> None:
        serial = self._sides[number].serial
        self._drop(number)
        self._on_lost(number, serial, reason)

    def _watch(self, side: _Side, events: int) -> None:
        if events != side.events and side.sock is not None:
            side.events = events
            self._loop.watch(side.sock.fileno(), events, side.handler)

    def _ready(self, mask: int, number: int) -> None:
        side = self._sides[number]
        if mask & WRITE and side.unsent is not None:
            self._flush(number)
        if mask & READ and side.events & READ:
            self._receive(number)

    def _receive(self, number: int) -> None:
        side, other = self._sides[number], self._sides[1 - number]
        assert side.sock is not None
        buffer = self._loop.buffer
        kept = len(side.incomplete)
        if kept:
            buffer[:kept] = side.incomplete
        try:
            size = side.sock.recv_into(buffer[kept:], CHUNK)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(number, f"the {_NAMES[number]}'s stream broke: {error.strerror}")
            return
        if not size:
            self._lose(number, f"the {_NAMES[number]} closed its stream")
            return
        end = kept + size
        try:
            consumed = self._scanner.scan(buffer, 0, end, [])
        except FrameError as error:
            self._lose(number, f"the {_NAMES[number]} broke the frame format: {error}")
            return
        side.incomplete = bytes(buffer[consumed:end])
        if not consumed or other.sock is None:
            return
        sent = self._send(1 - number, buffer[:consumed])
        if 0 <= sent < consumed:
            # A copy: the buffer is every link's. Bounded, as nothing more is read before it is sent.
            other.unsent = memoryview(bytes(buffer[sent:consumed]))
            self._watch(side, side.events & ~READ)
            self._watch(other, other.events | WRITE)

    def _flush(self, number: int) -> None:
        side, other = self._sides[number], self._sides[1 - number]
        assert side.unsent is not None
        sent = self._send(number, side.unsent)
        if 0 <= sent < len(side.unsent):
            side.unsent = side.unsent[sent:]
        elif sent > 0:
            side.unsent = None
            self._watch(side, side.events & ~WRITE)
            if other.sock is not None:
                self._watch(other, other.events | READ)

    def _send(self, number: int, data: memoryview) -> int:
        """Write what the side takes; return how much, or -1 when it broke."""
        side = self._sides[number]
        assert side.sock is not None
        sent, size, limit = 0, len(data), side.limit
        try:
            while sent < size:
                sent += side.sock.send(data[sent : sent + limit] if sent or size > limit else data)
        except BlockingIOError:
            pass
        except OSError as error:
            self._lose(number, f"the {_NAMES[number]}'s stream broke: {error.strerror}")
            return -1
        return sent
