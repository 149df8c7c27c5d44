"""Serves published ports: what connects to the host goes over the helper's data port to the container.

The host needs no route to the networks for this, so it works where there is none (macOS). A connection is accepted, a
stream to the container is opened, and the data plane joins the two; datagrams go over one stream per peer.
"""

from __future__ import annotations

import errno
import logging
import math
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Protocol

import trio

from host_bridge.ports.allocator import BoundPort, PortAllocator
from host_bridge.ports.host_access import HostAccess
from host_bridge.ports.model import PortBinding, PublishedPort
from taploom.address import Address
from taploom.contracts.taploom.helper.v1 import StreamWanted
from taploom.contracts.taploom.link.v1 import StreamProtocol, StreamTarget
from taploom.limits import raise_descriptor_limit
from taploom.link import Attachment, Dataplane, StreamError, open_stream
from taploom.link.datagrams import DatagramServer, Flow
from taploom.link.loop import Loop
from taploom.link.splice import Splice, plain_socket, reset, tune_tcp

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
_SHORT: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})


class StreamHelper(Protocol):
    """What is needed of the helper's peer."""

    @property
    def data_address(self) -> Address:
        """Where its data port is."""

    @property
    def stream_secret(self) -> bytes | None:
        """What AuthorizeStreams gave it on this connection; None: it cannot carry streams now."""

    async def refuse_stream(self, token: bytes) -> None:
        """Calls RefuseStream; must not raise when the helper has gone."""


class _Port:
    """A published port that is served."""

    __slots__ = ("attachment", "bound", "listener", "server")

    def __init__(self, bound: BoundPort) -> None:
        self.bound = bound
        self.listener: trio.socket.SocketType | None = None
        self.attachment: Attachment | None = None
        self.server: DatagramServer | None = None


