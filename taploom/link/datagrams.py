"""Datagrams over a stream: each one after its length, 4 bytes big-endian (protos/README.md).

``DatagramPump`` joins one connected UDP socket and a stream, ``DatagramServer`` one unconnected socket and a stream per
peer. Both run on the data-plane thread, also on macOS. Datagrams may be lost, as on any wire: those that a slow reader
has no room for are dropped, and never held for long.
"""

from __future__ import annotations

import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from taploom.address import write_limit
from taploom.link.loop import READ, WRITE, Loop
from taploom.link.splice import widen

__all__ = [
    "MAX_DATAGRAM",
    "DatagramError",
    "DatagramPump",
    "DatagramScanner",
    "DatagramServer",
    "Flow",
    "tell_destinations",
]

MAX_DATAGRAM: Final = 65_507
"""Bytes of the largest UDP payload over IPv4."""
_LENGTH: Final = struct.Struct(">I")
_BATCH: Final = 64  # datagrams that are read from a socket at once
_PENDING_DATAGRAMS: Final = 32  # datagrams that are kept while a flow's stream is opened
_PENDING_BYTES: Final = 64 * 1024
_CHUNK: Final = 128 * 1024

# netinet/in.h: Darwin has the same structures under other numbers. Python names the IPv6 ones only.
_IP_PKTINFO: Final = 26 if sys.platform == "darwin" else 8
_IN_PKTINFO: Final = struct.Struct("=i4s4s")
_IN6_PKTINFO: Final = struct.Struct("=16sI")
_ANCILLARY: Final = socket.CMSG_SPACE(_IN6_PKTINFO.size)


class DatagramError(ValueError):
    """The stream is not a sequence of datagrams."""


