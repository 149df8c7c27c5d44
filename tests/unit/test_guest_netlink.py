"""rtnetlink bytes: cutting datagrams, reading errors, telling which notifications matter."""

from __future__ import annotations

import errno
import struct
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_guest import netlink, watch
from agent_guest.limiter import RepairLimiter


def message(kind: int, body: bytes, flags: int = 0) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body


def link_message(kind: int, index: int) -> bytes:
    return message(kind, struct.pack("=BxHiII", 0, 1, index, 0, 0))


def address_message(kind: int, index: int) -> bytes:
    return message(kind, struct.pack("=BBBBi", 2, 16, 0, 0, index))


def route_message(kind: int, length: int, index: int) -> bytes:
    body = struct.pack("=BBBBBBBBI", 2, length, 0, 0, 254, 3, 0, 1, 0)
    return message(kind, body + struct.pack("=HHI", 8, 1, 0x0A000000) + struct.pack("=HHI", 8, 4, index))


def test_importing_the_agent_does_not_load_pyroute2s_package_for_good() -> None:
    module = sys.modules.get("pyroute2")
    assert module is None or hasattr(module, "IPRoute")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (link_message(netlink.RTM_NEWLINK, 7), True),
        (link_message(netlink.RTM_DELLINK, 8), False),
        (address_message(netlink.RTM_DELADDR, 7), True),
        (address_message(netlink.RTM_DELADDR, 9), False),
        (route_message(netlink.RTM_DELROUTE, 16, 7), True),
        (route_message(netlink.RTM_DELROUTE, 16, 9), False),
        (route_message(netlink.RTM_NEWROUTE, 0, 9), True),
        (link_message(netlink.RTM_NEWLINK, 9) + address_message(netlink.RTM_NEWADDR, 7), True),
        (b"", False),
    ],
)
def test_notifications_that_concern_link_7(data: bytes, expected: bool) -> None:
    assert watch.touches(data, {7}) is expected


@given(st.binary(max_size=200))
def test_any_bytes_can_be_a_notification(data: bytes) -> None:
    assert watch.touches(data, {7}) in (True, False)


@given(st.sampled_from([16, 17, 20, 21, 24, 25]), st.binary(max_size=60))
def test_any_body_can_be_in_a_notification(kind: int, body: bytes) -> None:
    assert watch.touches(message(kind, body), {7}) in (True, False)


@given(st.lists(st.binary(max_size=20), max_size=5), st.integers(0, 40))
def test_datagrams_are_cut_into_their_messages(bodies: list[bytes], cut: int) -> None:
    padded = [message(30, body) + bytes(-len(body) % 4) for body in bodies]
    assert [entry[3][16:] for entry in netlink.split_messages(b"".join(padded))] == bodies
    whole = b"".join(padded)
    shortened = netlink.split_messages(whole[: max(0, len(whole) - cut)])
    assert [entry[3][16:] for entry in shortened] == bodies[: len(shortened)]


def test_the_kernels_own_words_are_in_the_error() -> None:
    request = message(20, b"")
    text = b"Invalid prefix\0"
    attribute = struct.pack("=HH", 4 + len(text), 1) + text
    body = struct.pack("=i", -errno.EINVAL) + request[:16] + attribute
    with pytest.raises(netlink.NetlinkError, match="Invalid prefix") as caught:
        netlink.raise_error(netlink.NLM_F_ACK_TLVS | netlink.NLM_F_CAPPED, message(2, body))
    assert caught.value.errno == errno.EINVAL
    netlink.raise_error(0, message(2, struct.pack("=i", 0) + request))


def test_repairs_are_free_at_first_and_then_rationed() -> None:
    limiter = RepairLimiter(burst=3, interval=2.0)
    assert [limiter.acquire("a", 0.0) for _ in range(3)] == [0.0, 0.0, 0.0]
    assert limiter.acquire("a", 0.0) == 2.0
    assert limiter.acquire("b", 0.0) == 0.0
    assert limiter.acquire("a", 1.0) == 1.0
    assert limiter.acquire("a", 2.0) == 0.0
    assert limiter.acquire("a", 2.5) == 1.5
    assert [limiter.acquire("a", 100.0) for _ in range(4)] == [0.0, 0.0, 0.0, 2.0]


@given(st.lists(st.floats(0, 5), max_size=60))
def test_over_any_time_there_are_never_more_repairs_than_the_ration(gaps: list[float]) -> None:
    limiter = RepairLimiter(burst=5, interval=2.0)
    now, done = 0.0, 0
    for gap in gaps:
        now += gap
        done += limiter.acquire("a", now) == 0.0
    assert done <= 5 + now / 2.0 + 1e-6
