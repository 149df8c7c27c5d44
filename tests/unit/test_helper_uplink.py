"""The uplink: what descriptions of it are accepted, which networks hang on it, and what is written for it."""

from __future__ import annotations

import ipaddress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from agent_helper.door import endpoints, with_checksum
from agent_helper.errors import HelperError, InvalidSpecError
from agent_helper.firewall import Redirect, Rules, ruleset
from agent_helper.spec import legs, parse_network, parse_uplink
from taploom.contracts.taploom.helper.v1 import Network, Uplink

UPLINK = Uplink(
    addresses=["169.254.128.1/18", "fd00:0:0:ffff::1/64"],
    mac_address="02:00:00:00:ff:01",
    host_addresses=["192.0.2.1", "2001:db8::1"],
)
NETWORK = Network(
    network_id="n1",
    name="app",
    subnets=["10.0.0.0/24", "fd00::/64"],
    gateways=["10.0.0.1", "fd00::1"],
    gateway_mac="02:00:00:00:00:01",
    mtu=1500,
    uplink_addresses=["169.254.128.2/18", "fd00:0:0:ffff::2/64"],
    uplink_mac="02:00:00:00:ff:02",
)
address = ipaddress.ip_address


def test_an_uplink() -> None:
    uplink = parse_uplink(UPLINK)
    assert uplink is not None
    assert [str(stand_in) for stand_in in uplink.stand_ins] == ["169.254.191.254", "fd00::ffff:ffff:ffff:ffff:fffe"]
    assert parse_uplink(Uplink()) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"addresses": ["169.254.128.1"]}, "CIDR"),
        ({"addresses": ["169.254.128.1/18", "10.0.0.1/8"]}, "one per family"),
        ({"addresses": ["169.254.128.1/30"]}, "no room"),
        ({"addresses": ["169.254.128.0/18"]}, "network's or the broadcast"),
        ({"addresses": ["169.254.191.254/18"]}, "left free"),
        ({"addresses": ["fe80::1%eth0/64"]}, "zone"),
        ({"addresses": ["127.0.0.1/8"]}, "unicast"),
        ({"mac_address": ""}, "MAC"),
        ({"host_addresses": ["192.0.2.1/24"]}, "without prefix length"),
    ],
)
def test_what_is_wrong_with_an_uplink_is_said(change: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidSpecError, match=message):
        parse_uplink(replace(UPLINK, **change))  # type: ignore[arg-type]


def test_a_network_hangs_on_the_uplink_in_each_family_that_both_have() -> None:
    uplink = parse_uplink(UPLINK)
    found = legs(parse_network(NETWORK), uplink)
    assert [(str(leg.address), str(leg.kernel), str(leg.subnet), str(leg.gateway)) for leg in found] == [
        ("169.254.128.2/18", "169.254.128.1", "10.0.0.0/24", "10.0.0.1"),
        ("fd00:0:0:ffff::2/64", "fd00:0:0:ffff::1", "fd00::/64", "fd00::1"),
    ]
    only4 = replace(NETWORK, subnets=NETWORK.subnets[:1], gateways=NETWORK.gateways[:1])
    assert [leg.subnet.version for leg in legs(parse_network(only4), uplink)] == [4]
    assert [
        leg.subnet.version
        for leg in legs(parse_network(NETWORK), parse_uplink(replace(UPLINK, addresses=UPLINK.addresses[1:])))
    ] == [6]


@pytest.mark.parametrize(
    "change",
    [
        {"internal": True},
        {"uplink_addresses": []},
        {"uplink_addresses": ["10.9.0.2/16"]},  # on another uplink
        {"uplink_addresses": ["169.254.128.1/18"]},  # the kernel's
        {"uplink_addresses": ["169.254.191.254/18"]},  # the stand-in's
    ],
)
def test_networks_without_a_leg(change: dict[str, object]) -> None:
    network = parse_network(replace(NETWORK, **change))  # type: ignore[arg-type]
    assert not legs(network, parse_uplink(UPLINK))
    assert not legs(parse_network(NETWORK), None)


text = st.text(max_size=40) | st.text(alphabet="ab0:./{};\\n ", max_size=20)


@given(
    addresses=st.lists(text | st.sampled_from(UPLINK.addresses), max_size=3),
    mac_address=text | st.just(UPLINK.mac_address),
    host_addresses=st.lists(text | st.ip_addresses().map(str), max_size=3),
)
def test_any_uplink_is_accepted_or_refused(**fields: object) -> None:
    try:
        uplink = parse_uplink(Uplink(**fields))  # type: ignore[arg-type]
    except HelperError as exc:
        assert "\n" not in exc.message
        return
    assert uplink is None or len(uplink.addresses) in {1, 2}


def rules(**changes: object) -> Rules:
    values: dict[str, object] = {
        "interface": "tlup",
        "deaf": ("tl*", "br-int"),
        "mtu": 1500,
        "subnets": (ipaddress.ip_network("169.254.128.0/18"), ipaddress.ip_network("fd00:0:0:ffff::/64")),
        "own": {
            ipaddress.ip_network("169.254.128.2/32"): address("10.0.0.1"),
            ipaddress.ip_network("fd00::/64"): address("fd00::1"),
        },
        "stand_ins": (address("169.254.191.254"), address("fd00:0:0:ffff:ffff:ffff:ffff:fffe")),
        "taken": frozenset({address("10.0.0.1"), address("fd00::1")}),
        "redirect": Redirect(8000, 8001),
    }
    return Rules(**(values | changes))  # type: ignore[arg-type]


def test_the_rules_replace_our_table_and_name_no_other() -> None:
    written = ruleset(rules())
    assert written.startswith("table inet taploom\ndelete table inet taploom\ntable inet taploom {\n")
    assert written.count("table ") == 3
    assert "flush" not in written
    assert ruleset(rules()) == written, "the same rules are the same text"


def test_without_listeners_nothing_is_taken() -> None:
    written = ruleset(rules(redirect=None))
    assert "tproxy" not in written
    assert "syn drop" not in written
    assert "elements" not in ruleset(rules(redirect=None, own={}, taken=frozenset()))


@pytest.mark.parametrize("ip", [IP(src="10.0.0.2", dst="10.0.0.1"), IPv6(src="fd00::2", dst="fd00::1")])
def test_a_syn_that_comes_back_has_its_checksum(ip: IP) -> None:
    tcp = TCP(sport=40000, dport=80, flags="S", options=[("MSS", 1460), ("SAckOK", b"")])
    good = bytes(Ether(src="02:00:00:00:00:02", dst="02:00:00:00:00:01") / ip / tcp)
    at = 14 + (20 if ip.version == 4 else 40)
    partial = good[: at + 16] + b"\x12\x34" + good[at + 18 :]
    padded = partial + b"\0" * 6  # Ethernet's shortest frame
    assert with_checksum(partial) == good
    assert with_checksum(padded)[: len(good)] == good
    assert endpoints(good) == ((str(ip.src), 40000), (str(ip.dst), 80))


@given(st.binary(max_size=60))
def test_any_frame_has_endpoints_or_none(frame: bytes) -> None:
    try:
        (source, port), _ = endpoints(frame)
    except Exception as exc:
        assert type(exc).__name__ in {"error", "ValueError"}
    else:
        assert address(source)
        assert 0 <= port < 65536
