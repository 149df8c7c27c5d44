"""rtnetlink bytes: cutting datagrams, reading errors, telling which notifications matter."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from ipaddress import ip_address, ip_interface, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_guest import netlink, vlan, watch
from agent_guest.limiter import RepairLimiter
from agent_guest.state import AddressState, LinkState, RouteState
from taploom import netlink as taploom_netlink
from taploom.contracts.taploom.link.v1 import LinkCounters


def message(kind: int, body: bytes, flags: int = 0) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body


def link_message(kind: int, index: int) -> bytes:
    return message(kind, struct.pack("=BxHiII", 0, 1, index, 0, 0))


def address_message(kind: int, index: int) -> bytes:
    return message(kind, struct.pack("=BBBBi", 2, 16, 0, 0, index))


def route_message(kind: int, length: int, index: int, flags: int = 0) -> bytes:
    body = struct.pack("=BBBBBBBBI", 2, length, 0, 0, 254, 3, 0, 1, 0)
    return message(kind, body + struct.pack("=HHI", 8, 1, 0x0A000000) + struct.pack("=HHI", 8, 4, index), flags)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (link_message(netlink.RTM_NEWLINK, 7), {7}),
        (link_message(netlink.RTM_DELLINK, 8), set()),
        (address_message(netlink.RTM_DELADDR, 7), {7}),
        (address_message(netlink.RTM_DELADDR, 9), set()),
        (route_message(netlink.RTM_DELROUTE, 16, 7), {7}),
        (route_message(netlink.RTM_DELROUTE, 16, 9), set()),
        (route_message(netlink.RTM_NEWROUTE, 0, 9), {5, 7}),
        (route_message(netlink.RTM_NEWROUTE, 0, 5), {5}),
        (route_message(netlink.RTM_NEWROUTE, 16, 9), set()),
        (route_message(netlink.RTM_NEWROUTE, 16, 9, taploom_netlink.NLM_F_REPLACE), {5, 7}),
        (route_message(netlink.RTM_NEWROUTE, 16, 7, taploom_netlink.NLM_F_REPLACE), {7}),
        (link_message(netlink.RTM_NEWLINK, 9) + address_message(netlink.RTM_NEWADDR, 7), {7}),
        (b"", set()),
    ],
)
def test_notifications_that_concern_links_5_and_7(data: bytes, expected: set[int]) -> None:
    assert watch.touched(data, {5, 7}) == expected


@given(st.binary(max_size=200))
def test_any_bytes_can_be_a_notification(data: bytes) -> None:
    assert watch.touched(data, {7}) <= {7}


@given(st.sampled_from([16, 17, 20, 21, 24, 25]), st.binary(max_size=60))
def test_any_body_can_be_in_a_notification(kind: int, body: bytes) -> None:
    assert watch.touched(message(kind, body), {7}) <= {7}


@given(st.lists(st.binary(max_size=20), max_size=5), st.integers(0, 40))
def test_datagrams_are_cut_into_their_messages(bodies: list[bytes], cut: int) -> None:
    padded = [message(30, body) + bytes(-len(body) % 4) for body in bodies]
    assert [entry[3][16:] for entry in taploom_netlink.split_messages(b"".join(padded))] == bodies
    whole = b"".join(padded)
    shortened = taploom_netlink.split_messages(whole[: max(0, len(whole) - cut)])
    assert [entry[3][16:] for entry in shortened] == bodies[: len(shortened)]


def test_the_kernels_own_words_are_in_the_error() -> None:
    request = message(20, b"")
    text = b"Invalid prefix\0"
    attribute = struct.pack("=HH", 4 + len(text), 1) + text
    body = struct.pack("=i", -errno.EINVAL) + request[:16] + attribute
    with pytest.raises(taploom_netlink.NetlinkError, match="Invalid prefix") as caught:
        taploom_netlink.raise_error(taploom_netlink.NLM_F_ACK_TLVS | taploom_netlink.NLM_F_CAPPED, message(2, body))
    assert caught.value.errno == errno.EINVAL
    taploom_netlink.raise_error(0, message(2, struct.pack("=i", 0) + request))


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


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def test_messages_are_read_as_the_kernel_writes_them() -> None:
    body = struct.pack("=BxHiII", 0, 1, 7, 0x10043, 0)
    body += (
        attribute(3, b"eth0\0") + attribute(1, bytes.fromhex("0242ac120002")) + attribute(4, struct.pack("=I", 1400))
    )
    body += attribute(18 | 0x8000, attribute(1, b"tun\0") + attribute(2, b"junk")) + attribute(20, b"taploom:ep\0")
    assert netlink.read_link(message(16, body)) == LinkState(
        7, "eth0", "02:42:ac:12:00:02", 1400, up=True, carrier=True, alias="taploom:ep", kind="tun"
    )
    lone = netlink.read_link(message(16, struct.pack("=BxHiII", 0, 772, 1, 0, 0)))
    assert lone == LinkState(1, "", "", 0, up=False)
    body = (
        struct.pack("=BBBBI", 2, 16, 0x80, 0, 7)
        + attribute(1, bytes([172, 18, 0, 9]))
        + attribute(2, bytes([172, 18, 0, 2]))
    )
    assert netlink.read_address(message(20, body)) == AddressState(7, ip_interface("172.18.0.2/16"))
    body = struct.pack("=BBBBI", 10, 64, 0, 0, 7) + attribute(1, ip_address("fd00::2").packed)
    body += attribute(8, struct.pack("=I", 0x88))
    assert netlink.read_address(message(20, body)) == AddressState(7, ip_interface("fd00::2/64"), failed=True)
    assert netlink.read_address(message(20, struct.pack("=BBBBI", 7, 0, 0, 0, 7))) is None
    body = struct.pack("=BBBBBBBBI", 2, 0, 0, 0, 254, 3, 0, 1, 0) + attribute(5, bytes([172, 18, 0, 1]))
    body += attribute(4, struct.pack("=I", 7)) + attribute(6, struct.pack("=I", 5))
    expected = RouteState(ip_network("0.0.0.0/0"), ip_address("172.18.0.1"), 7, 5, 3)
    assert netlink.read_route(message(24, body)) == expected
    assert netlink.read_route(message(24, body + attribute(15, struct.pack("=I", 255)))) is None
    assert netlink.read_route(message(24, body[:7] + b"\2" + body[8:])) is None


@given(st.sampled_from([netlink.read_link, netlink.read_address, netlink.read_route]), st.binary(max_size=120))
def test_any_bytes_are_read_or_left_out(read: Callable[[bytes], object], body: bytes) -> None:
    read(message(16, body))
    read(body)


@given(st.sampled_from([netlink.read_address, netlink.read_route]), st.sampled_from([2, 10]), st.binary(max_size=80))
def test_any_attributes_are_read_or_left_out(read: Callable[[bytes], object], family: int, body: bytes) -> None:
    read(message(16, struct.pack("=BBBBI", family, 24, 0, 0, 7) + body))
    read(message(16, struct.pack("=BBBBBBBBI", family, 24, 0, 0, 254, 3, 0, 1, 0) + body))


def vlan_link(info: bytes) -> bytes:
    body = struct.pack("=BxHiII", 0, 1, 9, 1, 0)
    body += taploom_netlink.text_attribute(netlink.IFLA_IFNAME, "eth0.20")
    return message(netlink.RTM_NEWLINK, body + struct.pack("=HHI", 8, netlink.IFLA_LINK, 7) + info)


def test_vlan_interfaces_are_read_as_they_are_asked_for() -> None:
    found = netlink.read_link(vlan_link(vlan.link_info(20)))
    assert found is not None
    assert (found.name, found.kind, found.over, found.tag) == ("eth0.20", vlan.KIND, 7, 20)
    # Of others the link below is not what carries their tags (a veth's is its other end).
    info = taploom_netlink.attribute(vlan.IFLA_LINKINFO, taploom_netlink.text_attribute(vlan.IFLA_INFO_KIND, "veth"))
    other = netlink.read_link(vlan_link(info))
    assert other is not None
    assert (other.over, other.tag) == (0, 0)


def test_other_tags_are_none() -> None:
    tag = taploom_netlink.attribute(vlan.IFLA_VLAN_ID, struct.pack("=H", 20))
    protocol = taploom_netlink.attribute(vlan.IFLA_VLAN_PROTOCOL, b"\x88\xa8")
    assert vlan.read_tag(tag) == 20
    assert vlan.read_tag(tag + protocol) == 0, "IEEE 802.1ad"
    assert vlan.read_tag(b"") == 0


@given(st.binary(max_size=60))
def test_any_bytes_can_be_a_vlans_description(data: bytes) -> None:
    assert 0 <= vlan.read_tag(data) <= 0xFFFF


def test_what_a_vlan_interface_has_carried() -> None:
    statistics = struct.pack("=24Q", 10, 20, 1000, 2000, 1, 2, 3, 4, *range(16))
    found = vlan.read_counters(statistics)
    # Received bytes come without the Ethernet headers of 14 bytes.
    assert found == LinkCounters(tx_frames=20, tx_bytes=2000, rx_frames=10, rx_bytes=1140, rx_drops=3, tx_drops=4)
    assert vlan.read_counters(b"") is None


@given(st.binary(max_size=200))
def test_any_bytes_can_be_statistics(data: bytes) -> None:
    assert (vlan.read_counters(data) is None) == (len(data) < 64)


def test_an_interface_of_this_machines_is_counted() -> None:
    with netlink.Netlink() as rtnetlink:
        counters = rtnetlink.counters(1)  # lo
        assert counters is not None
        assert rtnetlink.counters(0x7FFFFFFF) is None
