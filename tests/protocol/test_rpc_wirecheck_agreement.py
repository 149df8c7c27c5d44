"""What passes the strict wire check, betterproto2 parses as google.protobuf does."""

import datetime
import math
from typing import Any

import betterproto2
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from rpc_support import PACKAGE, pb
from rpc_testing.taploomtest.echo.v1 import Everything

from taploom.contracts.taploom.bridge.v1 import GetStatusResponse
from taploom.contracts.taploom.guest.v1 import SyncRequest, WatchEventsResponse
from taploom.contracts.taploom.helper.v1 import SyncRequest as HelperSyncRequest
from taploom.contracts.taploom.link.v1 import LinkHello
from taploom.rpc import wirecheck
from taploom.rpc.wire import WireError, encode_varint

TYPES: dict[str, type[betterproto2.Message]] = {
    f"{PACKAGE}.Everything": Everything,
    "taploom.guest.v1.SyncRequest": SyncRequest,
    "taploom.guest.v1.WatchEventsResponse": WatchEventsResponse,
    "taploom.helper.v1.SyncRequest": HelperSyncRequest,
    "taploom.bridge.v1.GetStatusResponse": GetStatusResponse,
    "taploom.link.v1.LinkHello": LinkHello,
}


def normal(value: Any) -> Any:
    """A google.protobuf value as plain data without what betterproto2's types cannot hold.

    Those are nanoseconds below a microsecond; a NaN equals itself here and -0.0 is 0.0.
    """
    if isinstance(value, float):
        return "nan" if math.isnan(value) else value + 0.0
    if not hasattr(value, "DESCRIPTOR"):
        return value
    name = value.DESCRIPTOR.full_name
    if name == "google.protobuf.Timestamp":
        return (name, value.seconds * 10**6 + value.nanos // 1000)
    if name == "google.protobuf.Duration":
        return name  # compared apart: betterproto2 writes negative ones wrongly
    result: dict[str, Any] = {}
    for field in value.DESCRIPTOR.fields:
        content = getattr(value, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            result[field.name] = {key: normal(item) for key, item in content.items()}
        elif field.is_repeated:
            result[field.name] = [normal(item) for item in content]
        elif field.has_presence and not value.HasField(field.name):
            result[field.name] = None
        else:
            result[field.name] = normal(content)
    return result


def agree(name: str, data: bytes) -> bool:
    """Whether `data` passes; fails when the two parsers do not agree on it then."""
    try:
        ours = wirecheck.parse_strict(TYPES[name], data)
    except WireError:
        return False
    try:
        theirs = pb(name).FromString(data)
    except DecodeError:
        pytest.fail(f"google.protobuf does not take {data.hex()}")
    if isinstance(ours, Everything) and ours.a_duration is not None:
        assert ours.a_duration == datetime.timedelta(
            seconds=theirs.a_duration.seconds, microseconds=theirs.a_duration.nanos // 1000
        )
    assert normal(pb(name).FromString(bytes(ours))) == normal(theirs)
    return True


def field_bytes(number: int, wire_type: int, payload: bytes, value: int) -> bytes:
    head = encode_varint(number << 3 | wire_type)
    match wire_type:
        case 0:
            return head + encode_varint(value)
        case 1:
            return head + (payload + bytes(8))[:8]
        case 2:
            return head + encode_varint(len(payload)) + payload
        case 5:
            return head + (payload + bytes(4))[:4]
    return head


VALUES = st.integers(0, 2**64 - 1) | st.integers(0, 300) | st.sampled_from([2**31, 2**32 - 1, 2**63, 2**64 - 1])
ANY_FIELD = st.builds(
    field_bytes, st.integers(1, 40), st.sampled_from([0, 0, 1, 2, 2, 2, 5, 3, 4]), st.binary(max_size=12), VALUES
)


def _right_type(number: int) -> int:
    """The wire type of the field of Everything."""
    field = pb("Everything").DESCRIPTOR.fields_by_number.get(number)
    if field is None:
        return 0
    return {
        FieldDescriptor.TYPE_DOUBLE: 1,
        FieldDescriptor.TYPE_FIXED64: 1,
        FieldDescriptor.TYPE_SFIXED64: 1,
        FieldDescriptor.TYPE_FLOAT: 5,
        FieldDescriptor.TYPE_FIXED32: 5,
        FieldDescriptor.TYPE_SFIXED32: 5,
        FieldDescriptor.TYPE_STRING: 2,
        FieldDescriptor.TYPE_BYTES: 2,
        FieldDescriptor.TYPE_MESSAGE: 2,
    }.get(field.type, 0)


def nested(children: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    payload = st.lists(children, max_size=3).map(b"".join) | st.text(max_size=4).map(str.encode)
    return st.builds(
        lambda number, payload, value: field_bytes(number, _right_type(number), payload, value),
        st.integers(1, 41),
        payload,
        VALUES,
    )


FIELDS = st.recursive(
    st.builds(lambda number, value: field_bytes(number, _right_type(number), b"", value), st.integers(1, 41), VALUES),
    nested,
    max_leaves=8,
)
SMALL_NUMBERS = st.builds(
    field_bytes, st.integers(1, 5), st.sampled_from([0, 2]), st.text(max_size=6).map(str.encode), st.integers(0, 9)
)
EXAMPLES = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))


@EXAMPLES
@given(st.sampled_from(sorted(TYPES)), st.binary(max_size=60))
def test_any_bytes(name: str, data: bytes) -> None:
    agree(name, data)


@EXAMPLES
@given(st.sampled_from(sorted(TYPES)), st.lists(ANY_FIELD | SMALL_NUMBERS, max_size=6).map(b"".join))
def test_any_fields(name: str, data: bytes) -> None:
    agree(name, data)


@EXAMPLES
@given(st.lists(FIELDS, max_size=6).map(b"".join))
def test_fields_of_the_right_type(data: bytes) -> None:
    assume(agree(f"{PACKAGE}.Everything", data))


@EXAMPLES
@given(st.lists(FIELDS, min_size=1, max_size=5).map(b"".join), st.data())
def test_damaged_messages(data: bytes, draw: st.DataObject) -> None:
    damaged = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 3))):
        if damaged:
            damaged[draw.draw(st.integers(0, len(damaged) - 1))] = draw.draw(st.integers(0, 255))
    del damaged[draw.draw(st.integers(0, len(damaged))) :]
    agree(f"{PACKAGE}.Everything", bytes(damaged))


