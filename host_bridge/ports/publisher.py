"""Serves published ports: what connects to the host goes over the helper's data port to the container.

The host needs no route to the networks for this, so it works where there is none (macOS). A connection is accepted, a
stream to the container is opened, and the data plane joins the two; datagrams go over one stream per peer.
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol

import trio

from host_bridge.ports.allocator import BoundPort, PortAllocator
from host_bridge.ports.host_access import HostAccess
from host_bridge.ports.model import PortBinding, PublishedPort
from host_bridge.waiting import Backoff, Signal
from taploom.address import Address
from taploom.contracts.taploom.helper.v1 import StreamWanted
from taploom.contracts.taploom.link.v1 import StreamProtocol, StreamTarget
from taploom.limits import raise_descriptor_limit
from taploom.link import Attachment, Dataplane, StreamError, open_stream
from taploom.link.connections import Budget, ConnectionServer, Route, socket_address
from taploom.link.datagrams import DatagramServer, Flow
from taploom.link.loop import Loop
from taploom.link.splice import Splice, plain_socket, reset, tune_tcp
from taploom.link.streams import STREAM_TIMEOUT, StreamUnauthorizedError, StreamUnavailableError, stream_hello

__all__ = ["PortPublisher", "StreamHelper"]

logger = logging.getLogger("taploom.bridge.ports")

MAX_CONNECTIONS: Final = 4096
"""TCP connections to published ports at once; the helper has no more streams either."""
MAX_FLOWS: Final = 1024
"""UDP peers of one published port at once."""
UDP_IDLE: Final = 90.0
"""Seconds after which a UDP peer's flow has ended, as with docker-proxy."""
_SWEEP: Final = 5.0
_CLOSE_WITHIN: Final = 1.0


class StreamHelper(Protocol):
    """What is needed of the helper's peer."""

    @property
    def data_address(self) -> Address:
        """Where its data port is."""

    @property
    def stream_secret(self) -> bytes | None:
        """What AuthorizeStreams gave it on this connection; None: it cannot carry streams now."""

    @property
    def tcp_protocol(self) -> StreamProtocol:
        """TCP_RECORDS where the way to its data port cannot close one direction alone, and the helper knows them."""

    async def streams_ready(self) -> None:
        """Returns once there is a stream secret."""

    async def refuse_stream(self, token: bytes) -> None:
        """Calls RefuseStream; must not raise when the helper has gone."""


class _Port:
    """A published port, and what serves it on the data plane."""

    __slots__ = ("attachment", "bound", "server")

    def __init__(self, bound: BoundPort) -> None:
        self.bound = bound
        self.attachment: Attachment | None = None
        self.server: ConnectionServer | DatagramServer | None = None


class _Owner:
    """A container's ports, and the connections that were not opened by their servers."""

    __slots__ = ("addresses", "changed", "connections", "opening", "ports")

    def __init__(self) -> None:
        self.ports: list[_Port] = []
        self.addresses: tuple[str, ...] | None = None  # None: not known yet
        self.changed = Signal()  # of addresses
        self.connections: set[Attachment] = set()
        self.opening: set[trio.CancelScope] = set()


