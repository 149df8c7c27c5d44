"""Packet captures in pcapng (draft-ietf-opsawg-pcapng, "PCAP Next Generation"): blocks out, blocks in; no IO.

What is written is one section of Ethernet interfaces with timestamps in nanoseconds, in the writer's byte order: a
section header, a description of each interface, a block for each packet, and statistics. What is read is any file made
of such blocks by this module.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

__all__ = [
    "INBOUND",
    "OUTBOUND",
    "PACKET_OVERHEAD",
    "Interface",
    "Packet",
    "PcapngError",
    "Reader",
    "Statistics",
    "interface_block",
    "packet_block",
    "section_header",
    "statistics_block",
    "whole_blocks",
]

INBOUND: Final = 1
OUTBOUND: Final = 2
_ETHERNET: Final = 1  # LINKTYPE_ETHERNET

_SECTION, _INTERFACE, _STATISTICS, _PACKET = 0x0A0D0D0A, 1, 5, 6
_MAGIC = 0x1A2B3C4D
_NANOSECONDS = b"\x09"

_BLOCK = struct.Struct("=II")
_SECTION_BODY = struct.Struct("=IHHq")
_INTERFACE_BODY = struct.Struct("=HHI")
_PACKET_BODY = struct.Struct("=IIIII")
_STATISTICS_BODY = struct.Struct("=III")
_OPTION = struct.Struct("=HH")
_LENGTH = struct.Struct("=I")
_COUNT = struct.Struct("=Q")
_PACKET_HEAD = struct.Struct("=IIIIIII")
_PACKET_TAIL = struct.Struct("=HHIII")
# Type, length and the five fields before a packet's bytes; its flags, the end of its options and the length after them.
PACKET_OVERHEAD: Final = _PACKET_HEAD.size + _PACKET_TAIL.size
_PADDING = (b"", b"\0\0\0", b"\0\0", b"\0")
_MAX_BLOCK = 16 << 20


class PcapngError(ValueError):
    """The bytes are not a capture as this module writes it; the message says why."""


def section_header(application: str) -> bytes:
    """The beginning of a capture; `application` is who made it."""
    options = _option(3, f"{sys.platform}".encode()) + _option(4, application.encode())
    return _block(_SECTION, _SECTION_BODY.pack(_MAGIC, 1, 0, -1) + options + _option(0, b""))


def interface_block(
    name: str, *, snaplen: int, description: str = "", filter_text: str = "", mac: bytes = b""
) -> bytes:
    """An interface; the first one in a capture is interface 0.

    Args:
        snaplen: bytes of each packet that are kept at most; 0: all.
        filter_text: the expression that packets had to match.
        mac: its MAC address, 6 bytes; empty: unknown.
    """
    options = _option(2, name.encode())
    if description:
        options += _option(3, description.encode())
    if mac:
        options += _option(6, mac)
    options += _option(9, _NANOSECONDS)
    if filter_text:
        options += _option(11, b"\0" + filter_text.encode())
    return _block(_INTERFACE, _INTERFACE_BODY.pack(_ETHERNET, 0, snaplen) + options + _option(0, b""))


def packet_block(interface: int, time_ns: int, data: bytes | memoryview, length: int, direction: int) -> bytes:
    """A packet.

    Args:
        time_ns: nanoseconds since 1970.
        data: what is kept of it.
        length: how long it was.
        direction: INBOUND, OUTBOUND, or 0: unknown.
    """
    size = len(data)
    total = PACKET_OVERHEAD + size + (-size & 3)
    head = _PACKET_HEAD.pack(_PACKET, total, interface, time_ns >> 32, time_ns & 0xFFFFFFFF, size, length)
    return b"".join((head, data, _PADDING[size & 3], _PACKET_TAIL.pack(2, 4, direction, 0, total)))


def statistics_block(interface: int, time_ns: int, *, started_ns: int, accepted: int, dropped: int) -> bytes:
    """What became of an interface's packets so far.

    Args:
        accepted: those that matched the filter.
        dropped: those of them that are not in the capture, because it was not read in time.
    """
    options = _option(2, _timestamp(started_ns)) + _option(3, _timestamp(time_ns))
    for code, count in ((6, accepted), (7, dropped), (8, accepted - dropped)):
        options += _option(code, _COUNT.pack(count))
    body = _STATISTICS_BODY.pack(interface, time_ns >> 32, time_ns & 0xFFFFFFFF)
    return _block(_STATISTICS, body + options + _option(0, b""))


def _timestamp(time_ns: int) -> bytes:
    return _LENGTH.pack(time_ns >> 32) + _LENGTH.pack(time_ns & 0xFFFFFFFF)


def _option(code: int, value: bytes) -> bytes:
    return _OPTION.pack(code, len(value)) + value + _PADDING[len(value) & 3]


def _block(kind: int, body: bytes) -> bytes:
    total = _LENGTH.pack(len(body) + 12)
    return _LENGTH.pack(kind) + total + body + total


@dataclass(frozen=True, slots=True)
class Interface:
    """An interface's description."""

    name: str
    snaplen: int


