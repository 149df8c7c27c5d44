"""Containers' access to the host: the helper says what a container wants (StreamWanted), the host joins it to its own
port.

A gateway of a network stands for the host itself: what is sent there reaches services on the loopback, as with Docker
Desktop. Other addresses are reached as they are, if they are the host's.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

import trio

from host_bridge.ports.model import PublishedPort
from taploom.contracts.taploom.helper.v1 import StreamWanted
from taploom.contracts.taploom.link.v1 import StreamProtocol, StreamTarget
from taploom.link import Dataplane, StreamError, open_stream
from taploom.link.datagrams import DatagramPump
from taploom.link.loop import Loop
from taploom.link.splice import Splice, plain_socket, reset, tune_tcp

if TYPE_CHECKING:
    from host_bridge.ports.publisher import StreamHelper

__all__ = ["HostAccess"]

logger = logging.getLogger("taploom.bridge.ports.host")

MAX_STREAMS: Final = 1024
"""Streams to the host that there are at once."""
MAX_OF_NETWORK: Final = 512
"""Those of one network among them: no guest can have them all."""
CONNECT_TIMEOUT: Final = 5.0
_ANY: Final = ("0.0.0.0", "::")  # noqa: S104 - compared, not bound


class HostAccess:
    """Answers StreamWanted events.

    Args:
        helper: where the streams are.
        dataplane: what carries them.
        is_gateway: whether an address is a gateway of one of the networks.
        published: the ports that the host publishes.
    """

    def __init__(
        self,
        helper: StreamHelper,
        dataplane: Dataplane,
        *,
        is_gateway: Callable[[str], bool],
        published: Callable[[], Iterable[PublishedPort]],
    ) -> None:
        self._helper: Final = helper
        self._dataplane: Final = dataplane
        self._is_gateway: Final = is_gateway
        self._published: Final = published
        self._open: Counter[str] = Counter()

    def begin(self, event: StreamWanted, nursery: trio.Nursery) -> None:
        """Join or refuse, in a task of its own."""
        if self._open.total() >= MAX_STREAMS or self._open[event.network_id] >= MAX_OF_NETWORK:
            logger.debug("network %s has too many streams to the host", event.network_id[:12])
            return  # the helper gives up by itself; an answer to each would be one more thing to flood
        self._open[event.network_id] += 1
        nursery.start_soon(self._serve, event)

    def target(self, event: StreamWanted) -> str | None:
        """The address of the host that the event leads to; None: nothing is to be reached there."""
        try:
            address = ipaddress.ip_address(event.address)
        except ValueError:
            return None
        if not 1 <= event.port <= 65535:
            return None
        text = str(address)
        if not self._is_gateway(text):
            return text if _is_own(address) else None
        protocol = "tcp" if event.protocol == StreamProtocol.TCP else "udp"
        own = [
            port.host_ip
            for port in self._published()
            if port.host_port == event.port and port.protocol == protocol and (":" in port.host_ip) == (":" in text)
        ]
        # What was published on one address of the host is not on its others, of which a gateway is one.
        if own and not any(host_ip in _ANY for host_ip in own):
            return None
        return "::1" if address.version == 6 else "127.0.0.1"

    async def _serve(self, event: StreamWanted) -> None:
        joined = False
        try:
            joined = await self._join(event)
        finally:
            if not joined:
                self._ended(event.network_id)

    def _ended(self, network_id: str) -> None:
        self._open[network_id] -= 1
        if not self._open[network_id]:
            del self._open[network_id]

    async def _join(self, event: StreamWanted) -> bool:
        """Whether the data plane carries the stream now."""
        local: socket.socket | None = None
        address = self.target(event)
        tcp = event.protocol == StreamProtocol.TCP
        secret = self._helper.stream_secret
        try:
            if address is not None and event.protocol in (StreamProtocol.TCP, StreamProtocol.UDP):
                local = await _dial(address, event.port, tcp=tcp)
            if local is None:
                await self._helper.refuse_stream(event.token)
                return False
            if secret is None:
                return False
            protocol = self._helper.tcp_protocol if tcp else event.protocol
            target = StreamTarget(protocol=protocol, token=event.token)
            stream = await open_stream(self._helper.data_address, target, secret)
            carried, local = local, None
            carrier = plain_socket(stream.socket)
            records = carrier if protocol == StreamProtocol.TCP_RECORDS else None

            def make(loop: Loop, end: Callable[[str], None]) -> Splice | DatagramPump:
                if not tcp:
                    return DatagramPump(loop, carrier, carried, end)
                return Splice(loop, carrier, carried, end, records=records)

            self._dataplane.attach(make, lambda _reason: self._ended(event.network_id))
            return True
        except StreamError as error:
            logger.debug("a container's stream to %s port %d is lost: %s", event.address, event.port, error)
            return False
        finally:
            if local is not None:
                reset(local)


def _is_own(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether this host has the address, and it is one that others may know: never the loopback."""
    if address.is_loopback or address.is_multicast or address.is_unspecified or address.is_link_local:
        return False
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
    except OSError:
        return False
    return True


async def _dial(address: str, port: int, *, tcp: bool) -> socket.socket | None:
    """A socket that is connected to the host's own port; None when nothing answers there."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        sock = trio.socket.socket(family, socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM)
    except OSError as error:
        logger.warning("containers' access to the host: %s", error.strerror)
        return None
    with sock:
        try:
            with trio.move_on_after(CONNECT_TIMEOUT):
                await sock.connect((address, port))
                plain = plain_socket(sock)
                if tcp:
                    tune_tcp(plain)
                return plain
        except OSError:
            pass
    return None