class DatagramScanner:
    """Cuts a stream into datagrams; sans-IO."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: memoryview) -> Iterator[memoryview]:
        """The datagrams that ``data`` completes; views of it, or of what was kept, good until the next call.

        Raises DatagramError at a length beyond MAX_DATAGRAM; nothing that follows can be trusted then.
        """
        if self._rest:
            data = memoryview(self._rest + data)
        position, end = 0, len(data)
        while end - position >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(data, position)
            if length > MAX_DATAGRAM:
                raise DatagramError(f"datagram of {length} bytes: {MAX_DATAGRAM} are allowed")
            after = position + _LENGTH.size + length
            if after > end:
                break
            yield data[position + _LENGTH.size : after]
            position = after
        self._rest = bytes(data[position:])


class _Stream:
    """A stream socket with framed datagrams: what both jobs do with it."""

    __slots__ = ("_limit", "_scanner", "fd", "sock", "unsent")

    def __init__(self, sock: socket.socket) -> None:
        widen(sock)
        self.sock = sock
        self.fd = sock.fileno()
        self.unsent: memoryview | None = None  # the rest of a batch that was begun
        self._limit = write_limit(sock)
        self._scanner = DatagramScanner()

    def send(self, data: memoryview) -> bool:
        """Send a batch of framed datagrams, or begin to. False: none of it was sent. Raises OSError."""
        sent, size = 0, len(data)
        try:
            while sent < size:
                sent += self.sock.send(data[sent : sent + self._limit])
        except BlockingIOError:
            if not sent:
                return False
            # A copy: the buffer is everyone's.
            self.unsent = memoryview(bytes(data[sent:]))
        return True

    def flush(self) -> bool:
        """Send what was kept; whether all of it is gone. Raises OSError."""
        rest, self.unsent = self.unsent, None
        if rest is not None and not self.send(rest):
            self.unsent = rest
        return self.unsent is None

    def receive(self, buffer: memoryview) -> Iterator[memoryview] | None:
        """The datagrams that one read gives; None at the end. Raises OSError, and DatagramError while iterating."""
        try:
            size = self.sock.recv_into(buffer, _CHUNK)
        except BlockingIOError:
            return iter(())
        return self._scanner.feed(buffer[:size]) if size else None


class DatagramPump:
    """Moves datagrams between a connected UDP socket and a stream, which are closed with the pump.

    ``on_end(reason)`` is called, on the thread, when it ends by itself: empty when the stream's peer closed it.
    """

    def __init__(self, loop: Loop, stream: socket.socket, udp: socket.socket, on_end: Callable[[str], None]) -> None:
        self._loop: Final = loop
        self._stream: Final = _Stream(stream)
        self._udp: Final = udp
        self._udp_fd: Final = udp.fileno()
        self._on_end: Final = on_end
        self._stopped = False
        self.active_at = time.monotonic()
        """When the last datagram passed, in either direction."""

    def start(self) -> None:
        """Register with the loop."""
        self._loop.watch(self._stream.fd, READ, self._stream_ready)
        self._loop.watch(self._udp_fd, READ, self._udp_ready)

    def stop(self) -> None:
        """Leave the loop and close both sockets; idempotent."""
        if not self._stopped:
            self._stopped = True
            self._loop.watch(self._stream.fd, 0, self._stream_ready)
            self._loop.watch(self._udp_fd, 0, self._udp_ready)
            self._stream.sock.close()
            self._udp.close()

    def _end(self, reason: str) -> None:
        if not self._stopped:
            self.stop()
            self._on_end(reason)

    def _udp_ready(self, _mask: int) -> None:
        if self._stopped:
            return
        buffer, end = self._loop.buffer, 0
        for _ in range(_BATCH):
            room = buffer[end + _LENGTH.size : end + _LENGTH.size + MAX_DATAGRAM]
            if len(room) < MAX_DATAGRAM:
                break
            try:
                size = self._udp.recv_into(room)
            except BlockingIOError:
                break
            except OSError:  # an ICMP error for what was sent before: of no more worth than a lost datagram
                continue
            _LENGTH.pack_into(buffer, end, size)
            end += _LENGTH.size + size
        if not end:
            return
        self.active_at = time.monotonic()
        try:
            self._stream.send(buffer[:end])
        except OSError as error:
            self._end(f"the stream broke: {error.strerror}")
            return
        if self._stream.unsent is not None:
            self._loop.watch(self._udp_fd, 0, self._udp_ready)
            self._loop.watch(self._stream.fd, READ | WRITE, self._stream_ready)

    def _stream_ready(self, mask: int) -> None:
        try:
            if mask & WRITE and not self._stopped and self._stream.unsent is not None and self._stream.flush():
                self._loop.watch(self._udp_fd, READ, self._udp_ready)
                self._loop.watch(self._stream.fd, READ, self._stream_ready)
            if mask & READ and not self._stopped:
                datagrams = self._stream.receive(self._loop.buffer)
                if datagrams is None:
                    self._end("")
                    return
                for datagram in datagrams:
                    _send(self._udp, datagram)
                self.active_at = time.monotonic()
        except DatagramError as error:
            self._end(str(error))
        except OSError as error:
            self._end(f"the stream broke: {error.strerror}")


def _send(udp: socket.socket, datagram: memoryview) -> None:
    for _ in range(2):
        try:
            udp.send(datagram)
        except ConnectionRefusedError:
            continue  # for the datagram before: this one has not been sent yet
        except OSError:
            pass  # no room, no route: lost
        return


class Flow:
    """The datagrams of one peer of a DatagramServer.

    Attributes:
        peer: the peer's address, as the socket module has it.
        local: the address that the peer sent to, packed; empty when the socket has only one.
        active_at: when the last datagram passed.
    """

    __slots__ = ("active_at", "key", "local", "peer", "pending", "pending_bytes", "stream")

    def __init__(self, key: object, peer: Any, local: bytes) -> None:
        self.key = key
        self.peer = peer
        self.local = local
        self.active_at = time.monotonic()
        self.stream: _Stream | None = None
        self.pending: list[bytes] = []
        self.pending_bytes = 0


def tell_destinations(udp: socket.socket) -> None:
    """Have the system tell where each datagram was sent to. Before bind: of earlier ones it does not know."""
    if udp.family == socket.AF_INET6:
        udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    else:
        udp.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)


class DatagramServer:
    """Moves datagrams between a bound UDP socket and a stream per peer; all are closed with the server.

    The socket was given to ``tell_destinations`` before it was bound.

    ``on_flow(flow)`` is called, on the thread, at a new peer's first datagram: whoever is called opens a stream and
    hands it to ``join``, or calls ``drop``. Replies leave from the address that the peer sent to.
    """

    def __init__(
        self,
        loop: Loop,
        udp: socket.socket,
        on_flow: Callable[[Flow], None],
        *,
        max_flows: int,
    ) -> None:
        self._loop: Final = loop
        self._udp: Final = udp
        self._fd: Final = udp.fileno()
        self._on_flow: Final = on_flow
        self._max_flows: Final = max_flows
        self._flows: dict[object, Flow] = {}
        self._stopped = False
        self._v6: Final = udp.family == socket.AF_INET6
        name = udp.getsockname()[0]
        self._any: Final = name in ("0.0.0.0", "::")  # noqa: S104 - compared, not bound

    def start(self) -> None:
        """Register with the loop."""
        self._loop.watch(self._fd, READ, self._udp_ready)

    def stop(self) -> None:
        """Leave the loop and close all sockets; idempotent."""
        if not self._stopped:
            self._stopped = True
            self._loop.watch(self._fd, 0, self._udp_ready)
            for flow in list(self._flows.values()):
                self.drop(flow)
            self._udp.close()

    def join(self, flow: Flow, sock: socket.socket) -> None:
        """Carry the flow over a stream, which is taken over; what came meanwhile is sent first."""
        if self._flows.get(flow.key) is not flow or flow.stream is not None:
            sock.close()
            return
        flow.stream = stream = _Stream(sock)
        pending, flow.pending = b"".join(flow.pending), []
        self._loop.watch(stream.fd, READ, lambda mask: self._stream_ready(mask, flow, stream))
        self._to_stream(flow, stream, memoryview(pending))

    def drop(self, flow: Flow) -> None:
        """End a flow; the peer's next datagram begins a new one. Unknown ones are no error."""
        if self._flows.get(flow.key) is not flow:
            return
        del self._flows[flow.key]
        if flow.stream is not None:
            self._loop.watch(flow.stream.fd, 0, _nothing)
            flow.stream.sock.close()

    def expire(self, before: float) -> None:
        """End the flows that carried nothing since ``before`` (time.monotonic)."""
        for flow in [flow for flow in self._flows.values() if flow.active_at < before]:
            self.drop(flow)

    def _udp_ready(self, _mask: int) -> None:
        if self._stopped:
            return
        buffer = self._loop.buffer
        room = buffer[_LENGTH.size : _LENGTH.size + MAX_DATAGRAM + 1]
        now = time.monotonic()
        for _ in range(_BATCH):
            try:
                if self._any:
                    size, ancillary, _, peer = self._udp.recvmsg_into([room], _ANCILLARY)
                    local = self._local(ancillary)
                else:
                    size, peer = self._udp.recvfrom_into(room)
                    local = b""
            except BlockingIOError:
                return
            except OSError:  # an ICMP error, on systems that tell unconnected sockets
                continue
            if size > MAX_DATAGRAM:
                continue  # an IPv6 datagram that the stream has no room for
            key = (peer, local)
            flow = self._flows.get(key)
            if flow is None:
                if len(self._flows) >= self._max_flows:
                    continue
                flow = self._flows[key] = Flow(key, peer, local)
                self._on_flow(flow)
            flow.active_at = now
            _LENGTH.pack_into(buffer, 0, size)
            framed = buffer[: _LENGTH.size + size]
            if flow.stream is not None:
                self._to_stream(flow, flow.stream, framed)
            elif len(flow.pending) < _PENDING_DATAGRAMS and flow.pending_bytes + len(framed) <= _PENDING_BYTES:
                flow.pending.append(bytes(framed))
                flow.pending_bytes += len(framed)

    def _local(self, ancillary: list[tuple[int, int, bytes]]) -> bytes:
        for level, kind, data in ancillary:
            if self._v6 and level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO:
                return data[: _IN6_PKTINFO.size]
            if not self._v6 and level == socket.IPPROTO_IP and kind == _IP_PKTINFO:
                return data[4:8]  # ipi_spec_dst
        return b""

    def _to_stream(self, flow: Flow, stream: _Stream, framed: memoryview) -> None:
        if stream.unsent is not None or not framed:
            return  # the stream is full: lost
        try:
            stream.send(framed)
        except OSError:
            self.drop(flow)
            return
        if stream.unsent is not None:
            self._loop.watch(stream.fd, READ | WRITE, lambda mask: self._stream_ready(mask, flow, stream))

    def _stream_ready(self, mask: int, flow: Flow, stream: _Stream) -> None:
        if self._flows.get(flow.key) is not flow:
            return
        try:
            if mask & WRITE and stream.unsent is not None and stream.flush():
                self._loop.watch(stream.fd, READ, lambda mask: self._stream_ready(mask, flow, stream))
            if mask & READ:
                datagrams = stream.receive(self._loop.buffer)
                if datagrams is None:
                    self.drop(flow)
                    return
                for datagram in datagrams:
                    self._reply(flow, datagram)
                flow.active_at = time.monotonic()
        except (DatagramError, OSError):
            self.drop(flow)

    def _reply(self, flow: Flow, datagram: memoryview) -> None:
        try:
            if not flow.local:
                self._udp.sendto(datagram, flow.peer)
            elif self._v6:
                self._udp.sendmsg([datagram], [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, flow.local)], 0, flow.peer)
            else:
                info = _IN_PKTINFO.pack(0, flow.local, bytes(4))
                self._udp.sendmsg([datagram], [(socket.IPPROTO_IP, _IP_PKTINFO, info)], 0, flow.peer)
        except OSError:
            pass  # no room, no route: lost


def _nothing(_mask: int) -> None:
    pass
