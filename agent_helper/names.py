"""The names of a network, as dnsmasq reads them (--addn-hosts format of dnsmasq(8)), and the probe that it has."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable, Sequence

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_TYPES = {4: (1, 4), 6: (28, 16)}  # A and AAAA (RFC 1035, RFC 3596): type, octets
_HEADER = struct.Struct(">6H")


def hosts_file(addresses: Sequence[Address], names: Sequence[str], network: str) -> str:
    """One line per address: `ADDR name.network name alias alias.network ...`. The first name is what PTR answers.

    The names must be checked before: this does no quoting, and the format has none.
    """
    if not names:
        return ""
    first, *aliases = names
    listed = [f"{first}.{network}", first]
    for alias in aliases:
        listed += [alias, f"{alias}.{network}"]
    seen: set[str] = set()
    line = ""
    for name in listed:
        if name.lower() not in seen and len(name) <= 253:
            seen.add(name.lower())
            line += " " + name
    return "".join(f"{address}{line}\n" for address in addresses)


def servers_file(names: Iterable[str], network: str) -> str:
    """What makes these names, bare and with the network's, be answered from the hosts files alone (--servers-file).

    A known name that has no address of the family asked for is then an empty answer. All others are refused, so that
    who asks can tell: the simpler --local=/#/ would make every name's parents known as well.
    """
    full = {name.lower() for name in names} | {f"{name}.{network}".lower() for name in names}
    return "".join(f"server=/{name}/\n" for name in sorted(full) if len(name) <= 253)


def query(message_id: int, name: str, version: int) -> bytes:
    """A DNS query for the name's A (version 4) or AAAA (6) records (RFC 1035, 4.1)."""
    labels = b"".join(bytes([len(label)]) + label.encode("ascii") for label in name.split("."))
    return _HEADER.pack(message_id, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">HH", _TYPES[version][0], 1)


def answer_id(data: bytes) -> int | None:
    """The id of a DNS response, or None when it is not one."""
    if len(data) < _HEADER.size or not data[2] & 0x80:
        return None
    return int.from_bytes(data[:2], "big")


def rcode(data: bytes) -> int:
    """The response code of a DNS response that `answer_id` has accepted."""
    return data[3] & 0xF


def answers(data: bytes, version: int) -> set[Address]:
    """The addresses in the answer section of a response to `query`; the empty set when the message is cut short."""
    kind, octets = _TYPES[version]
    found: set[Address] = set()
    try:
        _, _, questions, records, _, _ = _HEADER.unpack_from(data)
        at = _HEADER.size
        for _ in range(questions):
            at = _skip_name(data, at) + 4
        for _ in range(records):
            at = _skip_name(data, at)
            rtype, _, _, length = struct.unpack_from(">HHIH", data, at)
            at += 10
            if rtype == kind and length == octets and len(data) >= at + octets:
                found.add(ipaddress.ip_address(data[at : at + octets]))
            at += length
    except (struct.error, IndexError):
        return set()
    return found


def _skip_name(data: bytes, at: int) -> int:
    while True:
        length = data[at]
        if length & 0xC0 == 0xC0:
            return at + 2
        if length == 0:
            return at + 1
        at += 1 + length