class _Owner:
    """A container's ports and connections."""

    __slots__ = ("addresses", "connections", "ports")

    def __init__(self, ports: list[_Port]) -> None:
        self.ports = ports
        self.addresses: tuple[str, ...] = ()
        self.connections: set[Attachment] = set()


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
        self.connections = 0
        """TCP connections that are open or being opened."""

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
                    self._expire(time.monotonic() - self._udp_idle, self._owners.values())
        finally:
            self._nursery = None
            for name in list(self._owners):
                self.release(name)

    def publish(self, owner: str, bindings: Sequence[PortBinding]) -> tuple[PublishedPort, ...]:
        """Listen for all of ``bindings``, in addition to what the owner has; connections are refused until
        ``set_target``.

        Raises PortError, whose message is dockerd's, or InvalidError for a host address that is none; nothing was
        changed then.
        """
        ports = [_Port(bound) for bound in self._allocator.bind(bindings)]
        entry = self._owners.setdefault(owner, _Owner([]))
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
        self._expire(math.inf, (entry,))
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
        for port in entry.ports:
            if port.attachment is not None:
                self._dataplane.end_attachment(port.attachment, within=_CLOSE_WITHIN)
            elif port.listener is not None:
                port.listener.close()
            self._allocator.free(port.bound)
        self._end_connections(entry)

    def published(self, owner: str) -> tuple[PublishedPort, ...]:
        """What the owner has published."""
        entry = self._owners.get(owner)
        return () if entry is None else tuple(port.bound.port for port in entry.ports)

    def stream_wanted(self, event: StreamWanted) -> None:
        """A container wants something of the host: join it, or refuse."""
        if self._nursery is not None:
            self._host_access.begin(event, self._nursery)

    def _all(self) -> Iterator[PublishedPort]:
        return (port.bound.port for owner in self._owners.values() for port in owner.ports)

    def _expire(self, before: float, owners: Any) -> None:
        for owner in owners:
            for port in owner.ports:
                if port.server is not None:
                    self._dataplane.call(lambda server=port.server: server.expire(before))  # type: ignore[misc]

    def _end_connections(self, owner: _Owner) -> None:
        for attachment in owner.connections:
            self._dataplane.end_attachment(attachment)
        self.connections -= len(owner.connections)
        owner.connections.clear()

    def _serve(self, owner: _Owner, port: _Port) -> None:
        assert self._nursery is not None
        if port.bound.port.protocol == "tcp":
            port.listener = trio.socket.from_stdlib_socket(port.bound.sock)
            self._nursery.start_soon(self._accept, owner, port.listener, port.bound.port)
        else:
            self._serve_datagrams(owner, port)

    async def _accept(self, owner: _Owner, listener: trio.socket.SocketType, port: PublishedPort) -> None:
        assert self._nursery is not None
        while True:
            try:
                sock, _ = await listener.accept()
            except trio.ClosedResourceError:
                return
            except OSError as error:  # the peer is gone again, or descriptors are short
                if error.errno in _SHORT:
                    logger.warning("connections to port %d wait: %s", port.host_port, error.strerror)
                    await trio.sleep(0.1)
                continue
            client = plain_socket(sock)
            if self.connections >= MAX_CONNECTIONS or not owner.addresses:
                reset(client)
                continue
            self.connections += 1
            self._nursery.start_soon(self._connect, owner, client, port)

    async def _connect(self, owner: _Owner, client: socket.socket, port: PublishedPort) -> None:
        """One connection: the container's end is opened, and the data plane goes on."""
        joined = False
        try:
            stream = await self._open(owner, port)
            container = plain_socket(stream.socket)
            tune_tcp(client)

            def make(loop: Loop, end: Callable[[str], None]) -> Splice:
                return Splice(loop, client, container, end)

            def ended(_reason: str) -> None:
                owner.connections.discard(attachment)
                self.connections -= 1

            attachment = self._dataplane.attach(make, ended)
            owner.connections.add(attachment)
            joined = True
            if not owner.addresses:  # released meanwhile
                self._end_connections(owner)
        except StreamError as error:
            logger.debug("a connection to port %d is refused: %s", port.host_port, error)
        finally:
            if not joined:
                self.connections -= 1
                reset(client)

    def _serve_datagrams(self, owner: _Owner, port: _Port) -> None:
        token, nursery = self._token, self._nursery
        assert token is not None
        assert nursery is not None
        published = port.bound.port

        def begin(flow: Flow) -> None:
            if port.server is not None:
                nursery.start_soon(self._connect_flow, owner, port.server, published, flow)

        def on_flow(flow: Flow) -> None:
            token.run_sync_soon(begin, flow)

        def make(loop: Loop, _end: Callable[[str], None]) -> DatagramServer:
            port.server = DatagramServer(loop, port.bound.sock, on_flow, max_flows=MAX_FLOWS)
            return port.server

        def ended(reason: str) -> None:
            logger.error("UDP port %d is not served any more: %s", published.host_port, reason)

        port.attachment = self._dataplane.attach(make, ended)

    async def _connect_flow(self, owner: _Owner, server: DatagramServer, port: PublishedPort, flow: Flow) -> None:
        try:
            stream = await self._open(owner, port)
        except StreamError as error:
            logger.debug("datagrams to port %d are lost: %s", port.host_port, error)
            self._dataplane.call(lambda: server.drop(flow))
            return
        sock = plain_socket(stream.socket)
        self._dataplane.call(lambda: server.join(flow, sock))

    async def _open(self, owner: _Owner, port: PublishedPort) -> trio.SocketStream:
        """A stream to the container; raises StreamError."""
        v6 = ":" in port.host_ip
        # As docker-proxy: over the other family where the container has only that.
        addresses = sorted(owner.addresses, key=lambda address: (":" in address) != v6)
        secret = self._helper.stream_secret
        if not addresses:
            raise StreamError("the container has no address")
        if secret is None:
            raise StreamError("the helper is not connected")
        protocol = StreamProtocol.TCP if port.protocol == "tcp" else StreamProtocol.UDP
        target = StreamTarget(protocol=protocol, address=addresses[0], port=port.container_port)
        return await open_stream(self._helper.data_address, target, secret)
