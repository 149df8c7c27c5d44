"""Two stream sockets joined into one connection: bytes in both directions, each direction closed by itself.

Runs on the data-plane thread, also on macOS. Unlike a relay's, a side's end of file is not the end: it is handed on as
a half-close (shutdown(2)), and the other direction goes on. When a side breaks, the other one is reset, so that nobody
takes a torn connection for a complete one.

Not every transport can close one direction alone: what leads through a VMM's Unix socket (hybrid vsock) often ends
both or none. There a side can be in records: a 4-byte big-endian length before so many bytes, and 0 for the end of the
direction.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import trio

from taploom.address import close_stream, set_buffers, write_limit
from taploom.link.loop import CHUNK, HANGUP, READ, WRITE, Loop

__all__ = ["Splice", "plain_socket", "reset", "tune_tcp", "widen"]

_INTERNET: Final = frozenset({socket.AF_INET, socket.AF_INET6})
_CARRIER_BUFFER: Final = 512 * 1024
# SO_SNDBUFFORCE of asm-generic/socket.h, for those who may exceed the system's limit.
_SEND_BUFFER: Final = (32, socket.SO_SNDBUF) if sys.platform == "linux" else (socket.SO_SNDBUF,)
_LINGER: Final = struct.pack("ii", 1, 0)
_RECORD: Final = struct.Struct(">I")
_END_RECORD: Final = _RECORD.pack(0)
_MAX_RECORD: Final = 1 << 20
_KEEP_ALIVE: Final = 15  # seconds, as Go's (and so docker-proxy's) connections have it


class _Side:
    """One of the two sockets, and the bytes that it has yet to take."""

    __slots__ = ("ended", "events", "fd", "handler", "head", "left", "limit", "records", "shut", "sock", "unsent")

    def __init__(self, sock: socket.socket, records: bool) -> None:
        self.sock = sock
        self.records = records
        self.head = b""  # of a record's length
        self.left = 0  # of a record's bytes
        self.fd = sock.fileno()
        self.limit = write_limit(sock)
        self.unsent: memoryview | None = None
        self.events = 0
        self.ended = False  # nothing more comes from it
        self.shut = False  # nothing more is sent to it
        self.handler: Callable[[int], None] = _nothing


def _nothing(_mask: int) -> None:
    pass


class Splice:
    """Copies between two connected stream sockets that do not block, which are closed with the splice.

    At most one chunk per direction is kept while its reader is slow. ``on_end(reason)`` is called, on the thread, when
    the splice ends by itself: empty when both directions were closed in order, else why it broke.

    ``records``: that one of the two is in records.
    """

    def __init__(
        self,
        loop: Loop,
        first: socket.socket,
        second: socket.socket,
        on_end: Callable[[str], None],
        *,
        records: socket.socket | None = None,
    ) -> None:
        self._loop: Final = loop
        self._on_end: Final = on_end
        self._stopped = False
        a, b = self._sides = (_Side(first, first is records), _Side(second, second is records))
        a.handler = lambda mask: self._ready(mask, a, b)
        b.handler = lambda mask: self._ready(mask, b, a)

    def start(self) -> None:
        """Register with the loop."""
        for side in self._sides:
            if side.sock.family not in _INTERNET:
                widen(side.sock)
            self._watch(side, READ)

    def stop(self) -> None:
        """Leave the loop and reset both connections; idempotent."""
        self._close(broken=True)

    def _close(self, *, broken: bool) -> None:
        if self._stopped:
            return
        self._stopped = True
        for side in self._sides:
            if side.events:
                side.events = 0
                self._loop.watch(side.fd, 0, side.handler)
            if broken:
                reset(side.sock)
            else:
                side.sock.close()
            side.handler = _nothing

    def _end(self, reason: str) -> None:
        if not self._stopped:
            self._close(broken=bool(reason))
            self._on_end(reason)

    def _watch(self, side: _Side, events: int) -> None:
        # A side that has ended is watched for its breaking, until nothing more is sent to it either.
        events = events & (READ | WRITE) or (0 if side.ended and side.shut else HANGUP)
        if events != side.events:
            side.events = events
            self._loop.watch(side.fd, events, side.handler)

    def _ready(self, mask: int, side: _Side, other: _Side) -> None:
        if self._stopped:
            return
        if mask & WRITE and side.unsent is not None:
            self._flush(side, other)
        if mask & READ and not self._stopped:
            if side.events & READ:
                self._copy(side, other)
            elif mask & WRITE:
                self._hung_up(side)

    def _hung_up(self, side: _Side) -> None:
        """The peer is gone altogether; what it sent before is still in its socket, if the other side is slow."""
        error = side.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if side.ended or error:
            self._end("a peer broke the connection")
        else:
            # Not watched at all: the hang-up would be told again and again. Reading goes on when there is room.
            side.events = 0
            self._loop.watch(side.fd, 0, side.handler)

    def _copy(self, source: _Side, target: _Side) -> None:
        buffer = self._loop.buffer
        start = _RECORD.size if target.records else 0
        try:
            size = source.sock.recv_into(buffer[start:], CHUNK)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(f"a peer broke the connection: {error.strerror}")
            return
        ended = not size
        if source.records:
            if ended:
                self._end("the stream broke off")
                return
            try:
                size, ended = self._unpack(source, buffer[start : start + size])
            except ValueError as error:
                self._end(str(error))
                return
        if size:
            if target.records:
                _RECORD.pack_into(buffer, 0, size)
                size += _RECORD.size
            sent = self._send(target, buffer[:size])
            if sent < 0:
                return
            if sent < size:
                # A copy: the buffer is everyone's.
                target.unsent = memoryview(bytes(buffer[sent:size]))
                self._watch(source, source.events & ~READ)
                self._watch(target, target.events | WRITE)
        if ended:
            source.ended = True
            self._watch(source, source.events & ~READ)
            if target.unsent is None:
                self._shut(target)

    def _unpack(self, source: _Side, data: memoryview) -> tuple[int, bool]:
        """Move the records' bytes to the beginning of ``data``; return how many they are, and whether the end is there.

        Raises ValueError when they are no records.
        """
        position = kept = 0
        size = len(data)
        while position < size:
            if source.left:
                taken = min(source.left, size - position)
                if kept != position:
                    data[kept : kept + taken] = data[position : position + taken]
                kept += taken
                position += taken
                source.left -= taken
                continue
            missing = _RECORD.size - len(source.head)
            source.head += bytes(data[position : position + missing])
            position += missing
            if len(source.head) < _RECORD.size:
                break
            (source.left,) = _RECORD.unpack(source.head)
            source.head = b""
            if source.left > _MAX_RECORD:
                raise ValueError(f"a record of {source.left} bytes: {_MAX_RECORD} are allowed")
            if not source.left:
                if position < size:
                    raise ValueError("something follows the end of a stream")
                return kept, True
        return kept, False

    def _flush(self, target: _Side, source: _Side) -> None:
        assert target.unsent is not None
        sent = self._send(target, target.unsent)
        if 0 <= sent < len(target.unsent):
            target.unsent = target.unsent[sent:]
        elif sent > 0:
            target.unsent = None
            self._watch(target, target.events & ~WRITE)
            if not source.ended:
                self._watch(source, source.events | READ)
            elif target.shut:
                self._finish(target)
            else:
                self._shut(target)

    def _shut(self, target: _Side) -> None:
        """Hand the end of file on."""
        target.shut = True
        if target.records:
            sent = self._send(target, memoryview(_END_RECORD))
            if sent < 0:
                return
            if sent < len(_END_RECORD):
                target.unsent = memoryview(_END_RECORD)[sent:]
                self._watch(target, target.events | WRITE)
                return
        else:
            try:
                target.sock.shutdown(socket.SHUT_WR)
            except OSError as error:
                self._end(f"a peer broke the connection: {error.strerror}")
                return
        self._finish(target)

    def _finish(self, target: _Side) -> None:
        """Nothing more goes to the target: end with the other direction, if it has ended."""
        if all(side.ended and side.shut and side.unsent is None for side in self._sides):
            self._end("")
        elif target.ended:
            self._watch(target, target.events & WRITE)

    def _send(self, target: _Side, data: memoryview) -> int:
        """Write what ``target`` takes; return how much, or -1 when it broke, which ends the splice."""
        sent = 0
        size = len(data)
        limit = target.limit
        try:
            while sent < size:
                sent += target.sock.send(data[sent : sent + limit] if sent or size > limit else data)
        except BlockingIOError:
            pass
        except OSError as error:
            self._end(f"a peer broke the connection: {error.strerror}")
            return -1
        return sent


def reset(sock: socket.socket) -> None:
    """Close a socket so that its peer sees a broken connection: on TCP a RST; Unix sockets and vsock have none."""
    if sock.family in _INTERNET:
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER)
    close_stream(sock)


def widen(carrier: socket.socket) -> None:
    """Give a data port's stream the buffers that it needs: fewer wake-ups, and on vsock no resets (see set_buffers)."""
    if carrier.family != socket.AF_UNIX:
        set_buffers(carrier)
        return
    # Far less than a link has: there may be thousands.
    for option in _SEND_BUFFER:
        with suppress(OSError):
            carrier.setsockopt(socket.SOL_SOCKET, option, _CARRIER_BUFFER)
            return


def tune_tcp(sock: socket.socket) -> None:
    """Set up a TCP socket to be spliced: no waiting for more bytes, and a peer that vanished is found out."""
    with suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # Darwin calls the first one TCP_KEEPALIVE.
        for name in ("TCP_KEEPIDLE", "TCP_KEEPALIVE", "TCP_KEEPINTVL"):
            option = getattr(socket, name, None)
            if option is not None:
                sock.setsockopt(socket.IPPROTO_TCP, option, _KEEP_ALIVE)


def plain_socket(sock: trio.socket.SocketType) -> socket.socket:
    """The same descriptor as a socket of the standard library's that does not block; ``sock`` is as good as closed."""
    plain = socket.socket(sock.family, sock.type, sock.proto, fileno=sock.detach())
    plain.setblocking(False)
    return plain
