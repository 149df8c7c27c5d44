"""The strict check of protobuf bytes that stands before betterproto2's lenient parser.

Bytes from a VM are hostile. betterproto2 takes truncated strings, wrong wire types, groups and two members of a oneof;
it replaces where protobuf merges; some bytes make it work quadratically. What passes `check` it parses as
google.protobuf does. Refused are:

- anything truncated, varints of more than 64 bits, tags and lengths of more than 32 bits, field number 0;
- groups and unknown wire types, and known fields with a wire type that is not theirs (repeated numbers may be packed or
  not);
- strings that are not UTF-8, enum values outside of int32, timestamps and durations out of their range;
- two members of a oneof, and a singular message field that comes twice (legal protobuf, which no encoder writes);
- map entries without their message or with unknown fields (legal too, and written by nobody);
- messages nested more than `MAX_DEPTH` deep or with more than `MAX_FIELDS` fields and elements, and unknown fields
  that would take betterproto2 too long to keep.

Unknown fields are allowed otherwise: newer peers send them.

Source: https://protobuf.dev/programming-guides/encoding/; google.protobuf's own limits are depth 100 and 2 GiB.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import betterproto2

from .wire import FIXED32, FIXED64, LENGTH_DELIMITED, VARINT, WireError

__all__ = ("MAX_DEPTH", "MAX_FIELDS", "WireError", "check", "parse_strict")

MAX_DEPTH = 32
"""Messages within messages, the outermost one counted."""

MAX_FIELDS = 65_536
"""Fields and packed elements of a message and all within it, where a message counts as `MESSAGE_COST`: what bounds
the time and memory that parsing takes."""

MESSAGE_COST = 4

# betterproto2 keeps unknown fields by appending to bytes: occurrences times bytes is the work that it does.
_MAX_UNKNOWN_WORK = 2**28

_MAX_TAG = 2**32 - 1
# google/protobuf/timestamp.proto: 0001-01-01T00:00:00Z to 9999-12-31T23:59:59Z.
_MIN_TIMESTAMP = -62_135_596_800
_MAX_TIMESTAMP = 253_402_300_799
# google/protobuf/duration.proto: about 10,000 years.
_MAX_DURATION = 315_576_000_000
_NANOS = 1_000_000_000

_WIRE_TYPES = {
    **dict.fromkeys(betterproto2.WIRE_VARINT_TYPES, VARINT),
    **dict.fromkeys(betterproto2.WIRE_FIXED_32_TYPES, FIXED32),
    **dict.fromkeys(betterproto2.WIRE_FIXED_64_TYPES, FIXED64),
    **dict.fromkeys(betterproto2.WIRE_LEN_DELIM_TYPES, LENGTH_DELIMITED),
}

MessageT = TypeVar("MessageT")


class _Field:
    """What may come for one field."""

    __slots__ = ("group", "is_enum", "is_string", "message", "name", "repeated", "wire_type")

    def __init__(
        self,
        name: str,
        proto_type: str,
        group: str | None,
        repeated: bool,
        message: Callable[[], _Schema] | None,
    ) -> None:
        self.name = name
        self.wire_type = _WIRE_TYPES[proto_type]
        self.group = group
        self.repeated = repeated
        self.is_string = proto_type == betterproto2.TYPE_STRING
        self.is_enum = proto_type == betterproto2.TYPE_ENUM
        self.message = message


class _Schema:
    """What may come for one message type."""

    __slots__ = ("closed", "fields", "name", "required", "validate")

    def __init__(self, message_type: type, *, map_entry: bool = False) -> None:
        self.name = message_type.__name__
        self.fields: dict[int, _Field] = {}
        self.closed = map_entry
        """Whether unknown fields are refused."""
        self.required: str | None = None
        """A field that must be there: the message of a map's entry, which is an empty one for protobuf."""
        self.validate: Callable[[bytes], None] | None = None
        if message_type.__module__.endswith(".google.protobuf"):
            self.validate = {"Timestamp": _check_timestamp, "Duration": _check_duration}.get(self.name)
        # The metadata that betterproto2's own parser works from; it has no public name for it.
        metadata: Any = message_type._betterproto  # type: ignore[attr-defined]  # a class property
        for name, meta in metadata.meta_by_field_name.items():
            submessage: Callable[[], _Schema] | None = None
            if meta.proto_type in (betterproto2.TYPE_MESSAGE, betterproto2.TYPE_MAP):
                submessage_type = meta.unwrap() if meta.unwrap else metadata.cls_by_field[name]
                submessage = _deferred(submessage_type, map_entry=meta.proto_type == betterproto2.TYPE_MAP)
            repeated = bool(meta.repeated) or meta.proto_type == betterproto2.TYPE_MAP
            group = None if meta.group is None else str(meta.group)
            if map_entry and submessage is not None:
                self.required = str(name)
            self.fields[meta.number] = _Field(name, meta.proto_type, group, repeated, submessage)