@dataclass(frozen=True, slots=True)
class Packet:
    """A packet; see `packet_block`."""

    interface: int
    time_ns: int
    data: bytes
    length: int
    direction: int


@dataclass(frozen=True, slots=True)
class Statistics:
    """An interface's statistics; see `statistics_block`."""

    interface: int
    accepted: int
    dropped: int


class Reader:
    """Bytes in, blocks out."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[Interface | Packet | Statistics]:
        """What these bytes complete. Blocks of other kinds are passed over. Raises PcapngError."""
        self._rest += data
        start = 0
        try:
            while len(self._rest) - start >= _BLOCK.size:
                kind, total = _BLOCK.unpack_from(self._rest, start)
                if total < 12 or total % 4 or total > _MAX_BLOCK:
                    raise PcapngError(f"a block of {total} bytes is not allowed")
                if len(self._rest) - start < total:
                    break
                body = bytes(self._rest[start + 8 : start + total - 4])
                start += total
                found = _parsed(kind, body)
                if found is not None:
                    yield found
        finally:
            del self._rest[:start]


def _parsed(kind: int, body: bytes) -> Interface | Packet | Statistics | None:
    try:
        if kind == _SECTION and _SECTION_BODY.unpack_from(body)[0] != _MAGIC:
            raise PcapngError("the capture is in another byte order")
        if kind == _INTERFACE:
            _, _, snaplen = _INTERFACE_BODY.unpack_from(body)
            name = _options(body[_INTERFACE_BODY.size :]).get(2, b"")
            return Interface(name.decode("utf-8", "replace"), snaplen)
        if kind == _PACKET:
            interface, high, low, size, length = _PACKET_BODY.unpack_from(body)
            data = body[_PACKET_BODY.size : _PACKET_BODY.size + size]
            if len(data) != size:
                raise PcapngError("a packet is longer than its block")
            flags = _options(body[_PACKET_BODY.size + size + (-size & 3) :]).get(2, b"\0\0\0\0")
            return Packet(interface, high << 32 | low, data, length, _LENGTH.unpack(flags)[0] & 3)
        if kind == _STATISTICS:
            interface, _, _ = _STATISTICS_BODY.unpack_from(body)
            options = _options(body[_STATISTICS_BODY.size :])
            counts = [_COUNT.unpack(options.get(code, bytes(8)))[0] for code in (6, 7)]
            return Statistics(interface, counts[0], counts[1])
    except struct.error as error:
        raise PcapngError(f"a block of kind {kind} is malformed") from error
    return None


def _options(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    place = 0
    while len(data) - place >= _OPTION.size:
        code, size = _OPTION.unpack_from(data, place)
        if not code:
            break
        found.setdefault(code, data[place + 4 : place + 4 + size])
        place += 4 + size + (-size & 3)
    return found


def whole_blocks(data: bytes) -> int:
    """How many bytes of the data are whole blocks. Raises PcapngError."""
    place = 0
    while len(data) - place >= _BLOCK.size:
        _, total = _BLOCK.unpack_from(data, place)
        if total < 12 or total % 4 or total > _MAX_BLOCK:
            raise PcapngError(f"a block of {total} bytes is not allowed")
        if len(data) - place < total:
            break
        place += total
    return place
