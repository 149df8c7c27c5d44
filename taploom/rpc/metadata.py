"""Call metadata and time-outs as HTTP/2 header fields (PROTOCOL-HTTP2.md of gRPC)."""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Iterable, Mapping
from typing import TypeAlias

Metadata: TypeAlias = tuple[tuple[str, str | bytes], ...]
"""(key, value) pairs in order; keys are lower case; values of keys that end in ``-bin`` are bytes, others str."""

MetadataLike: TypeAlias = Mapping[str, str | bytes] | Iterable[tuple[str, str | bytes]]
"""What callers may give: a mapping, or pairs (a key may come several times)."""

_KEY = re.compile(r"[0-9a-z_.-]+\Z")
_VALUE = re.compile(r"[ -~]*\Z")
# Names that are the protocol's, not the application's.
_RESERVED = frozenset({"content-type", "te", "user-agent"})
_HOP_BY_HOP = frozenset({"connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade", "host"})
_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])\Z")
_UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_MAX_TIMEOUT = 99_999_999


def encode_metadata(metadata: MetadataLike | None) -> list[tuple[bytes, bytes]]:
    """`metadata` as header fields.

    Raises ValueError for a key or value that HTTP/2 or gRPC does not allow, TypeError for str where ``-bin`` wants
    bytes and the other way round.
    """
    if metadata is None:
        return []
    pairs = metadata.items() if isinstance(metadata, Mapping) else metadata
    result: list[tuple[bytes, bytes]] = []
    for key, value in pairs:
        if not _KEY.match(key):
            raise ValueError(f"metadata key {key!r} must be lower case letters, digits and _ . -")
        if key.startswith("grpc-") or key in _RESERVED or key in _HOP_BY_HOP:
            raise ValueError(f"metadata key {key!r} is reserved by gRPC or HTTP/2")
        if key.endswith("-bin"):
            if not isinstance(value, bytes):
                raise TypeError(f"metadata {key!r} ends in -bin, so its value must be bytes")
            result.append((key.encode(), encode_binary(value)))
            continue
        if not isinstance(value, str):
            raise TypeError(f"metadata {key!r} must be str; bytes need a key that ends in -bin")
        if not _VALUE.match(value):
            raise ValueError(f"metadata {key!r} has characters other than printable ASCII")
        result.append((key.encode(), value.strip(" ").encode()))
    return result


def decode_metadata(headers: Iterable[tuple[bytes, bytes]]) -> Metadata:
    """The application's metadata in `headers`: without pseudo-headers and what belongs to the protocol.

    A ``-bin`` value that is not base64 is left out; the call goes on.
    """
    result: list[tuple[str, str | bytes]] = []
    for raw_key, raw_value in headers:
        if raw_key.startswith((b":", b"grpc-")):
            continue
        key = raw_key.decode("ascii", "replace")
        if key in _RESERVED:
            continue
        if not key.endswith("-bin"):
            result.append((key, raw_value.decode("ascii", "replace")))
            continue
        # Several values may be joined with commas; base64 has none itself.
        for part in raw_value.split(b","):
            try:
                result.append((key, decode_binary(part)))
            except ValueError:
                continue
    return tuple(result)


def encode_binary(value: bytes) -> bytes:
    """base64 without padding, as gRPC recommends."""
    return base64.b64encode(value).rstrip(b"=")


def decode_binary(value: bytes) -> bytes:
    """base64 with or without padding; ValueError when it is neither."""
    value = value.strip(b" ").rstrip(b"=")
    try:
        return base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(f"not base64: {error}") from None


def encode_timeout(seconds: float) -> bytes:
    """A ``grpc-timeout`` of at least `seconds`: at most 8 digits and a unit, in the finest unit that fits."""
    if math.isnan(seconds):
        raise ValueError("a timeout must be a number of seconds")
    seconds = max(seconds, 0.0)
    for unit in (b"n", b"u", b"m", b"S", b"M", b"H"):
        value = seconds / _UNITS[unit]
        if value <= _MAX_TIMEOUT:
            return str(math.ceil(value) if value < _MAX_TIMEOUT else _MAX_TIMEOUT).encode() + unit
    return str(_MAX_TIMEOUT).encode() + b"H"


def decode_timeout(value: bytes) -> float:
    """The seconds of a ``grpc-timeout``; ValueError when it is malformed."""
    match = _TIMEOUT.match(value)
    if not match:
        raise ValueError(f"malformed grpc-timeout {value[:32]!r}")
    return int(match[1]) * _UNITS[match[2]]