_schemas: dict[type, _Schema] = {}


def _schema(message_type: type, *, map_entry: bool = False) -> _Schema:
    schema = _schemas.get(message_type)
    if schema is None:
        schema = _schemas[message_type] = _Schema(message_type, map_entry=map_entry)
    return schema


def _deferred(message_type: type, *, map_entry: bool) -> Callable[[], _Schema]:
    """The schema when it is needed: message types may contain themselves."""
    return lambda: _schema(message_type, map_entry=map_entry)


def check(data: bytes, message_type: type) -> None:
    """WireError unless `data` is a strictly well-formed message of `message_type` (a betterproto2 message class)."""
    _Checker(data).message(0, len(data), _schema(message_type), 1)


def parse_strict(message_type: type[MessageT], data: bytes) -> MessageT:
    """The message that `data` is; WireError when it is not one.

    Classes that are not betterproto2's (with a ``parse`` of their own) are expected to be strict themselves.
    """
    if issubclass(message_type, betterproto2.Message):
        check(data, message_type)
    try:
        message: MessageT = message_type.parse(data)  # type: ignore[attr-defined]  # every message class has it
    except (ValueError, OverflowError, EOFError) as error:
        raise WireError(f"not a {message_type.__name__}: {error}") from error
    return message


class _Checker:
    """One pass over the bytes of a message."""

    __slots__ = ("_budget", "_data")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._budget = MAX_FIELDS

    def message(self, position: int, end: int, schema: _Schema, depth: int) -> None:
        """Checks the message between `position` and `end`."""
        if depth > MAX_DEPTH:
            raise WireError(f"{schema.name} is nested more than {MAX_DEPTH} deep")
        start = position
        seen: set[str] = set()
        members: dict[str, str] = {}
        unknown_count = unknown_bytes = 0
        while position < end:
            self._spend(1, schema)
            field_start = position
            tag, position = self._varint(position, end, 5, schema.name)
            if tag > _MAX_TAG or tag < 8:
                raise WireError(f"{schema.name} has an illegal field tag {tag:#x}")
            wire_type = tag & 7
            value_start, position = self._skip(position, end, wire_type, schema.name)
            field = schema.fields.get(tag >> 3)
            if field is None:
                if schema.closed:
                    raise WireError("a map entry has a field besides key and value")
                unknown_count += 1
                unknown_bytes += position - field_start
                if unknown_count * unknown_bytes > _MAX_UNKNOWN_WORK:
                    raise WireError(f"{schema.name} has too many unknown fields")
                continue
            if wire_type != field.wire_type:
                if wire_type != LENGTH_DELIMITED or not field.repeated:
                    raise WireError(f"{schema.name}.{field.name} has the wrong wire type {wire_type}")
                self._packed(value_start, position, field, schema)
                continue
            if field.group is not None and members.setdefault(field.group, field.name) != field.name:
                raise WireError(
                    f"{schema.name} has both {members[field.group]} and {field.name} of oneof {field.group}"
                )
            if field.message is not None:
                if not field.repeated:
                    if field.name in seen:
                        raise WireError(f"{schema.name}.{field.name} comes more than once")
                    seen.add(field.name)
                self._spend(MESSAGE_COST - 1, schema)
                self.message(value_start, position, field.message(), depth + 1)
            elif field.is_string:
                try:
                    self._data[value_start:position].decode()
                except UnicodeDecodeError:
                    raise WireError(f"{schema.name}.{field.name} is not UTF-8") from None
            elif field.is_enum:
                self._enum(value_start, position, field, schema)
        if schema.required is not None and schema.required not in seen:
            raise WireError(f"{schema.name} lacks its {schema.required}")
        if schema.validate is not None:
            schema.validate(self._data[start:end])

    def _spend(self, count: int, schema: _Schema) -> None:
        self._budget -= count
        if self._budget < 0:
            raise WireError(f"more than {MAX_FIELDS} fields and elements (at {schema.name})")

    def _skip(self, position: int, end: int, wire_type: int, where: str) -> tuple[int, int]:
        """Where the value at `position` starts (after a length) and ends."""
        if wire_type == VARINT:
            return position, self._varint(position, end, 10, where)[1]
        if wire_type == LENGTH_DELIMITED:
            length, position = self._varint(position, end, 5, where)
        elif wire_type == FIXED32:
            length = 4
        elif wire_type == FIXED64:
            length = 8
        else:
            raise WireError(f"{where} has a field of the illegal wire type {wire_type}")
        if length > end - position:
            raise WireError(f"{where} is truncated")
        return position, position + length

    def _varint(self, position: int, end: int, limit: int, where: str) -> tuple[int, int]:
        """The varint at `position`, of at most `limit` bytes and 64 bits, and where it ends."""
        data = self._data
        if position < end and data[position] < 0x80:  # nearly all
            return data[position], position + 1
        result = shift = 0
        for index in range(position, min(end, position + limit)):
            byte = data[index]
            result |= (byte & 0x7F) << shift
            if byte < 0x80:
                if result >= 1 << 64:
                    raise WireError(f"{where} has a varint of more than 64 bits")
                return result, index + 1
            shift += 7
        if end - position < limit:
            raise WireError(f"{where} is truncated")
        raise WireError(f"{where} has a varint of more than {limit} bytes")

    def _packed(self, position: int, end: int, field: _Field, schema: _Schema) -> None:
        """Checks packed elements."""
        if field.wire_type == VARINT:
            while position < end:
                self._spend(1, schema)
                start = position
                position = self._varint(position, end, 10, schema.name)[1]
                if field.is_enum:
                    self._enum(start, position, field, schema)
            return
        size = 4 if field.wire_type == FIXED32 else 8
        count, rest = divmod(end - position, size)
        if rest:
            raise WireError(f"{schema.name}.{field.name} is truncated")
        self._spend(count, schema)

    def _enum(self, position: int, end: int, field: _Field, schema: _Schema) -> None:
        value = _signed(self._varint(position, end, 10, schema.name)[0])
        if not -(1 << 31) <= value < 1 << 31:
            raise WireError(f"{schema.name}.{field.name} is out of the range of an enum")


def _signed(value: int) -> int:
    """Two's complement of 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _seconds_and_nanos(data: bytes) -> tuple[int, int]:
    """The fields of a Timestamp or Duration whose structure has been checked."""
    seconds = nanos = 0
    for field in betterproto2.parse_fields(data):
        if field.number == 1:
            seconds = _signed(field.value)
        elif field.number == 2:
            nanos = field.value & 0xFFFF_FFFF
            nanos -= (nanos & 0x8000_0000) << 1
    return seconds, nanos


def _check_timestamp(data: bytes) -> None:
    seconds, nanos = _seconds_and_nanos(data)
    if not _MIN_TIMESTAMP <= seconds <= _MAX_TIMESTAMP or not 0 <= nanos < _NANOS:
        raise WireError("a Timestamp is outside of the years 1 to 9999 or has illegal nanoseconds")


def _check_duration(data: bytes) -> None:
    seconds, nanos = _seconds_and_nanos(data)
    if (
        not -_MAX_DURATION <= seconds <= _MAX_DURATION
        or not -_NANOS < nanos < _NANOS
        or (seconds < 0 < nanos)
        or (nanos < 0 < seconds)
    ):
        raise WireError("a Duration is out of range or its seconds and nanoseconds differ in sign")
