"""ICMP errors in the name of the host: a datagram for a port that nothing listens on is answered as a kernel would."""

from __future__ import annotations

import socket
import struct
from typing import Final

_IP_TRANSPARENT: Final = 19  # linux/in.h
_IPV6_TRANSPARENT: Final = 75  # linux/in6.h
_UDP: Final = 17
_HOPS: Final = 64


def port_unreachable(source: tuple[str, int], destination: tuple[str, int], size: int) -> None:
    """Tells the source of a UDP datagram that its destination's port is closed (RFC 792; RFC 4443, 3.1).

    Args:
        source, destination: the datagram's, address and port.
        size: of its content, in bytes.

    Raises:
        OSError: no route to the source, or no CAP_NET_RAW and CAP_NET_ADMIN.
    """
    udp = struct.pack(">HHHH", source[1], destination[1], 8 + size, 0)
    if ":" in destination[0]:
        family, protocol, level, option = socket.AF_INET6, socket.IPPROTO_ICMPV6, socket.IPPROTO_IPV6, _IPV6_TRANSPARENT
        quoted = struct.pack(">IHBB", 6 << 28, 8 + size, _UDP, _HOPS)
        quoted += socket.inet_pton(family, source[0]) + socket.inet_pton(family, destination[0]) + udp
        message = struct.pack(">BBHI", 1, 4, 0, 0) + quoted  # the kernel fills in the checksum
    else:
        family, protocol, level, option = socket.AF_INET, socket.IPPROTO_ICMP, socket.IPPROTO_IP, _IP_TRANSPARENT
        header = struct.pack(">BBHHHBBH", 0x45, 0, 28 + size, 0, 0, _HOPS, _UDP, 0)
        header += socket.inet_aton(source[0]) + socket.inet_aton(destination[0])
        quoted = header[:10] + struct.pack(">H", checksum(header)) + header[12:] + udp
        unsummed = struct.pack(">BBHI", 3, 3, 0, 0) + quoted
        message = unsummed[:2] + struct.pack(">H", checksum(unsummed)) + unsummed[4:]
    with socket.socket(family, socket.SOCK_RAW, protocol) as sock:
        sock.setblocking(False)
        sock.setsockopt(level, option, 1)
        sock.bind((destination[0], 0))
        sock.sendto(message, (source[0], 0))


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