class PortPublisher:
    """Published ports by owner, and containers' access to the host.

    All methods but ``run`` are for trio's thread and do not wait; ports that are published before ``run`` listen
    already and are served from then on.

    Args:
        helper: where streams are opened.
        dataplane: what carries them.
        is_gateway: whether an address is a gateway of one of the networks.
        udp_idle: seconds until a UDP peer that is silent is forgotten.
    """

    def __init__(
        self,
        helper: StreamHelper,
        dataplane: Dataplane,
        *,
        is_gateway: Callable[[str], bool],
        udp_idle: float = UDP_IDLE,
    ) -> None:
        self._helper: Final = helper
        self._dataplane: Final = dataplane
        self._udp_idle: Final = udp_idle
        self._allocator: Final = PortAllocator()
        self._owners: dict[str, _Owner] = {}
        self._nursery: trio.Nursery | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._host_access: Final = HostAccess(helper, dataplane, is_gateway=is_gateway, published=self._all)
        self._budget: Final = Budget(MAX_CONNECTIONS)
        self._slow = 0

    @property
    def connections(self) -> int:
        """TCP connections to published ports that are open or being opened."""
        return self._budget.used + self._slow

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; all ports are then released."""
        raise_descriptor_limit()
        self._token = trio.lowlevel.current_trio_token()
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for owner in self._owners.values():
                    for port in owner.ports:
                        self._serve(owner, port)
                task_status.started()
                while True:
                    await trio.sleep(min(_SWEEP, self._udp_idle / 2))
                    now = time.monotonic()
                    for owner in self._owners.values():
                        self._tend(owner, flows_before=now - self._udp_idle, openings_before=now - STREAM_TIMEOUT)
        finally:
            self._nursery = None
            for name in list(self._owners):
                self.release(name)

    def publish(self, owner: str, bindings: Sequence[PortBinding]) -> tuple[PublishedPort, ...]:
        """Listen for all of ``bindings``, in addition to what the owner has; connections wait for ``set_target``.

        Raises PortError, whose message is dockerd's, or InvalidError for a host address that is none; nothing was
        changed then.
        """
        ports = [_Port(bound) for bound in self._allocator.bind(bindings)]
        entry = self._owners.setdefault(owner, _Owner())
        entry.ports += ports
        if self._nursery is not None:
            for port in ports:
                self._serve(entry, port)
        return tuple(port.bound.port for port in ports)

    def set_target(self, owner: str, addresses: Sequence[str]) -> None:
        """Lead new connections to these addresses of the container, with or without prefix length; (): refuse them.

        Connections stay as they are, unless there is no target any more. Owners that have published nothing are no
        error.
        """
        entry = self._owners.get(owner)
        target = tuple(address.partition("/")[0] for address in addresses)
        if entry is None or entry.addresses == target:
            return
        entry.addresses = target
        entry.changed.notify()
        self._tend(entry, flows_before=math.inf, openings_before=-math.inf)
        if not target:
            self._end_connections(entry)

    def release(self, owner: str) -> None:
        """Stop listening for the owner and reset its connections; the ports are free on return. Unknown ones are no
        error.
        """
        entry = self._owners.pop(owner, None)
        if entry is None:
            return
        entry.addresses = ()
        entry.changed.notify()
        for port in entry.ports:
            if port.attachment is not None:
                self._dataplane.end_attachment(port.attachment, within=_CLOSE_WITHIN)
            self._allocator.free(port.bound)
        self._end_connections(entry)

    def published(self, owner: str) -> tuple[PublishedPort, ...]:
        """What the owner has published."""
        entry = self._owners.get(owner)
        return () if entry is None else tuple(port.bound.port for port in entry.ports)

    def target(self, owner: str) -> tuple[str, ...]:
        """The addresses that the owner's ports lead to, without prefix length; none while there are none."""
        entry = self._owners.get(owner)
        return () if entry is None else entry.addresses or ()

    def stream_wanted(self, event: StreamWanted) -> None:
        """A container wants something of the host: join it, or refuse."""
        if self._nursery is not None:
            self._host_access.begin(event, self._nursery)

    def _all(self) -> Iterator[PublishedPort]:
        return (port.bound.port for owner in self._owners.values() for port in owner.ports)

    def _tend(self, owner: _Owner, *, flows_before: float, openings_before: float) -> None:
        """Have the owner's servers forget flows that are silent since, and streams that were asked for before."""

        def tend() -> None:
            for port in ports:
                if isinstance(port.server, DatagramServer):
                    port.server.expire(flows_before)
                elif port.server is not None:
                    port.server.tend(openings_before)

        ports = list(owner.ports)
        self._dataplane.call(tend)

    def _end_connections(self, owner: _Owner) -> None:
        def end() -> None:
            for server in servers:
                server.end_connections()

        servers = [port.server for port in owner.ports if isinstance(port.server, ConnectionServer)]
        self._dataplane.call(end)
        for scope in owner.opening:
            scope.cancel()
        for attachment in owner.connections:
            self._dataplane.end_attachment(attachment)
        self._slow -= len(owner.connections)
        owner.connections.clear()

    def _serve(self, owner: _Owner, port: _Port) -> None:
        if port.bound.port.protocol == "tcp":
            self._serve_connections(owner, port)
        else:
            self._serve_datagrams(owner, port)

    def _serve_connections(self, owner: _Owner, port: _Port) -> None:
        token, nursery = self._token, self._nursery
        assert token is not None
        assert nursery is not None
        published = port.bound.port

        def route() -> Route | None:
            data_port = socket_address(self._helper.data_address)
            address, secret = self._way(owner, published)
            if not address or not secret or data_port is None:
                return None
            hello = stream_hello(StreamProtocol.TCP, address, published.container_port, secret)
            return Route(*data_port, hello)

        def fall_back(client: socket.socket) -> None:
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(begin, client)

        def begin(client: socket.socket) -> None:
            if self.connections >= MAX_CONNECTIONS or nursery is not self._nursery:
                reset(client)
                return
            self._slow += 1
            nursery.start_soon(self._connect, owner, client, published)

        def make(loop: Loop, _end: Callable[[str], None]) -> ConnectionServer:
            port.server = ConnectionServer(
                loop,
                port.bound.sock,
                route=route,
                direct=socket_address(self._helper.data_address) is not None,
                budget=self._budget,
                fallback=fall_back,
                on_refused=lambda reason: logger.debug(
                    "a connection to port %d is refused: %s", published.host_port, reason
                ),
            )
            return port.server

        port.attachment = self._dataplane.attach(make, self._broken(published))

    def _broken(self, published: PublishedPort) -> Callable[[str], None]:
        def broken(reason: str) -> None:
            logger.error("%s port %d is not served any more: %s", published.protocol, published.host_port, reason)

        return broken

    async def _connect(self, owner: _Owner, client: socket.socket, port: PublishedPort) -> None:
        """A connection whose stream takes more than connect(2), or some waiting."""
        joined = False
        scope = trio.CancelScope()
        owner.opening.add(scope)
        try:
            with scope:
                stream, protocol = await self._open_patiently(owner, port)
            if scope.cancelled_caught:
                return
            container = plain_socket(stream.socket)
            records = container if protocol == StreamProtocol.TCP_RECORDS else None
            tune_tcp(client)

            def make(loop: Loop, end: Callable[[str], None]) -> Splice:
                return Splice(loop, client, container, end, records=records)

            def ended(_reason: str) -> None:
                owner.connections.discard(attachment)
                self._slow -= 1

            attachment = self._dataplane.attach(make, ended)
            owner.connections.add(attachment)
            joined = True
            if not owner.addresses:  # released meanwhile
                self._end_connections(owner)
        except StreamError as error:
            logger.debug("a connection to port %d is refused: %s", port.host_port, error)
        finally:
            owner.opening.discard(scope)
            if not joined:
                self._slow -= 1
                reset(client)

    def _serve_datagrams(self, owner: _Owner, port: _Port) -> None:
        token, nursery = self._token, self._nursery
        assert token is not None
        assert nursery is not None
        published = port.bound.port

        def begin(flow: Flow) -> None:
            if isinstance(port.server, DatagramServer) and nursery is self._nursery:
                nursery.start_soon(self._connect_flow, owner, port.server, published, flow)

        def on_flow(flow: Flow) -> None:
            token.run_sync_soon(begin, flow)

        def make(loop: Loop, _end: Callable[[str], None]) -> DatagramServer:
            port.server = DatagramServer(loop, port.bound.sock, on_flow, max_flows=MAX_FLOWS)
            return port.server

        port.attachment = self._dataplane.attach(make, self._broken(published))

    async def _connect_flow(self, owner: _Owner, server: DatagramServer, port: PublishedPort, flow: Flow) -> None:
        try:
            stream, _ = await self._open(owner, port)
        except StreamError as error:
            logger.debug("datagrams to port %d are lost: %s", port.host_port, error)
            self._dataplane.call(lambda: server.drop(flow))
            return
        sock = plain_socket(stream.socket)
        self._dataplane.call(lambda: server.join(flow, sock))

    async def _open_patiently(self, owner: _Owner, port: PublishedPort) -> tuple[trio.SocketStream, StreamProtocol]:
        """As `_open`, but not only now: until the container has a target, and while the helper is away. A bridge or a
        helper that was started again is no reason to turn away whom it can serve a moment later.
        """
        backoff = Backoff()
        why = StreamError("there is no way to the container")
        with trio.move_on_after(STREAM_TIMEOUT):
            while True:
                await owner.changed.until(lambda: owner.addresses is not None)
                if not owner.addresses:
                    raise why
                await self._helper.streams_ready()
                try:
                    return await self._open(owner, port)
                except StreamUnauthorizedError as error:  # it is another one, whose secret is on its way
                    why = error
                except StreamUnavailableError as error:
                    if error.refusal is not None:
                        raise
                    why = error  # it is away
                await trio.sleep(backoff.next(trio.current_time()))
        raise why

    async def _open(self, owner: _Owner, port: PublishedPort) -> tuple[trio.SocketStream, StreamProtocol]:
        """A stream to the container, and what is spoken on it; raises StreamError."""
        address, secret = self._way(owner, port)
        if not address or not secret:
            raise StreamError("there is no way to the container now")
        protocol = self._helper.tcp_protocol if port.protocol == "tcp" else StreamProtocol.UDP
        target = StreamTarget(protocol=protocol, address=address, port=port.container_port)
        return await open_stream(self._helper.data_address, target, secret), protocol

    def _way(self, owner: _Owner, port: PublishedPort) -> tuple[str, bytes]:
        """The container's address that the port leads to, and the secret for the way there; empty: none now.

        Also for the data plane's thread.
        """
        addresses, v6 = owner.addresses or (), ":" in port.host_ip
        # As docker-proxy: over the other family where the container has only that.
        address = next((address for address in addresses if (":" in address) == v6), addresses[0] if addresses else "")
        return address, self._helper.stream_secret or b""
