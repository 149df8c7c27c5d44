"""A packet in one line, for people."""

from __future__ import annotations

import ipaddress
import struct

_VLAN = (0x8100, 0x88A8)
_FLAGS = ((0x02, "S"), (0x01, "F"), (0x04, "R"), (0x08, "P"))
_EXTENSIONS = (0, 43, 60)  # hop-by-hop options, routing, destination options (RFC 8200)
_FRAGMENT = 44
_ICMP = {0: "echo reply", 3: "unreachable", 5: "redirect", 8: "echo request", 11: "time exceeded"}
_ICMPV6 = {
    1: "unreachable",
    2: "packet too big",
    3: "time exceeded",
    128: "echo request",
    129: "echo reply",
    133: "router solicitation",
    134: "router advertisement",
    135: "neighbor solicitation",
    136: "neighbor advertisement",
    143: "multicast listener report",
}


def summarise(frame: bytes, length: int) -> str:
    """What an Ethernet frame is about; as far as can be told when it was cut off.

    Args:
        frame: what is kept of it.
        length: how long it was, in bytes.
    """
    try:
        return _ethernet(frame, length)
    except (struct.error, IndexError, ValueError):
        return f"cut off, {length} bytes"


def _ethernet(frame: bytes, length: int) -> str:
    (kind,) = struct.unpack_from("!H", frame, 12)
    start, prefix = 14, ""
    while kind in _VLAN:
        tag, kind = struct.unpack_from("!HH", frame, start)
        prefix += f"vlan {tag & 0xFFF} "
        start += 4
    body = frame[start:]
    if kind == 0x0800:
        return prefix + _ipv4(body, length - start)
    if kind == 0x86DD:
        return prefix + _ipv6(body, length - start)
    if kind == 0x0806:
        return prefix + _arp(body)
    source, target = frame[6:12].hex(":"), frame[:6].hex(":")
    return f"{prefix}{source} > {target} ethertype 0x{kind:04x}, {length} bytes"


def _arp(body: bytes) -> str:
    (operation,) = struct.unpack_from("!H", body, 6)
    sender, target = _address(body[14:18]), _address(body[24:28])
    if operation == 1:
        return f"arp who-has {target} tell {sender}"
    return f"arp {sender} is-at {body[8:14].hex(':')}"


def _ipv4(body: bytes, room: int) -> str:
    header = (body[0] & 15) * 4
    total, offset = struct.unpack_from("!H2xH", body, 2)
    source, target = _address(body[12:16]), _address(body[16:20])
    size = (total or room) - header  # a large segment may have no total
    if offset & 0x1FFF:
        return f"{source} > {target} fragment at {(offset & 0x1FFF) * 8}, {size} bytes"
    return _transport(body[9], body[header:], size, source, target)


def _ipv6(body: bytes, room: int) -> str:
    size, protocol = struct.unpack_from("!HB", body, 4)
    source, target = _address(body[8:24]), _address(body[24:40])
    size = size or room - 40
    start = 40
    while protocol in _EXTENSIONS:
        following, extra = body[start], (body[start + 1] + 1) * 8
        protocol, start, size = following, start + extra, size - extra
    if protocol == _FRAGMENT:
        following, offset = struct.unpack_from("!BxH", body, start)
        if offset & 0xFFF8:
            return f"{source} > {target} fragment at {offset & 0xFFF8}, {size - 8} bytes"
        protocol, start, size = following, start + 8, size - 8
    return _transport(protocol, body[start:], size, source, target)


def _transport(protocol: int, data: bytes, size: int, source: str, target: str) -> str:
    if protocol == 6:
        sender, receiver, sequence, acknowledged, offset, flags, window = struct.unpack_from("!HHIIBBH", data)
        shown = "".join(letter for bit, letter in _FLAGS if flags & bit) + ("." if flags & 0x10 else "")
        payload = size - (offset >> 4) * 4
        text = f"{_port(source, sender)} > {_port(target, receiver)} tcp [{shown}] seq {sequence}"
        if flags & 0x10:
            text += f" ack {acknowledged}"
        return f"{text} win {window}, {payload} bytes"
    if protocol == 17:
        sender, receiver = struct.unpack_from("!HH", data)
        return f"{_port(source, sender)} > {_port(target, receiver)} udp, {size - 8} bytes"
    if protocol in (1, 58):
        kind, code = data[0], data[1]
        known = (_ICMP if protocol == 1 else _ICMPV6).get(kind)
        text = f"{source} > {target} {'icmp' if protocol == 1 else 'icmp6'} {known or f'type {kind} code {code}'}"
        if known and known.startswith("echo"):
            identifier, sequence = struct.unpack_from("!HH", data, 4)
            text += f" id {identifier} seq {sequence}"
        return f"{text}, {size} bytes"
    return f"{source} > {target} protocol {protocol}, {size} bytes"


def _port(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _address(packed: bytes) -> str:
    return str(ipaddress.ip_address(packed))
