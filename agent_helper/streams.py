"""Streams: what the host carries into the networks, and what containers ask of the host.

Into the networks, the host dials the data port with the secret of AuthorizeStreams and an address (published ports);
the agent connects to it from its own namespace, over the kernel's end of the uplink.

To the host, containers' connections and datagrams arrive at the listeners of ``redirect_ports``, where nftables' tproxy
sends what is meant for a gateway or an address of the host. The agent asks the host with the event StreamWanted, and
the host dials the data port with the event's token, or refuses.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import logging
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import trio

from agent_helper.errors import InvalidSpecError
from agent_helper.unreachable import port_unreachable
from taploom.address import send_all
from taploom.contracts.taploom.helper.v1 import StreamWanted
from taploom.contracts.taploom.link.v1 import LinkHello, LinkRefusal, StreamProtocol, StreamTarget
from taploom.limits import raise_descriptor_limit
from taploom.link import Attachment, Dataplane, new_secret
from taploom.link.connections import Reach
from taploom.link.datagrams import MAX_DATAGRAM, DatagramPump
from taploom.link.handshake import LINK_VERSION, MAX_SECRET, MIN_SECRET, HandshakeError, ready
from taploom.link.loop import Job, Loop
from taploom.link.splice import Splice, plain_socket, reset, tune_tcp

__all__ = ["MAX_HANDSHAKES", "MAX_STREAMS", "RedirectPorts", "Streams"]

logger = logging.getLogger("taploom.helper.streams")

MAX_STREAMS: Final = 4096
"""Streams that there are at most, those that are being opened included."""
MAX_HANDSHAKES: Final = 1024
"""Handshakes at once on the data port: as many connections as may come to published ports in one moment."""
MAX_WANTED: Final = 1024
"""Streams that networks may have to the host at once, all together; half of them for one."""
MAX_ASKED: Final = 512
"""Questions to the host that may be open: fewer than the events that a watcher may lag behind."""
CONNECT_TIMEOUT: Final = 10.0
"""Seconds that a target has to answer."""
WANTED_TIMEOUT: Final = 10.0
"""Seconds that the host has to answer a StreamWanted."""
UDP_IDLE: Final = 90.0
"""Seconds after which a flow of datagrams has ended, as with docker-proxy."""
_SWEEP: Final = 5.0
_BACKLOG: Final = 512
_FIRST_DATAGRAMS: Final = 16  # kept of a flow while the host is asked

# linux/in.h and linux/in6.h; the socket module does not name them.
_IP_TRANSPARENT: Final = 19
_IP_RECVORIGDSTADDR: Final = 20
_IPV6_TRANSPARENT: Final = 75
_IPV6_RECVORIGDSTADDR: Final = 74
_ANCILLARY: Final = socket.CMSG_SPACE(28)
_LENGTH: Final = struct.Struct(">I")


@dataclass(frozen=True, slots=True)
class RedirectPorts:
    """Where tproxy sends what is meant for the host: on 127.0.0.1 and ::1."""

    tcp: int
    udp: int


class _Carrier(NamedTuple):
    """A stream that the host has dialled, and whether it is in records."""

    stream: trio.SocketStream
    records: bool


class _Wanted:
    """What waits for the host: its stream, once it has dialled."""

    __slots__ = ("_carrier", "protocol", "settled")

    def __init__(self, protocol: StreamProtocol) -> None:
        self.protocol = protocol
        self.settled = trio.Event()
        self._carrier: _Carrier | None = None

    def give(self, carrier: _Carrier) -> None:
        """Hand the stream over."""
        self._carrier = carrier

    def take(self) -> _Carrier | None:
        """The stream, if there is one."""
        carrier, self._carrier = self._carrier, None
        return carrier

    def close(self) -> None:
        """Close the stream if nobody took it."""
        if self._carrier is not None:
            self._carrier.stream.socket.close()


class _LetIn:
    """A connection that the host has agreed to, and that has yet to come."""

    __slots__ = ("came", "carrier")

    def __init__(self, carrier: _Carrier) -> None:
        self.came = trio.Event()
        self.carrier: _Carrier | None = carrier


class Streams:
    """Every stream of the agent.

    Args:
        dataplane: what carries them.
        want: hands a StreamWanted to the host; False when nobody is there to take it.
        network_of: the id of the network that a source address belongs to; empty when it is not known.
        transparent: False: only streams into the networks. Listening for containers needs CAP_NET_ADMIN.
    """

    def __init__(
        self,
        dataplane: Dataplane,
        want: Callable[[StreamWanted], bool],
        *,
        network_of: Callable[[str], str] = lambda _address: "",
        transparent: bool = True,
        max_streams: int = MAX_STREAMS,
        udp_idle: float = UDP_IDLE,
    ) -> None:
        self.network_of = network_of
        self._dataplane: Final = dataplane
        self._want: Final = want
        self._transparent: Final = transparent
        self._max_streams: Final = max_streams
        self._udp_idle: Final = udp_idle
        self._secret: bytes | None = None
        self._wanted: dict[bytes, _Wanted] = {}
        self._per_network: Counter[str] = Counter()
        # What is carried, and what to do when it ends.
        self._carried: dict[Attachment, Callable[[], None]] = {}
        # Connections that were agreed to before they were accepted, by source and destination.
        self._let_in: dict[tuple[tuple[str, int], tuple[str, int]], _LetIn] = {}
        # The first datagrams of flows that wait for the host, by source and destination.
        self._flows: dict[tuple[Any, Any], list[bytes]] = {}
        self._redirect_ports: RedirectPorts | None = None
        self.active = 0
        """Streams that are open or being opened."""

    @property
    def redirect_ports(self) -> RedirectPorts:
        """Where the listeners are; known once ``run`` has started."""
        if self._redirect_ports is None:
            raise RuntimeError("the listeners for containers have not been started")
        return self._redirect_ports

    def authorize(self, secret: bytes) -> None:
        """Let ``secret`` open streams from now on, instead of the one before. InvalidSpecError for a wrong size."""
        if not MIN_SECRET <= len(secret) <= MAX_SECRET:
            raise InvalidSpecError(f"secret: {MIN_SECRET} to {MAX_SECRET} bytes are needed, not {len(secret)}")
        self._secret = bytes(secret)

    def refuse(self, token: bytes) -> None:
        """The host has nothing for this token; unknown ones are no error."""
        wanted = self._wanted.pop(bytes(token), None)
        if wanted is not None:
            wanted.settled.set()

    async def handle(self, hello: LinkHello, stream: trio.SocketStream) -> None:
        """Serve a stream that the host dialled (``LinkServer``'s ``on_stream``). Raises HandshakeError to refuse."""
        target = hello.stream
        assert target is not None, "the link server looked"
        if self._secret is None or not hmac.compare_digest(self._secret, hello.secret):
            raise HandshakeError("wrong secret", LinkRefusal.UNAUTHORIZED)
        reply = ready(min(hello.version, LINK_VERSION), ())
        if target.token:
            wanted = self._wanted.pop(target.token, None)
            if wanted is None:
                raise HandshakeError("no such token, or too late", LinkRefusal.UNAUTHORIZED)
            try:
                records = target.protocol == StreamProtocol.TCP_RECORDS
                if wanted.protocol != (StreamProtocol.TCP if records else target.protocol):
                    raise HandshakeError("the stream was asked for with another protocol")
                await stream.send_all(reply)
                own = trio.SocketStream(trio.socket.from_stdlib_socket(plain_socket(stream.socket)))
                wanted.give(_Carrier(own, records))
            finally:
                wanted.settled.set()
            return
        if self.active >= self._max_streams:
            raise HandshakeError(f"there are {self.active} streams already", LinkRefusal.UNAVAILABLE)
        if target.protocol != StreamProtocol.UDP:
            where, carrier = (target.address, target.port), plain_socket(stream.socket)
            records = target.protocol == StreamProtocol.TCP_RECORDS
            self._carry(lambda loop, end: Reach(loop, carrier, where, reply, end, records=records), None)
            return
        with self._counted(None):
            peer = _connected_udp(target)
            try:
                await stream.send_all(reply)
            except BaseException:
                peer.close()
                raise
            self._join_udp(plain_socket(stream.socket), peer, None)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen for containers, and end flows that carry nothing, until cancelled."""
        raise_descriptor_limit()
        async with trio.open_nursery() as nursery:
            if self._transparent:
                tcp, udp = _listeners(socket.SOCK_STREAM), _listeners(socket.SOCK_DGRAM)
                self._redirect_ports = RedirectPorts(tcp[0].getsockname()[1], udp[0].getsockname()[1])
                for sock in tcp:
                    nursery.start_soon(self._accept, sock, nursery)
                for sock in udp:
                    nursery.start_soon(self._receive, sock, nursery)
            task_status.started()
            while True:
                await trio.sleep(min(_SWEEP, self._udp_idle / 2))
                self._sweep(time.monotonic())

    def _sweep(self, now: float) -> None:
        """End flows that are silent, and what waits too long for its target."""
        for attachment in list(self._carried):
            job = attachment.job
            if isinstance(job, DatagramPump) and job.active_at < now - self._udp_idle:
                self._dataplane.end_attachment(attachment)
                self._carried.pop(attachment)()
            elif isinstance(job, Reach) and job.began is not None and job.began < now - CONNECT_TIMEOUT:
                self._dataplane.call(job.give_up)

    @contextlib.contextmanager
    def _counted(self, network_id: str | None) -> Iterator[None]:
        forget = self._count(network_id)
        try:
            yield
        finally:
            forget()

    def _count(self, network_id: str | None) -> Callable[[], None]:
        """Count a stream, also as one of a network's to the host; returns what ends that."""
        self.active += 1
        if network_id is not None:
            self._per_network[network_id] += 1

        def forget() -> None:
            self.active -= 1
            if network_id is not None:
                self._per_network[network_id] -= 1
                if not self._per_network[network_id]:
                    del self._per_network[network_id]

        return forget

    def _join_udp(self, stream: socket.socket, peer: socket.socket, network_id: str | None) -> None:
        """Hand both sockets to the data plane."""
        self._carry(lambda loop, end: DatagramPump(loop, stream, peer, end), network_id)

    def _join_tcp(self, carrier: _Carrier, peer: socket.socket, network_id: str) -> None:
        """The same for a connection to the host."""
        stream = plain_socket(carrier.stream.socket)
        records = stream if carrier.records else None
        tune_tcp(peer)
        self._carry(lambda loop, end: Splice(loop, stream, peer, end, records=records), network_id)

    def _carry(self, make: Callable[[Loop, Callable[[str], None]], Job], network_id: str | None) -> None:
        """Run a job on the data plane, and count it until it ends."""

        def ended(_reason: str) -> None:
            self._carried.pop(attachment)()

        attachment = self._dataplane.attach(make, ended)
        self._carried[attachment] = self._count(network_id)

    def _may_ask(self, network_id: str) -> bool:
        """Whether a network may have one more stream to the host: none can take them all, or flood the host."""
        return (
            self.active < self._max_streams
            and self._per_network.total() < MAX_WANTED
            and self._per_network[network_id] < MAX_WANTED // 2
            and len(self._wanted) < MAX_ASKED
        )

    async def _ask(self, protocol: StreamProtocol, network_id: str, address: str, port: int) -> _Carrier | None:
        """Have the host dial; None when it has nothing there, or does not answer in time."""
        token, wanted = new_secret(), _Wanted(protocol)
        self._wanted[token] = wanted
        try:
            event = StreamWanted(token=token, protocol=protocol, network_id=network_id, address=address, port=port)
            if not self._want(event):
                return None
            with trio.move_on_after(WANTED_TIMEOUT) as scope:
                await wanted.settled.wait()
            if scope.cancelled_caught:
                logger.warning("the host did not answer for %s port %d within %g s", address, port, WANTED_TIMEOUT)
            return wanted.take()
        finally:
            self._wanted.pop(token, None)
            wanted.close()

    async def knock(
        self, source: tuple[str, int], destination: tuple[str, int], network_id: str, answer: Callable[[bool], None]
    ) -> None:
        """A container is about to connect to the host: ask, answer, and keep the stream until the connection comes."""
        key = (source, destination)
        if key in self._let_in:  # its SYN was sent again
            answer(True)
            return
        if not self._may_ask(network_id):
            answer(False)
            return
        with self._counted(network_id):
            carrier = await self._ask(StreamProtocol.TCP, network_id, *destination)
            if carrier is None:
                answer(False)
                return
            self._let_in[key] = let_in = _LetIn(carrier)
            try:
                answer(True)
                with trio.move_on_after(WANTED_TIMEOUT):
                    await let_in.came.wait()
            finally:
                if self._let_in.get(key) is let_in:
                    del self._let_in[key]
                if let_in.carrier is not None:
                    let_in.carrier.stream.socket.close()

    async def _accept(self, listener: trio.socket.SocketType, nursery: trio.Nursery) -> None:
        with listener:
            while True:
                try:
                    sock, source = await listener.accept()
                except OSError as error:  # the peer is gone again, or descriptors are short
                    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                        logger.warning("connections of containers wait: %s", error.strerror)
                        await trio.sleep(0.1)
                    continue
                nursery.start_soon(self._connection, sock, source)

    async def _connection(self, sock: trio.socket.SocketType, source: Any) -> None:
        """One connection of a container to the host. Its own address is the one that the container asked for."""
        peer = plain_socket(sock)
        joined = False
        try:
            network_id = self.network_of(source[0])
            address, port = peer.getsockname()[:2]
            let_in = self._let_in.get(((source[0], source[1]), (address, port)))
            if let_in is not None and let_in.carrier is not None:
                agreed, let_in.carrier = let_in.carrier, None
                let_in.came.set()
                self._join_tcp(agreed, peer, network_id)
                joined = True
                return
            if not self._may_ask(network_id):
                return
            with self._counted(network_id):
                carrier = await self._ask(StreamProtocol.TCP, network_id, address, port)
                if carrier is not None:
                    self._join_tcp(carrier, peer, network_id)
                    joined = True
        finally:
            if not joined:
                reset(peer)

    async def _receive(self, listener: trio.socket.SocketType, nursery: trio.Nursery) -> None:
        """Datagrams that no flow has taken: each is the first of a flow, or comes while the host is asked."""
        source: Any
        with listener:
            while True:
                try:
                    data, ancillary, _, source = await listener.recvmsg(MAX_DATAGRAM + 1, _ANCILLARY)
                except OSError:
                    continue
                destination = _original(ancillary)
                if destination is None or len(data) > MAX_DATAGRAM:
                    continue
                kept = self._flows.get((source, destination))
                if kept is not None:
                    if len(kept) < _FIRST_DATAGRAMS:
                        kept.append(data)
                    continue
                network_id = self.network_of(source[0])
                if self._may_ask(network_id):
                    self._flows[source, destination] = [data]
                    nursery.start_soon(self._flow, source, destination, network_id)

    async def _flow(self, source: Any, destination: tuple[str, int], network_id: str) -> None:
        """One flow of datagrams of a container to the host."""
        key = (source, destination)
        try:
            with self._counted(network_id):
                carrier = await self._ask(StreamProtocol.UDP, network_id, *destination)
                if carrier is None:
                    port_unreachable(source[:2], destination, len(self._flows[key][0]))
                    return
                async with carrier.stream as stream:
                    peer = _flow_socket(source, destination)
                    kept = self._flows.pop(key)
                    joined = False
                    try:
                        with trio.move_on_after(1):
                            await send_all(stream, b"".join(_LENGTH.pack(len(data)) + data for data in kept))
                            self._join_udp(plain_socket(stream.socket), peer, network_id)
                            joined = True
                    finally:
                        if not joined:
                            peer.close()
        except (OSError, trio.BrokenResourceError) as error:
            logger.warning("datagrams of %s for %s port %d are lost: %s", source[0], *destination, error)
        finally:
            self._flows.pop(key, None)


def _connected_udp(target: StreamTarget) -> socket.socket:
    """A socket that is connected to the target. Raises HandshakeError, UNREACHABLE."""
    family = socket.AF_INET6 if ":" in target.address else socket.AF_INET
    try:
        sock = socket.socket(family, socket.SOCK_DGRAM)
    except OSError as error:
        raise HandshakeError(f"no socket can be opened: {error.strerror}", LinkRefusal.UNAVAILABLE) from error
    try:
        sock.setblocking(False)
        sock.connect((target.address, target.port))
    except OSError as error:
        sock.close()
        reason = "no route to host" if error.errno == errno.ENETUNREACH else error.strerror
        raise HandshakeError(f"{target.address} port {target.port}: {reason}", LinkRefusal.UNREACHABLE) from error
    return sock


def _listeners(kind: socket.SocketKind) -> list[trio.socket.SocketType]:
    """Sockets on 127.0.0.1 and, where there is IPv6, ::1, with one port, that take what tproxy sends them."""
    for _ in range(16):
        with contextlib.ExitStack() as cleanup:
            first = cleanup.enter_context(_transparent(socket.AF_INET, kind))
            first.bind(("127.0.0.1", 0))
            socks = [first]
            try:
                second = cleanup.enter_context(_transparent(socket.AF_INET6, kind))
                second.bind(("::1", first.getsockname()[1]))
                socks.append(second)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue
                logger.info("no IPv6 for containers' access to the host: %s", error.strerror)
            for sock in socks:
                if kind == socket.SOCK_STREAM:
                    sock.listen(_BACKLOG)
                elif sock.family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVORIGDSTADDR, 1)
                else:
                    sock.setsockopt(socket.IPPROTO_IP, _IP_RECVORIGDSTADDR, 1)
            cleanup.pop_all()
            return [trio.socket.from_stdlib_socket(sock) for sock in socks]
    raise OSError(errno.EADDRINUSE, "no port is free on both 127.0.0.1 and ::1")


