"""The strict wire check by example, on the contracts' messages."""

import betterproto2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taploom.contracts.taploom.guest.v1 import (
    GetInfoResponse,
    Interface,
    SyncRequest,
    WatchEventsResponse,
)
from taploom.contracts.taploom.link.v1 import LinkHello
from taploom.rpc import wirecheck
from taploom.rpc.wire import WireError


def test_a_message_survives() -> None:
    request = SyncRequest(interfaces=[Interface(endpoint_id="e1", name="eth0", mtu=1500, addresses=["10.0.0.2/8"])])
    assert wirecheck.parse_strict(SyncRequest, bytes(request)) == request


@pytest.mark.parametrize(
    ("message_type", "data", "reason"),
    [
        (GetInfoResponse, b"\x0a\x05ab", "truncated"),
        (GetInfoResponse, b"\x0a", "truncated"),
        (GetInfoResponse, b"\x80", "truncated"),
        (GetInfoResponse, b"\x00\x00", "illegal field tag"),
        (GetInfoResponse, b"\x08\x01", "wrong wire type"),
        (GetInfoResponse, b"\x0a\x01\xff", "UTF-8"),
        (GetInfoResponse, b"\x0b\x0c", "illegal wire type"),
        (GetInfoResponse, b"\x7b\x7c", "illegal wire type"),  # a group, although unknown
        (GetInfoResponse, b"\x0f", "illegal wire type"),
        (GetInfoResponse, b"\x10" + b"\xff" * 9 + b"\x02", "more than 64 bits"),
        (GetInfoResponse, b"\x10" + b"\x80" * 10 + b"\x00", "more than 10 bytes"),
        (GetInfoResponse, b"\x8a\x80\x80\x80\x80\x00\x00", "more than 5 bytes"),
        (GetInfoResponse, b"\x0a\x80\x80\x80\x80\x80\x00", "more than 5 bytes"),
        (GetInfoResponse, b"\x12\x03\x01\x02\x80", "truncated"),  # packed
        (GetInfoResponse, b"\x18\xff\xff\xff\xff\x1f", "range of an enum"),
        (Interface, b"\x42\x01\x01", "wrong wire type"),  # packed, but mtu is singular
        (WatchEventsResponse, b"\x12\x00\x1a\x00", "oneof"),
        (WatchEventsResponse, b"\x12\x00\x12\x00", "more than once"),
        (WatchEventsResponse, b"\x0a\x06\x08\xff\xff\xff\xff\x7f\x0a", "truncated|more than once|Timestamp"),
        (WatchEventsResponse, b"\x0a\x09\x08\xff\xff\xff\xff\xff\xff\xff\x7f", "Timestamp"),
        (WatchEventsResponse, b"\x0a\x06\x10\x80\x94\xeb\xdc\x03", "Timestamp"),
    ],
)
def test_malformed_bytes_are_refused(message_type: type[betterproto2.Message], data: bytes, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        wirecheck.check(data, message_type)
    with pytest.raises(WireError, match=reason):
        wirecheck.parse_strict(message_type, data)


def test_unknown_fields_are_allowed_and_kept() -> None:
    data = b"\x0a\x01v" + b"\xd2\x09\x03new" + b"\xd8\x09\x07"
    info = wirecheck.parse_strict(GetInfoResponse, data)
    assert info.version == "v"
    assert bytes(info) == data


def test_numbers_may_be_packed_or_not() -> None:
    assert wirecheck.parse_strict(GetInfoResponse, b"\x10\x01\x12\x02\x02\x03\x10\x04").contract_versions == [
        1,
        2,
        3,
        4,
    ]


def test_too_many_elements_are_refused() -> None:
    messages = wirecheck.MAX_FIELDS // wirecheck.MESSAGE_COST
    wirecheck.check(b"\x0a\x00" * messages, SyncRequest)
    with pytest.raises(WireError, match="fields and elements"):
        wirecheck.check(b"\x0a\x00" * (messages + 1), SyncRequest)
    count = wirecheck.MAX_FIELDS + 1
    packed = b"\x12\x81\x80\x04" + b"\x01" * count
    with pytest.raises(WireError, match="fields and elements"):
        wirecheck.check(packed, GetInfoResponse)


def test_unknown_fields_that_take_quadratic_work_are_refused() -> None:
    with pytest.raises(WireError, match="unknown fields"):
        wirecheck.check(b"\xd8\x09\x07" * 20_000, GetInfoResponse)


@given(st.binary(max_size=200), st.sampled_from([GetInfoResponse, SyncRequest, WatchEventsResponse, LinkHello]))
def test_any_bytes_either_parse_or_raise_wire_error(data: bytes, message_type: type[betterproto2.Message]) -> None:
    try:
        message = wirecheck.parse_strict(message_type, data)
    except WireError:
        return
    assert wirecheck.parse_strict(message_type, bytes(message)) == message