@pytest.mark.parametrize("name", sorted(TYPES))
def test_what_google_protobuf_writes_passes(name: str) -> None:
    """All fields set, to what JSON-like samples hold."""
    message = pb(name)()

    def fill(target: Any, depth: int) -> None:
        chosen: set[str] = set()
        for field in target.DESCRIPTOR.fields:
            group = field.containing_oneof
            if group is not None:
                if group.name in chosen:
                    continue
                chosen.add(group.name)
            content = getattr(target, field.name)
            if field.message_type is not None:
                if depth > 3:
                    continue
                if field.message_type.GetOptions().map_entry:
                    continue
                if field.is_repeated:
                    fill(content.add(), depth + 1)
                    content.add()
                else:
                    content.SetInParent()
                    fill(content, depth + 1)
                continue
            sample: Any = {"string": "ü", "bytes": b"\xff"}.get(
                {FieldDescriptor.TYPE_STRING: "string", FieldDescriptor.TYPE_BYTES: "bytes"}.get(field.type, ""), 1
            )
            if field.is_repeated:
                content.extend([sample, sample])
            else:
                setattr(target, field.name, sample)

    fill(message, 0)
    assert agree(name, message.SerializeToString())


def test_maps_and_extremes() -> None:
    message = pb("Everything")(
        name_by_number={-1: "a", 2**31 - 1: "b"},
        nested_by_name={"x": {"name": "n"}, "": {}},
        colour_by_name={"r": 1, "u": 77},
        int32s=[-1, -(2**31)],
        sint64s=[-(2**63), 2**63 - 1],
        uint64s=[2**64 - 1],
        colours=[2, -5],
        a_double=float("inf"),
        doubles=[float("nan"), -0.0],
        an_optional=0,
    )
    message.a_timestamp.FromJsonString("0001-01-01T00:00:00Z")
    message.a_duration.FromMilliseconds(-1500)
    assert agree(f"{PACKAGE}.Everything", message.SerializeToString())


def test_depth_is_limited() -> None:
    data = b""
    for _ in range(wirecheck.MAX_DEPTH // 2 - 1):
        data = b"\x12" + encode_varint(len(data)) + data
        data = b"\x8a\x01" + encode_varint(len(data)) + data
    wirecheck.parse_strict(Everything, data)
    for _ in range(2):
        data = b"\x12" + encode_varint(len(data)) + data
        data = b"\x8a\x01" + encode_varint(len(data)) + data
    with pytest.raises(WireError, match="deep"):
        wirecheck.parse_strict(Everything, data)
