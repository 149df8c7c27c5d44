"""Frames by which hosts of one link find each other: ARP (RFC 826) and neighbour discovery (RFC 4861)."""

from __future__ import annotations

import ipaddress
import socket
import struct
from typing import Final

__all__ = ["ALL_NODES", "arp", "discovery"]

ALL_NODES: Final = ipaddress.IPv6Address("ff02::1")
_ETH_P_IP, _ETH_P_IPV6, _ETH_P_ARP = 0x0800, 0x86DD, 0x0806  # linux/if_ether.h
_ND_SOLICIT, _ND_ADVERT = 135, 136
_ND_OVERRIDE = 0x20000000
_BROADCAST = b"\xff" * 6


def arp(mac: bytes, source: ipaddress.IPv4Address, target: ipaddress.IPv4Address) -> bytes:
    """An ARP request (RFC 826): asking for one's own address is how to announce it."""
    ethernet = _BROADCAST + mac + struct.pack("!H", _ETH_P_ARP)
    header = struct.pack("!HHBBH", 1, _ETH_P_IP, 6, 4, 1)
    return ethernet + header + mac + source.packed + bytes(6) + target.packed


def discovery(
    mac: bytes,
    source: ipaddress.IPv6Address,
    to: ipaddress.IPv6Address,
    target: ipaddress.IPv6Address,
    *,
    advertise: bool,
) -> bytes:
    """A neighbour advertisement or solicitation (RFC 4861) to a multicast group, with our link-layer address."""
    kind, flags, option = (_ND_ADVERT, _ND_OVERRIDE, 2) if advertise else (_ND_SOLICIT, 0, 1)
    body = struct.pack("!BBHI", kind, 0, 0, flags) + target.packed + bytes((option, 1)) + mac
    pseudo = source.packed + to.packed + struct.pack("!II", len(body), socket.IPPROTO_ICMPV6)
    total = sum(struct.unpack(f"!{(len(pseudo) + len(body)) // 2}H", pseudo + body))
    total = (total & 0xFFFF) + (total >> 16)
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    body = body[:2] + struct.pack("!H", checksum) + body[4:]
    ethernet = b"\x33\x33" + to.packed[12:] + mac + struct.pack("!H", _ETH_P_IPV6)
    header = struct.pack("!IHBB", 6 << 28, len(body), socket.IPPROTO_ICMPV6, 255)
    return ethernet + header + source.packed + to.packed + body
