"""What an interface says when its link comes up, read back by scapy."""

from __future__ import annotations

import ipaddress
import struct

from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6ND_NS, ICMPv6NDOptDstLLAddr, ICMPv6NDOptSrcLLAddr, IPv6
from scapy.layers.l2 import ARP, Ether

from agent_guest.neighbours import frames, unresolved
from agent_guest.spec import InterfaceSpec

MAC = "02:42:ac:12:00:02"


def spec(*addresses: str) -> InterfaceSpec:
    return InterfaceSpec(
        endpoint_id="e",
        name="eth0",
        mac=MAC,
        addresses=tuple(ipaddress.ip_interface(address) for address in addresses),
        gateways=(),
        priority=0,
        routes=(),
        mtu=1500,
        network_name="app",
        dns_servers=(),
    )


def test_announces_every_address() -> None:
    arp, advert = (Ether(frame) for frame in frames(spec("172.18.0.2/16", "fd00::2/64"), []))
    assert (arp.src, arp.dst) == (MAC, "ff:ff:ff:ff:ff:ff")
    assert (arp[ARP].psrc, arp[ARP].pdst, arp[ARP].hwsrc, arp[ARP].op) == ("172.18.0.2", "172.18.0.2", MAC, 1)
    assert (advert.src, advert.dst) == (MAC, "33:33:00:00:00:01")
    assert (advert[IPv6].src, advert[IPv6].dst, advert[IPv6].hlim) == ("fd00::2", "ff02::1", 255)
    assert (advert[ICMPv6ND_NA].tgt, advert[ICMPv6ND_NA].O, advert[ICMPv6ND_NA].S) == ("fd00::2", 1, 0)
    assert advert[ICMPv6NDOptDstLLAddr].lladdr == MAC
    checksum = advert[ICMPv6ND_NA].cksum
    del advert[ICMPv6ND_NA].cksum
    assert Ether(bytes(advert))[ICMPv6ND_NA].cksum == checksum


def test_asks_from_an_address_of_the_same_network() -> None:
    addresses = ("172.18.0.2/16", "10.0.0.2/8", "fd00::2/64", "fd01::2/64")
    wanted = [ipaddress.ip_address(text) for text in ("10.9.9.9", "fd01::77")]
    *_, arp, solicit = (Ether(frame) for frame in frames(spec(*addresses), wanted))
    assert (arp[ARP].psrc, arp[ARP].pdst) == ("10.0.0.2", "10.9.9.9")
    assert (solicit[IPv6].src, solicit[IPv6].dst) == ("fd01::2", "ff02::1:ff00:77")
    assert solicit.dst == "33:33:ff:00:00:77"
    assert solicit[ICMPv6ND_NS].tgt == "fd01::77"
    assert solicit[ICMPv6NDOptSrcLLAddr].lladdr == MAC


def test_a_family_without_an_address_is_not_asked() -> None:
    assert len(list(frames(spec("172.18.0.2/16"), [ipaddress.ip_address("fd00::1")]))) == 1


def _neighbour(index: int, state: int, address: str) -> bytes:
    packed = ipaddress.ip_address(address).packed
    body = struct.pack("=BBHiHBB", 2, 0, 0, index, state, 0, 0) + struct.pack("=HH", 4 + len(packed), 1) + packed
    return struct.pack("=IHHII", 16 + len(body), 28, 2, 1, 0) + body


def test_only_what_is_being_asked_for_on_this_interface() -> None:
    data = b"".join(
        (
            _neighbour(3, 0x01, "172.18.0.9"),
            _neighbour(3, 0x02, "172.18.0.8"),  # reachable
            _neighbour(4, 0x01, "172.18.0.7"),  # elsewhere
            _neighbour(3, 0x10, "fd00::9"),  # being probed
            _neighbour(3, 0x01, "ff02::1"),
        )
    )
    assert [str(address) for address in unresolved(data, 3)] == ["172.18.0.9", "fd00::9"]


@given(st.binary(max_size=200), st.integers(0, 5))
def test_any_dump_is_survived(tail: bytes, index: int) -> None:
    assert isinstance(unresolved(_neighbour(index, 1, "10.0.0.1")[: len(tail)] + tail, index), list)
