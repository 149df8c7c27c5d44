"""The protobuf wire format at its lowest level: just enough for what this package encodes by hand.

Source: https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from collections.abc import Iterator

VARINT = 0
FIXED64 = 1
LENGTH_DELIMITED = 2
FIXED32 = 5


class WireError(ValueError):
    """Bytes that are not a well-formed protobuf message of the expected type."""


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    """The varint at `position` and the position after it. WireError when it is truncated or over 64 bits."""
    result = 0
    for shift in range(0, 70, 7):
        try:
            byte = data[position]
        except IndexError:
            raise WireError("truncated varint") from None
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            if result >= 1 << 64:
                raise WireError("varint of more than 64 bits")
            return result, position
    raise WireError("varint of more than 10 bytes")


def fields(data: bytes) -> Iterator[tuple[int, int, int | bytes]]:
    """The fields of a message: number, wire type, and the varint or the bytes. WireError when malformed."""
    position = 0
    while position < len(data):
        tag, position = read_varint(data, position)
        number, wire_type = tag >> 3, tag & 7
        if not 1 <= number < 1 << 29:
            raise WireError(f"illegal field number {number}")
        if wire_type == VARINT:
            value, position = read_varint(data, position)
            yield number, wire_type, value
            continue
        if wire_type == LENGTH_DELIMITED:
            length, position = read_varint(data, position)
        elif wire_type in (FIXED32, FIXED64):
            length = 4 if wire_type == FIXED32 else 8
        else:
            raise WireError(f"field {number} has the illegal wire type {wire_type}")
        if length > len(data) - position:
            raise WireError(f"field {number} is truncated")
        yield number, wire_type, data[position : position + length]
        position += length


def encode_varint(value: int) -> bytes:
    """`value`, 0 to 2**64-1, as a varint."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode_varint_field(number: int, value: int) -> bytes:
    """A varint field; nothing for 0, the default."""
    return encode_varint(number << 3 | VARINT) + encode_varint(value) if value else b""


def encode_bytes(number: int, value: bytes) -> bytes:
    """A length-delimited field, also when it is empty (as an element of a repeated field must be)."""
    return encode_varint(number << 3 | LENGTH_DELIMITED) + encode_varint(len(value)) + value
