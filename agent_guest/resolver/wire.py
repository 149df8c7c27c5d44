"""DNS messages, as far as a resolver between clients and servers has to know them (RFC 1035, RFC 6891).

Queries are kept as bytes beside what was read from them: what is forwarded is forwarded as it came, and answers repeat
the question as it was spelled.
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass
from typing import TypeAlias

import dns.exception
import dns.name

Ip: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Record: TypeAlias = Ip | dns.name.Name
"""The data of an A, AAAA or PTR record."""

A, PTR, AAAA, OPT, IXFR, AXFR = 1, 12, 28, 41, 251, 252
CLASS_IN = 1
NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED, BADVERS = 0, 1, 2, 3, 4, 5, 16
QR, TC, RD, RA, CD = 0x8000, 0x0200, 0x0100, 0x0080, 0x0010
OPCODE_MASK, RCODE_MASK = 0x7800, 0x000F
TTL = 600
"""Seconds that the names of containers may be kept, as with Docker."""
UDP_PLAIN, UDP_MAX = 512, 4096
"""What a client without EDNS takes (RFC 1035, 4.2.1), and the most that is ever sent over UDP or offered."""
MESSAGE_MAX = 65535

_HEADER = struct.Struct("!HHHHHH")
_QUESTION = struct.Struct("!HH")
_RECORD = struct.Struct("!HHIH")
_POINTER_TO_QUESTION = b"\xc0\x0c"


class MalformedError(ValueError):
    """Not a query that can be answered; ``reply`` says so to the client, or is None where silence is right."""

    def __init__(self, reason: str, reply: bytes | None) -> None:
        super().__init__(reason)
        self.reply = reply


@dataclass(frozen=True, slots=True)
class Query:
    """A query as it came, and what it asks. ``udp_payload``: what an answer over UDP may measure, in bytes."""

    wire: bytes
    id: int
    flags: int
    name: dns.name.Name
    qtype: int
    qclass: int
    question: bytes
    edns: bool
    dnssec_ok: bool
    udp_payload: int


def parse_query(wire: bytes) -> Query:
    """Reads a client's message; raises MalformedError."""
    if len(wire) < _HEADER.size:
        raise MalformedError("shorter than a header", None)
    ident, flags, questions, answers, authorities, additionals = _HEADER.unpack_from(wire)
    if flags & QR:
        raise MalformedError("a response", None)  # answering responses would let two servers talk for ever
    if flags & OPCODE_MASK:
        raise MalformedError("not a standard query", error_header(ident, flags, NOTIMP))
    formerr = error_header(ident, flags, FORMERR)
    if questions != 1:
        raise MalformedError(f"{questions} questions", formerr)
    try:
        name, offset = _name(wire, _HEADER.size)
        qtype, qclass = _unpack(_QUESTION, wire, offset)
        offset += _QUESTION.size
        question = wire[_HEADER.size : offset]
        if len(question) - _QUESTION.size != len(name_bytes(name)):
            raise MalformedError("compression in the question", formerr)
        opt: tuple[int, int] | None = None
        for position in range(answers + authorities + additionals):
            rtype, rclass, ttl, rdata = _record(wire, offset)
            offset = rdata.stop
            if rtype == OPT:
                if opt is not None or position < answers + authorities:
                    raise MalformedError("more than one OPT record, or a misplaced one", formerr)
                opt = rclass, ttl
    except dns.exception.DNSException as error:
        raise MalformedError(f"unreadable: {type(error).__name__}", formerr) from None
    payload, extended = opt or (UDP_PLAIN, 0)
    query = Query(
        wire=wire,
        id=ident,
        flags=flags,
        name=name,
        qtype=qtype,
        qclass=qclass,
        question=question,
        edns=opt is not None,
        dnssec_ok=bool(extended & 0x8000),
        udp_payload=min(max(payload, UDP_PLAIN), UDP_MAX),
    )
    if (extended >> 16) & 0xFF:
        raise MalformedError("an EDNS version other than 0", answer(query, BADVERS))
    return query


def error_header(ident: int, flags: int, rcode: int) -> bytes:
    """A reply that is a header only, for queries whose question cannot be repeated."""
    return _HEADER.pack(ident, QR | (flags & (OPCODE_MASK | RD)) | RA | rcode, 0, 0, 0, 0)


def answer(query: Query, rcode: int, records: tuple[Record, ...] = (), *, limit: int = MESSAGE_MAX) -> bytes:
    """A reply of at most ``limit`` bytes: records that do not fit are left out, and TC says so."""
    flags = QR | (query.flags & (RD | CD)) | RA | (rcode & RCODE_MASK)
    opt = b""
    if query.edns:
        extended = ((rcode >> 4) << 24) | (0x8000 if query.dnssec_ok else 0)
        opt = b"\0" + _RECORD.pack(OPT, UDP_MAX, extended, 0)
    body = bytearray()
    count = 0
    for record in records:
        rtype, data = _rdata(record)
        item = _POINTER_TO_QUESTION + _RECORD.pack(rtype, CLASS_IN, TTL, len(data)) + data
        if _HEADER.size + len(query.question) + len(body) + len(item) + len(opt) > limit:
            flags |= TC
            break
        body += item
        count += 1
    return _HEADER.pack(query.id, flags, 1, count, 0, bool(opt)) + query.question + bytes(body) + opt


