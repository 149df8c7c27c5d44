"""What an interface says to its neighbours when its link comes up: who is here, and whom it still looks for.

Without this a peer that knew another MAC for the address keeps sending to that one, and whoever looked for a neighbour
while there was no link waits for the kernel's next try, a second later (neigh/default/retrans_time_ms).
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterable, Iterator

from taploom.neighbours import ALL_NODES, arp, discovery
from taploom.netlink import split_messages

from .spec import InterfaceSpec
from .state import Ip

_PACKET_QDISC_BYPASS = 20  # linux/if_packet.h
_SOL_PACKET = 263  # linux/socket.h
_RTM_NEWNEIGH, _RTM_GETNEIGH = 28, 30  # linux/rtnetlink.h
_NLM_F_REQUEST, _NLM_F_DUMP, _NLMSG_ERROR, _NLMSG_DONE = 0x1, 0x300, 2, 3  # linux/netlink.h
_NDA_DST = 1  # linux/neighbour.h
_NUD_INCOMPLETE, _NUD_PROBE = 0x01, 0x10
_MESSAGE, _HEADER = 16, 12  # nlmsghdr, ndmsg


def open_socket() -> socket.socket:
    """A socket for `greet`. To be kept: closing one waits for an RCU grace period, some 10 ms (packet_release)."""
    # Nothing is to be received: protocol 0 (packet(7)). Past the queue: it is not attached yet when the carrier has
    # only just come on.
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0)
    sock.setsockopt(_SOL_PACKET, _PACKET_QDISC_BYPASS, 1)
    return sock


def greet(sock: socket.socket, index: int, spec: InterfaceSpec) -> None:
    """Announces the interface's addresses and asks again for every neighbour that it is waiting for.

    Raises:
        OSError: the interface is gone or down.
    """
    for frame in frames(spec, unresolved(_dump(), index)):
        sock.sendto(frame, (spec.name, 0))


def frames(spec: InterfaceSpec, wanted: Iterable[Ip]) -> Iterator[bytes]:
    """The Ethernet frames to send: gratuitous ARP (RFC 5227) and unsolicited advertisements, then questions."""
    mac = bytes.fromhex(spec.mac.replace(":", ""))
    for own in spec.addresses:
        if isinstance(own.ip, ipaddress.IPv4Address):
            yield arp(mac, own.ip, own.ip)
        else:
            yield discovery(mac, own.ip, ALL_NODES, own.ip, advertise=True)
    for target in wanted:
        same = [own for own in spec.addresses if own.version == target.version]
        source = next((own.ip for own in same if target in own.network), same[0].ip if same else None)
        if isinstance(target, ipaddress.IPv4Address) and isinstance(source, ipaddress.IPv4Address):
            yield arp(mac, source, target)
        elif isinstance(target, ipaddress.IPv6Address) and isinstance(source, ipaddress.IPv6Address):
            group = ipaddress.IPv6Address(b"\xff\x02" + bytes(9) + b"\x01\xff" + target.packed[13:])
            yield discovery(mac, source, group, target, advertise=False)


def unresolved(data: bytes, index: int) -> list[Ip]:
    """The neighbours on an interface that the kernel is asking for, out of an RTM_GETNEIGH dump (rtnetlink(7))."""
    found: list[Ip] = []
    for kind, _flags, _sequence, message in split_messages(data):
        if kind != _RTM_NEWNEIGH or len(message) < _MESSAGE + _HEADER:
            continue
        neighbour, state = struct.unpack_from("=iH", message, _MESSAGE + 4)
        if neighbour != index or not state & (_NUD_INCOMPLETE | _NUD_PROBE):
            continue
        offset = _MESSAGE + _HEADER
        while offset + 4 <= len(message):
            length, attribute = struct.unpack_from("=HH", message, offset)
            if length < 4 or offset + length > len(message):
                break
            if attribute == _NDA_DST and length in (8, 20):
                address = ipaddress.ip_address(message[offset + 4 : offset + length])
                if not address.is_multicast:
                    found.append(address)
            offset += (length + 3) & ~3
    return found


def _dump() -> bytes:
    """The kernel's neighbours, both families."""
    request = struct.pack("=IHHII", 28, _RTM_GETNEIGH, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0) + bytes(_HEADER)
    data = b""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        sock.bind((0, 0))
        sock.send(request)
        while True:
            part = sock.recv(1 << 16)
            data += part
            if not part or any(kind in (_NLMSG_ERROR, _NLMSG_DONE) for kind, *_ in split_messages(part)):
                return data
