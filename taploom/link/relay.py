"""The relay: bytes between two streams, unread.

Runs on the data-plane thread, also on macOS. What one side does not take yet is kept, at most one chunk per direction,
and the other side is not read meanwhile. The end of either side ends both.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Final

from taploom.address import close_stream, write_limit
from taploom.link.loop import CHUNK, READ, WRITE, Loop
from taploom.link.pump import Counters

__all__ = ["Relay"]


class _Side:
    """One of the two streams, and the bytes that it has yet to take."""

    __slots__ = ("events", "fd", "handler", "limit", "name", "sock", "unsent")

    def __init__(self, name: str, sock: socket.socket) -> None:
        self.name = name
        self.sock = sock
        self.fd = sock.fileno()
        self.limit = write_limit(sock)
        self.unsent: memoryview | None = None
        self.events = 0
        self.handler: Callable[[int], None] = lambda _mask: None


class Relay:
    """Copies between the streams ``guest`` and ``helper``, which are closed with the relay.

    Counters: tx_bytes are those from the guest to the helper, rx_bytes the other way; frames are not counted.
    """

    def __init__(
        self,
        loop: Loop,
        guest: socket.socket,
        helper: socket.socket,
        counters: Counters,
        on_end: Callable[[str], None],
    ) -> None:
        """``on_end(reason)`` is called, on the thread, when the relay ends by itself."""
        self._loop: Final = loop
        self._counters: Final = counters
        self._on_end: Final = on_end
        self._stopped = False
        self._guest: Final = _Side("guest", guest)
        self._helper: Final = _Side("helper", helper)
        self._guest.handler = lambda mask: self._ready(mask, self._guest, self._helper)
        self._helper.handler = lambda mask: self._ready(mask, self._helper, self._guest)

    def start(self) -> None:
        """Register with the loop."""
        self._watch(self._guest, READ)
        self._watch(self._helper, READ)

    def stop(self) -> None:
        """Leave the loop and close both streams; idempotent."""
        if not self._stopped:
            self._stopped = True
            for side in (self._guest, self._helper):
                self._watch(side, 0)
                close_stream(side.sock)

    def _end(self, reason: str) -> None:
        if not self._stopped:
            self.stop()
            self._on_end(reason)

    def _watch(self, side: _Side, events: int) -> None:
        if events != side.events:
            side.events = events
            self._loop.watch(side.fd, events, side.handler)

    def _ready(self, mask: int, side: _Side, other: _Side) -> None:
        if mask & WRITE and not self._stopped and side.unsent is not None:
            self._flush(side, other)
        if mask & READ and not self._stopped and side.events & READ:
            self._copy(side, other)

    def _copy(self, source: _Side, target: _Side) -> None:
        buffer = self._loop.buffer
        try:
            size = source.sock.recv_into(buffer, CHUNK)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(f"the {source.name}'s stream broke: {error.strerror}")
            return
        if not size:
            self._end(f"the {source.name} closed its stream")
            return
        if source is self._guest:
            self._counters.tx_bytes += size
        else:
            self._counters.rx_bytes += size
        sent = self._send(target, buffer[:size])
        if 0 <= sent < size:
            # A copy: the buffer is every link's.
            target.unsent = memoryview(bytes(buffer[sent:size]))
            self._watch(source, source.events & ~READ)
            self._watch(target, target.events | WRITE)

    def _flush(self, target: _Side, source: _Side) -> None:
        assert target.unsent is not None
        sent = self._send(target, target.unsent)
        if 0 <= sent < len(target.unsent):
            target.unsent = target.unsent[sent:]
        elif sent > 0:
            target.unsent = None
            self._watch(target, target.events & ~WRITE)
            self._watch(source, source.events | READ)

    def _send(self, target: _Side, data: memoryview) -> int:
        """Write what ``target`` takes; return how much, or -1 when it broke, which ends the relay."""
        sent = 0
        size = len(data)
        limit = target.limit
        try:
            while sent < size:
                sent += target.sock.send(data[sent : sent + limit] if sent or size > limit else data)
        except BlockingIOError:
            pass
        except OSError as error:
            self._end(f"the {target.name}'s stream broke: {error.strerror}")
            return -1
        return sent
