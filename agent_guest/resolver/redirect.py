"""Sends what is for 127.0.0.11:53 to the port that the resolver has, so that port 53 is the container's own.

A program that serves names in a container binds 0.0.0.0:53, which it could not beside a socket on 127.0.0.11:53. Two
nat rules of nf_tables in the container's namespace, made over netlink as nft(8) would: ``ip daddr 127.0.0.11 udp dport
53 dnat to 127.0.0.11:PORT``, and the same for TCP. Sources: linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable

TABLE = b"taploom-names"
_CHAIN = b"output"

_NETLINK_NETFILTER = 12
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_SUBSYSTEM = 10  # NFNL_SUBSYS_NFTABLES
_NEWTABLE, _DELTABLE, _NEWCHAIN, _NEWRULE = 0, 2, 3, 6
_REQUEST, _ACK, _CREATE, _APPEND = 0x1, 0x4, 0x400, 0x800
_NLMSG_ERROR = 2
_NESTED = 0x8000
_LOCAL_OUT, _DSTNAT_PRIORITY = 3, -100
_META_L4PROTO, _NETWORK_HEADER, _TRANSPORT_HEADER, _DNAT = 16, 1, 2, 1
_HEADER = struct.Struct("=IHHII")
_TIMEOUT = 2.0


def install(address: str, port: int, to_port: int) -> None:
    """Redirects what goes to the IPv4 address and port, in place of an earlier redirection. Raises OSError."""
    chain = [
        _text(1, TABLE),
        _text(3, _CHAIN),
        _nest(4, [_number(1, _LOCAL_OUT), _number(2, _DSTNAT_PRIORITY)]),
        _text(7, b"nat"),
    ]
    packed = socket.inet_aton(address)
    _send(
        [
            # Made first, so that there is one to delete.
            (_NEWTABLE, _CREATE, [_text(1, TABLE)]),
            (_DELTABLE, 0, [_text(1, TABLE)]),
            (_NEWTABLE, _CREATE, [_text(1, TABLE)]),
            (_NEWCHAIN, _CREATE, chain),
            *(
                (_NEWRULE, _CREATE | _APPEND, [_text(1, TABLE), _text(2, _CHAIN), rule])
                for rule in (_rule(protocol, packed, port, to_port) for protocol in (6, 17))
            ),
        ]
    )


def remove() -> None:
    """Ends the redirection, if there is one. Raises OSError."""
    try:
        _send([(_DELTABLE, 0, [_text(1, TABLE)])])
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise


def _rule(protocol: int, address: bytes, port: int, to_port: int) -> bytes:
    return _nest(
        4,
        [
            _expression(b"meta", [_number(2, _META_L4PROTO), _number(1, 1)]),
            _equals(bytes([protocol])),
            _expression(b"payload", [_number(1, 1), _number(2, _NETWORK_HEADER), _number(3, 16), _number(4, 4)]),
            _equals(address),
            _expression(b"payload", [_number(1, 1), _number(2, _TRANSPORT_HEADER), _number(3, 2), _number(4, 2)]),
            _equals(port.to_bytes(2, "big")),
            _expression(b"immediate", [_number(1, 1), _nest(2, [_attribute(1, address)])]),
            _expression(b"immediate", [_number(1, 2), _nest(2, [_attribute(1, to_port.to_bytes(2, "big"))])]),
            _expression(b"nat", [_number(1, _DNAT), _number(2, socket.AF_INET), _number(3, 1), _number(5, 2)]),
        ],
    )


def _equals(value: bytes) -> bytes:
    return _expression(b"cmp", [_number(1, 1), _number(2, 0), _nest(3, [_attribute(1, value)])])


def _expression(name: bytes, attributes: Iterable[bytes]) -> bytes:
    return _nest(1, [_text(1, name), _nest(2, attributes)])


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _nest(kind: int, attributes: Iterable[bytes]) -> bytes:
    return _attribute(kind | _NESTED, b"".join(attributes))


def _number(kind: int, value: int) -> bytes:
    return _attribute(kind, value.to_bytes(4, "big", signed=value < 0))


def _text(kind: int, value: bytes) -> bytes:
    return _attribute(kind, value + b"\0")


def _message(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    begins_or_ends = kind in (_BATCH_BEGIN, _BATCH_END)
    family, resource = (0, _SUBSYSTEM) if begins_or_ends else (socket.AF_INET, 0)
    payload = struct.pack("!BBH", family, 0, resource) + body
    return _HEADER.pack(_HEADER.size + len(payload), kind, _REQUEST | flags, sequence, 0) + payload


def _send(changes: list[tuple[int, int, list[bytes]]]) -> None:
    """All of the changes or, when one is refused, none; raises OSError then."""
    batch = _message(_BATCH_BEGIN, 0, 0, b"")
    for sequence, (kind, flags, attributes) in enumerate(changes, 1):
        body = b"".join(attributes)
        batch += _message(_SUBSYSTEM << 8 | kind, flags | _ACK, sequence, body)
    batch += _message(_BATCH_END, 0, len(changes) + 1, b"")
    waiting = set(range(1, len(changes) + 1))
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER) as sock:
        sock.settimeout(_TIMEOUT)
        sock.bind((0, 0))
        sock.send(batch)
        while waiting:
            data = sock.recv(65536)
            offset = 0
            while offset + _HEADER.size + 4 <= len(data):
                length, kind, _flags, sequence, _pid = _HEADER.unpack_from(data, offset)
                if kind == _NLMSG_ERROR:
                    (code,) = struct.unpack_from("=i", data, offset + _HEADER.size)
                    if code:
                        raise OSError(-code, os.strerror(-code))
                    waiting.discard(sequence)
                offset += max(_HEADER.size, (length + 3) & ~3)
