"""Connections that are opened on the data-plane thread: as many per second as there are, none of trio's tasks for any.

``ConnectionServer`` is the host's side of a published TCP port: it accepts, opens a stream for each connection, and
splices the two. ``Reach`` is the helper's: it connects to a stream's target, answers, and splices. Both are all there
is to a connection's life, from its first packet to its last.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol

from taploom.address import Address, UnixAddress, VsockAddress
from taploom.contracts.taploom.link.v1 import LinkRefusal, LinkReply
from taploom.link.handshake import (
    HandshakeError,
    RefusedError,
    check_reply,
    decode_length,
    decode_message,
    ready,
    refused,
)
from taploom.link.loop import READ, WRITE, Loop
from taploom.link.splice import Splice, reset, tune_tcp

__all__ = ["Budget", "ConnectionServer", "Reach", "Route", "socket_address"]

_BATCH: Final = 64
_SHORT: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
_PENDING: Final = frozenset({errno.EINPROGRESS, errno.EWOULDBLOCK, errno.EAGAIN})
# What nearly every answer is. No valid answer is shorter, so that reading so much never reads beyond it.
_READY: Final = ready(1, ())


@dataclass(frozen=True, slots=True)
class Route:
    """Where a new connection leads: a data port and the hello to send there, encoded."""

    family: int
    address: Any
    hello: bytes


class Budget:
    """How many connections there may be, over several servers. Only the thread changes it."""

    __slots__ = ("limit", "used")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0


def socket_address(address: Address) -> tuple[int, Any] | None:
    """The family and address for connect(2); None where connecting takes more than that (hybrid:, fd:)."""
    match address:
        case UnixAddress(path):
            return socket.AF_UNIX, path
        case VsockAddress(cid, port) if hasattr(socket, "AF_VSOCK"):
            return socket.AF_VSOCK, (cid, port)
    return None


class _Part(Protocol):
    def stop(self) -> None: ...


class _Opening:
    """A connection whose stream has been asked for."""

    __slots__ = ("_client", "_got", "_server", "_stream", "began")

    def __init__(self, server: ConnectionServer, client: socket.socket, stream: socket.socket) -> None:
        self._server = server
        self._client = client
        self._stream = stream
        self._got = b""
        self.began = time.monotonic()

    def start(self, hello: bytes) -> None:
        """Send the hello and wait for the answer. Raises OSError."""
        if self._stream.send(hello) != len(hello):
            raise OSError(errno.ENOBUFS, "the data port takes nothing")
        self._server.loop.watch(self._stream.fileno(), READ, self._readable)

    def stop(self) -> None:
        self._server.loop.watch(self._stream.fileno(), 0, self._readable)
        self._stream.close()
        reset(self._client)

    def _readable(self, _mask: int) -> None:
        wanted = len(_READY)
        if len(self._got) >= wanted:
            wanted = 4 + decode_length(self._got[:4])
        try:
            data = self._stream.recv(wanted - len(self._got))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._got += data
        if not data:
            self._go_on_elsewhere("the data port closed the stream")
            return
        try:
            if self._got != _READY:
                if len(self._got) < len(_READY) or len(self._got) < 4 + decode_length(self._got[:4]):
                    return
                check_reply(decode_message(LinkReply, self._got[4:]), ())
        except RefusedError as error:
            if error.refusal is LinkRefusal.UNAUTHORIZED:
                self._go_on_elsewhere(str(error))
                return
            self._server.forget(self, str(error))
            self.stop()
            return
        except HandshakeError as error:
            self._server.forget(self, str(error))
            self.stop()
            return
        self._server.loop.watch(self._stream.fileno(), 0, self._readable)
        self._server.join(self, self._client, self._stream)

    def _go_on_elsewhere(self, reason: str) -> None:
        """The agent has just ended, or is another one than before."""
        self._server.loop.watch(self._stream.fileno(), 0, self._readable)
        self._stream.close()
        self._server.forget(self, reason)
        self._server.fall_back(self._client)


class ConnectionServer:
    """Accepts TCP connections and splices each with a stream of its own.

    Args:
        loop: the thread's.
        listener: a listening socket that does not block; closed with the server.
        route: where a connection leads that comes now; None: nowhere yet. Called on the thread.
        direct: False: the data port takes more than connect(2) to be connected to; all connections go to `fallback`.
        budget: shared with other servers; connections beyond it are reset.
        fallback: takes connections whose stream cannot be opened at once, or that lead nowhere yet, and resets or
            carries them by itself; on the thread.
        on_refused: told why a stream was refused; on the thread.
    """

    def __init__(
        self,
        loop: Loop,
        listener: socket.socket,
        *,
        route: Callable[[], Route | None],
        direct: bool,
        budget: Budget,
        fallback: Callable[[socket.socket], None],
        on_refused: Callable[[str], None],
    ) -> None:
        self.loop: Final = loop
        self._listener: Final = listener
        self._route: Final = route
        self._direct: Final = direct
        self._budget: Final = budget
        self.fall_back: Final = fallback
        self._on_refused: Final = on_refused
        self._parts: set[_Part] = set()
        self._paused = False
        self._stopped = False

    def start(self) -> None:
        """Register with the loop."""
        self.loop.watch(self._listener.fileno(), READ, self._acceptable)

    def stop(self) -> None:
        """Close the listener and reset all connections; idempotent."""
        if not self._stopped:
            self._stopped = True
            if not self._paused:
                self.loop.watch(self._listener.fileno(), 0, self._acceptable)
            self._listener.close()
            self.end_connections()

    def end_connections(self) -> None:
        """Reset all connections."""
        parts, self._parts = self._parts, set()
        self._budget.used -= len(parts)
        for part in parts:
            part.stop()

    def tend(self, before: float) -> None:
        """Reset connections whose stream was asked for before then (time.monotonic); accept again if that was
        paused.
        """
        for part in [part for part in self._parts if isinstance(part, _Opening) and part.began < before]:
            self.forget(part, "no answer in time")
            part.stop()
        self._resume()

    def join(self, opening: _Opening, client: socket.socket, stream: socket.socket) -> None:
        """The stream is open: carry the connection."""

        def end(_reason: str) -> None:
            if splice in self._parts:
                self._parts.discard(splice)
                self._budget.used -= 1
            self._resume()

        splice = Splice(self.loop, client, stream, end)
        self._parts.discard(opening)
        self._parts.add(splice)
        splice.start()

    def forget(self, part: _Part, reason: str) -> None:
        """The connection could not be opened."""
        if part in self._parts:
            self._parts.discard(part)
            self._budget.used -= 1
        self._on_refused(reason)

    def _resume(self) -> None:
        if self._paused and not self._stopped:
            self._paused = False
            self.start()

    def _acceptable(self, _mask: int) -> None:
        if self._stopped:
            return
        for _ in range(_BATCH):
            try:
                client, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _SHORT:
                    # It would be told again and again. Whatever ends makes room.
                    self._paused = True
                    self.loop.watch(self._listener.fileno(), 0, self._acceptable)
                    self._on_refused(f"connections wait: {error.strerror}")
                    return
                continue
            client.setblocking(False)
            self._begin(client)

    def _begin(self, client: socket.socket) -> None:
        if self._direct and self._budget.used >= self._budget.limit:
            reset(client)
            return
        route = self._route() if self._direct else None
        if route is None:
            self.fall_back(client)
            return
        tune_tcp(client)
        try:
            stream = socket.socket(route.family, socket.SOCK_STREAM)
        except OSError as error:
            reset(client)
            self._on_refused(str(error))
            return
        try:
            stream.setblocking(False)
            stream.connect(route.address)
            opening = _Opening(self, client, stream)
            opening.start(route.hello)
        except OSError:
            # vsock's connect takes its time, and so does a Unix listener whose queue is full; or the agent is away.
            stream.close()
            self.fall_back(client)
            return
        self._budget.used += 1
        self._parts.add(opening)


class Reach:
    """Connects to a TCP stream's target, answers the hello, and splices the two; both sockets are closed with it.

    ``end(reason)`` as with other jobs. A target that cannot be reached is refused with UNREACHABLE. ``records``: the
    stream is in records (see Splice).
    """

    def __init__(
        self,
        loop: Loop,
        stream: socket.socket,
        target: tuple[str, int],
        reply: bytes,
        end: Callable[[str], None],
        *,
        records: bool = False,
    ) -> None:
        self._records: Final = records
        self._loop: Final = loop
        self._stream: Final = stream
        self._target: Final = target
        self._reply: Final = reply
        self._end: Final = end
        self._peer: socket.socket | None = None
        self._splice: Splice | None = None
        self._stopped = False
        self.began: float | None = time.monotonic()
        """Since when it waits for its target; None: it does not."""

    def start(self) -> None:
        """Register with the loop."""
        family = socket.AF_INET6 if ":" in self._target[0] else socket.AF_INET
        try:
            self._peer = socket.socket(family, socket.SOCK_STREAM)
            self._peer.setblocking(False)
        except OSError as error:
            self._refuse(f"no socket can be opened: {error.strerror}", LinkRefusal.UNAVAILABLE)
            return
        number = self._peer.connect_ex(self._target)
        if number in _PENDING:
            self._loop.watch(self._peer.fileno(), WRITE, self._connected)
        else:
            self._settle(number)

    def stop(self) -> None:
        """Leave the loop and reset both; idempotent."""
        if self._splice is not None:
            self._splice.stop()
        elif not self._stopped:
            self._close()

    def give_up(self) -> None:
        """The target has had its time: refuse, if it has not answered yet."""
        if self._splice is None and not self._stopped:
            self._refuse(_REASONS[errno.ETIMEDOUT], LinkRefusal.UNREACHABLE)

    def _close(self) -> None:
        self._stopped = True
        if self._peer is not None:
            self._loop.watch(self._peer.fileno(), 0, self._connected)
            reset(self._peer)
        self._stream.close()

    def _refuse(self, reason: str, refusal: LinkRefusal) -> None:
        message = f"{self._target[0]} port {self._target[1]}: {reason}"
        with suppress(OSError):  # it has gone
            self._stream.send(refused(refusal, message))
        self._close()
        self._end(message)

    def _connected(self, _mask: int) -> None:
        if self._peer is not None and not self._stopped:
            self._settle(self._peer.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    def _settle(self, number: int) -> None:
        """The kernel's word on the connection."""
        assert self._peer is not None
        self.began = None
        if number:
            reason = _REASONS.get(number) or os.strerror(number).lower()
            self._refuse(reason, LinkRefusal.UNREACHABLE)
            return
        self._loop.watch(self._peer.fileno(), 0, self._connected)
        tune_tcp(self._peer)
        try:
            self._stream.send(self._reply)
        except OSError as error:
            self._close()
            self._end(f"the stream broke: {error.strerror}")
            return
        records = self._stream if self._records else None
        self._splice = Splice(self._loop, self._stream, self._peer, self._end, records=records)
        self._splice.start()


_REASONS: Final = {
    errno.ECONNREFUSED: "connection refused",
    errno.ENETUNREACH: "no route to host",
    errno.EHOSTUNREACH: "no route to host",
    errno.EACCES: "no route to host",  # what a router answers that forbids it
    errno.ETIMEDOUT: "timed out",
}