def fit(query: Query, reply: bytes, limit: int) -> bytes:
    """A forwarded reply as it is, or when it is longer than ``limit`` an empty one that sends the client to TCP."""
    if len(reply) <= limit:
        return reply
    ident, flags = struct.unpack_from("!HH", reply)
    return _HEADER.pack(ident, flags | TC, 1, 0, 0, 0) + query.question


def with_id(wire: bytes, ident: int) -> bytes:
    """The message with another id."""
    return ident.to_bytes(2, "big") + wire[2:]


def ask(ident: int, name: dns.name.Name, qtype: int) -> bytes:
    """A query of our own, offering EDNS so that many addresses fit."""
    return (
        _HEADER.pack(ident, RD, 1, 0, 0, 1)
        + name_bytes(name)
        + _QUESTION.pack(qtype, CLASS_IN)
        + b"\0"
        + _RECORD.pack(OPT, UDP_MAX, 0, 0)
    )


def answers_to(sent: bytes, reply: bytes) -> bool:
    """Whether the reply is to the query that was sent: id and question (names in any case) are the same."""
    if len(reply) < _HEADER.size or reply[:2] != sent[:2] or not reply[2] & 0x80:
        return False
    if reply[4:6] != b"\0\1":
        # Some servers refuse with a bare header. Id and source have been checked; nothing but its rcode is used.
        return reply[4:6] == b"\0\0" and len(reply) == _HEADER.size and rcode_of(reply) != NOERROR
    try:
        sent_name, sent_end = _name(sent, _HEADER.size)
        name, end = _name(reply, _HEADER.size)
    except dns.exception.DNSException:
        return False
    return sent_name == name and sent[sent_end : sent_end + 4] == reply[end : end + 4] and len(reply) >= end + 4


def rcode_of(reply: bytes) -> int:
    """The header's 4 bits of response code."""
    return reply[3] & RCODE_MASK


def is_truncated(reply: bytes) -> bool:
    return bool(reply[2] & (TC >> 8))


def read_records(reply: bytes, qtype: int) -> tuple[Record, ...]:
    """The data of the answer section's records of this type (A, AAAA or PTR); raises MalformedError."""
    _ident, _flags, questions, answers, _authorities, _additionals = _HEADER.unpack_from(reply)
    offset = _HEADER.size
    found: list[Record] = []
    try:
        for _ in range(questions):
            _, offset = _name(reply, offset)
            offset += _QUESTION.size
        for _ in range(answers):
            rtype, rclass, _ttl, rdata = _record(reply, offset)
            offset = rdata.stop
            if rtype != qtype or rclass != CLASS_IN:
                continue
            if qtype == PTR:
                found.append(_name(reply, rdata.start)[0])
            else:
                found.append(ipaddress.ip_address(reply[rdata]))
    except (dns.exception.DNSException, ValueError) as error:
        raise MalformedError(f"unreadable: {type(error).__name__}", None) from None
    return tuple(found)


def reverse_address(name: dns.name.Name) -> Ip | None:
    """The address that a name below in-addr.arpa or ip6.arpa stands for (RFC 1035, 3.5; RFC 3596, 2.5)."""
    labels = [label.lower() for label in name.labels]
    if labels[-3:] == [b"in-addr", b"arpa", b""] and len(labels) == 7:
        octets = labels[3::-1]
        if all(octet.isdigit() and len(octet) <= 3 and int(octet) < 256 for octet in octets):
            return ipaddress.IPv4Address(bytes(map(int, octets)))
    if labels[-3:] == [b"ip6", b"arpa", b""] and len(labels) == 35:
        nibbles = b"".join(labels[31::-1])
        if len(nibbles) == 32 and all(len(label) == 1 and label in b"0123456789abcdef" for label in labels[:32]):
            return ipaddress.IPv6Address(bytes.fromhex(nibbles.decode()))
    return None


def _rdata(record: Record) -> tuple[int, bytes]:
    if isinstance(record, ipaddress.IPv4Address):
        return A, record.packed
    if isinstance(record, ipaddress.IPv6Address):
        return AAAA, record.packed
    return PTR, name_bytes(record)


def name_bytes(name: dns.name.Name) -> bytes:
    """The name's labels as they go on the wire, not compressed."""
    wire = name.to_wire()
    assert wire is not None  # without a file to write to, dnspython returns the bytes
    return wire


def _name(wire: bytes, offset: int) -> tuple[dns.name.Name, int]:
    name, used = dns.name.from_wire(wire, offset)
    return name, offset + used


def _unpack(layout: struct.Struct, wire: bytes, offset: int) -> tuple[int, ...]:
    if offset + layout.size > len(wire):
        raise dns.exception.FormError
    return tuple(layout.unpack_from(wire, offset))


def _record(wire: bytes, offset: int) -> tuple[int, int, int, slice]:
    """(type, class, TTL, where its data is) of the record at an offset; raises DNSException."""
    _, offset = _name(wire, offset)
    rtype, rclass, ttl, length = _unpack(_RECORD, wire, offset)
    offset += _RECORD.size
    if offset + length > len(wire):
        raise dns.exception.FormError
    return rtype, rclass, ttl, slice(offset, offset + length)
