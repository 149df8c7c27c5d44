"""Traffic between namespaces: TCP, UDP and ICMP echoes, and what is seen on the wire."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .check import CheckError, expect, step
from .netns import Namespace

PATIENCE = 20.0
_ETH_P_ALL = 3


@dataclass(frozen=True)
class Seen:
    """What a server saw of a client, and the client of the server."""

    client: str
    server: str


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


@contextlib.contextmanager
def listening(server: Namespace, port: int = 7000, address: str = "0.0.0.0") -> Iterator[socket.socket]:  # noqa: S104 - in a namespace of its own
    """A TCP listener in a namespace."""
    with server, socket.socket(_family(address), socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen()
        listener.settimeout(PATIENCE)
        yield listener


def connect(client: Namespace, address: str, port: int = 7000, timeout: float = PATIENCE) -> socket.socket:
    """A TCP connection from a namespace.

    Raises:
        CheckError: there is no connection after `timeout` seconds, or it is refused.
    """
    step(f"TCP from {client.name} to {address} port {port}")
    with client:
        sock = socket.socket(_family(address), socket.SOCK_STREAM)
    sock.settimeout(timeout)
    try:
        sock.connect((address, port))
    except OSError as error:
        sock.close()
        raise CheckError(f"TCP from {client.name} to {address} port {port}: {error or 'no answer'}") from None
    return sock


@contextlib.contextmanager
def connected(
    client: Namespace, server: Namespace, address: str, port: int = 7000, *, to: tuple[str, int] | None = None
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP connection: the client's end of it, and the server's; arguments as those of `tcp`."""
    anywhere = "::" if ":" in address else "0.0.0.0"  # noqa: S104 - in a namespace of its own
    with (
        listening(server, port, anywhere) as listener,
        connect(client, *(to or (address, port))) as sock,
        accept(listener, server.name) as accepted,
    ):
        yield sock, accepted


def accept(listener: socket.socket, name: str) -> socket.socket:
    """The next connection to a listener of the namespace of that name.

    Raises:
        CheckError: there is none.
    """
    try:
        return listener.accept()[0]
    except TimeoutError:
        raise CheckError(f"{name} accepted no connection on port {listener.getsockname()[1]}") from None


def transfer(sender: socket.socket, receiver: socket.socket, size: int) -> float:
    """Passes bytes one way over an established connection; the seconds until all were there."""
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, max(1 << 20, 2 * size))
    sender.settimeout(PATIENCE)
    receiver.settimeout(PATIENCE)
    start = time.monotonic()
    sender.sendall(b"x" * size)
    left = size
    while left:
        try:
            part = len(receiver.recv(65536))
        except TimeoutError:
            part = 0
        if not part:
            raise CheckError(f"{left} of {size} bytes did not come")
        left -= part
    return time.monotonic() - start


def exchange(one: socket.socket, other: socket.socket, size: int = 16384) -> None:
    """Passes bytes both ways over an established connection and compares them."""
    for sender, receiver in ((one, other), (other, one)):
        data = os.urandom(size)
        sender.settimeout(PATIENCE)
        receiver.settimeout(PATIENCE)
        try:
            sender.sendall(data)
            got = b""
            while len(got) < size:
                part = receiver.recv(size)
                if not part:
                    break
                got += part
        except TimeoutError:
            raise CheckError(f"{size} bytes over TCP: nothing more within {PATIENCE:g} s") from None
        expect(got == data, f"{size} bytes over TCP came as {len(got)} others")


def tcp(
    client: Namespace, server: Namespace, address: str, port: int = 7000, *, to: tuple[str, int] | None = None
) -> Seen:
    """Connects and passes 16 KiB each way.

    Args:
        client: where the connection comes from.
        server: who accepts it.
        address: of the listener.
        port: of the listener.
        to: what the client connects to where that is another address.
    """
    with connected(client, server, address, port, to=to) as (sock, accepted):
        exchange(sock, accepted)
        return Seen(accepted.getpeername()[0], sock.getpeername()[0])