def _transparent(family: socket.AddressFamily, kind: socket.SocketKind) -> socket.socket:
    sock = socket.socket(family, kind)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def _flow_socket(source: Any, destination: tuple[str, int]) -> socket.socket:
    """A socket that has a flow to itself: bound to the host's address that the container sent to.

    Between bind and connect nothing can come in: tproxy takes connected sockets only.
    """
    family = socket.AF_INET6 if ":" in destination[0] else socket.AF_INET
    sock = _transparent(family, socket.SOCK_DGRAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(destination)
        sock.connect(source)
    except BaseException:
        sock.close()
        raise
    return sock


def _original(ancillary: list[tuple[int, int, bytes]]) -> tuple[str, int] | None:
    """The destination that a datagram had: struct sockaddr_in or sockaddr_in6."""
    for level, kind, data in ancillary:
        if (level, kind) == (socket.IPPROTO_IP, _IP_RECVORIGDSTADDR) and len(data) >= 8:
            return socket.inet_ntop(socket.AF_INET, data[4:8]), int.from_bytes(data[2:4], "big")
        if (level, kind) == (socket.IPPROTO_IPV6, _IPV6_RECVORIGDSTADDR) and len(data) >= 24:
            return socket.inet_ntop(socket.AF_INET6, data[8:24]), int.from_bytes(data[2:4], "big")
    return None