def udp(
    client: Namespace,
    server: Namespace,
    address: str,
    port: int = 7001,
    *,
    to: tuple[str, int] | None = None,
    tries: int = 4,
    wait: float = 3,
) -> Seen:
    """Sends datagrams, one every `wait` seconds, until one is answered; the other arguments are those of `tcp`."""
    target = to or (address, port)
    step(f"UDP from {client.name} to {target[0]} port {target[1]}")
    anywhere = "::" if ":" in address else "0.0.0.0"  # noqa: S104 - in a namespace of its own
    with server:
        listener = socket.socket(_family(address), socket.SOCK_DGRAM)
    with client:
        sock = socket.socket(_family(address), socket.SOCK_DGRAM)
    with listener, sock:
        listener.bind((anywhere, port))
        for attempt in range(tries):
            data = b"taploom %d" % attempt
            sock.sendto(data, target)
            deadline = time.monotonic() + wait
            while (left := deadline - time.monotonic()) > 0:
                ready, _, _ = select.select([listener, sock], [], [], left)
                if listener in ready:
                    got, peer = listener.recvfrom(2048)
                    listener.sendto(got, peer)
                if sock in ready:
                    got, replier = sock.recvfrom(2048)
                    if got == data:
                        return Seen(peer[0], replier[0])
    raise CheckError(f"UDP from {client.name} to {target[0]} port {target[1]}: no answer to {tries} datagrams")


def talk(client: Namespace, server: Namespace, address: str) -> Seen:
    """UDP and TCP from one namespace to an address of another."""
    udp(client, server, address)
    return tcp(client, server, address)


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def ping(client: Namespace, address: str, *, timeout: float = 3.0) -> float:
    """One ICMP echo over IPv4; its round trip in seconds.

    Raises:
        CheckError: no reply came.
    """
    step(f"ping from {client.name} to {address}")
    with client, socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
        mark = os.getpid() & 0xFFFF
        body = struct.pack("!BBHHH", 8, 0, 0, mark, 1) + b"taploom!" * 4
        start = time.monotonic()
        sock.sendto(body[:2] + struct.pack("!H", _checksum(body)) + body[4:], (address, 0))
        while (left := start + timeout - time.monotonic()) > 0:
            if select.select([sock], [], [], left)[0]:
                packet = sock.recv(2048)[20:]
                if packet[0] == 0 and struct.unpack("!H", packet[4:6])[0] == mark:
                    return time.monotonic() - start
    raise CheckError(f"ping from {client.name} to {address}: no reply within {timeout:g} s")


def unreachable(client: Namespace, address: str, port: int = 7000, timeout: float = 0.8) -> None:
    """Raises CheckError when a TCP connection comes about that must not."""
    try:
        connect(client, address, port, timeout).close()
    except CheckError:
        return
    raise CheckError(f"{client.name} reached {address} port {port}, which must not be")


class Sniffer:
    """The frames that pass one device, from now on."""

    def __init__(self, namespace: Namespace, device: str) -> None:
        with namespace:
            self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._sock.bind((device, _ETH_P_ALL))
        self._sock.setblocking(False)

    def frames(self) -> list[bytes]:
        """What has passed since the last call."""
        frames = []
        with contextlib.suppress(BlockingIOError):
            while True:
                frames.append(self._sock.recv(65536))
        return frames


def ip_protocol(frame: bytes) -> int:
    """The protocol number of an IPv4 or IPv6 packet in an Ethernet frame; -1 for anything else."""
    kind = frame[12:14]
    if kind == b"\x08\x00":
        return int(frame[23])
    return int(frame[20]) if kind == b"\x86\xdd" else -1


def ipv4(frames: Iterable[bytes]) -> list[bytes]:
    """The frames with IPv4 packets: what a check sent; IPv6 speaks of its own accord, and ARP belongs to the wire."""
    return [frame for frame in frames if frame[12:14] == b"\x08\x00"]


def describe(frame: bytes) -> str:
    """An IPv4 packet in a few words, for messages."""
    source, destination = socket.inet_ntoa(frame[26:30]), socket.inet_ntoa(frame[30:34])
    return f"{source} to {destination}, protocol {ip_protocol(frame)}, port {udp_port(frame)}"


def only_udp(frames: Iterable[bytes], port: int, what: str) -> str:
    """Raises CheckError unless all IPv4 packets among the frames, and at least one, go to a UDP port."""
    packets = ipv4(frames)
    expect(packets, "nothing was on the wire")
    others = [frame for frame in packets if udp_port(frame) != port]
    expect(not others, f"not {what}, but on the wire: {describe(others[0])}" if others else "")
    return f"{len(packets)} packets of {what}"


def udp_port(frame: bytes) -> int:
    """The destination port of a UDP datagram over IPv4; -1 for anything else."""
    return int.from_bytes(frame[36:38], "big") if ip_protocol(frame) == 17 and frame[14] == 0x45 else -1
