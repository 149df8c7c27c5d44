"""Descriptions: what is accepted, and that nothing accepted can say more than it should."""

from __future__ import annotations

import ipaddress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_helper.errors import HelperError, InvalidSpecError
from agent_helper.ids import check_id
from agent_helper.spec import check_in_network, parse_endpoint, parse_network
from taploom.contracts.taploom.helper.v1 import Endpoint, Network

NETWORK = Network(
    network_id="n1",
    name="app",
    subnets=["10.0.0.0/24", "fd00::/64"],
    gateways=["10.0.0.1", "fd00::1"],
    gateway_mac="02:00:00:00:00:01",
    mtu=1500,
    dns_servers=["169.254.64.1"],
    dns_mac="02:00:00:00:00:fd",
)
ENDPOINT = Endpoint(
    endpoint_id="e1",
    network_id="n1",
    mac_address="02:00:00:00:00:02",
    addresses=["10.0.0.2", "fd00::2"],
    names=["web", "www"],
)


def test_a_network() -> None:
    spec = parse_network(NETWORK)
    assert spec.gateway_interfaces == ["10.0.0.1/24", "fd00::1/64"]
    assert spec.dns_servers == (ipaddress.ip_address("169.254.64.1"),)


def test_an_endpoint() -> None:
    spec = parse_endpoint(replace(ENDPOINT, mac_address="02:00:00:00:00:0A"))
    check_in_network(spec, parse_network(NETWORK))
    assert spec.port_addresses == "02:00:00:00:00:0a 10.0.0.2 fd00::2 fe80::ff:fe00:a"
    assert spec.names == ("web", "www")


def test_names_that_dns_cannot_carry_are_left_out() -> None:
    names = ["web", "a..b", ".a", "x" * 64, "web", "y" * 63]
    assert parse_endpoint(replace(ENDPOINT, names=names)).names == ("web", "y" * 63)


def test_the_smallest_subnets() -> None:
    pair = replace(NETWORK, subnets=["10.0.0.0/31"], gateways=["10.0.0.0"])
    check_in_network(parse_endpoint(replace(ENDPOINT, addresses=["10.0.0.1"])), parse_network(pair))
    with pytest.raises(InvalidSpecError, match="no room"):
        parse_network(replace(NETWORK, subnets=["10.0.0.1/32"], gateways=["10.0.0.1"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subnets": ["10.0.0.1/24"], "gateways": ["10.0.0.1"]}, "host bits"),
        ({"subnets": ["10.0.0.0/24"]}, "one per subnet"),
        ({"gateways": ["10.0.0.1", "10.0.0.2"]}, "outside"),
        ({"gateways": ["10.0.0.255", "fd00::1"]}, "broadcast"),
        ({"gateway_mac": "02:00:00:00:00:01\n"}, "MAC"),
        ({"mtu": 1279}, "1280 to 65535"),
        ({"dns_servers": ["10.0.0.9"]}, "outside the subnets"),
        ({"dns_mac": "02:00:00:00:00:01"}, "gateway's"),
        ({"uplink_addresses": ["10.1.0.1/24", "10.1.0.2/24"]}, "one per family"),
        ({"uplink_addresses": ["x"]}, "CIDR"),
    ],
)
def test_what_is_wrong_with_a_network_is_said(change: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidSpecError, match=message):
        parse_network(replace(NETWORK, **change))  # type: ignore[arg-type]


text = st.text(max_size=80) | st.text(alphabet="ab0.-_/:\n \t#", max_size=20)


@given(text)
def test_an_id_has_no_surprises(value: str) -> None:
    try:
        check_id("id", value)
    except InvalidSpecError as exc:
        assert "\n" not in exc.message
    else:
        assert value.isascii()
        assert not set(value) & set(" \n\t\"'/\\#;")


@given(
    network_id=text,
    name=text,
    subnets=st.lists(text | st.sampled_from(["10.0.0.0/24", "fd00::/64"]), max_size=3),
    gateways=st.lists(text | st.sampled_from(["10.0.0.1", "fd00::1"]), max_size=3),
    gateway_mac=text | st.just("02:00:00:00:00:01"),
    mtu=st.integers(0, 2**32 - 1) | st.just(1500),
    dns_servers=st.lists(text | st.ip_addresses().map(str), max_size=2),
    dns_mac=text | st.just("02:00:00:00:00:fd"),
)
def test_any_network_is_accepted_or_refused(**fields: object) -> None:
    try:
        spec = parse_network(Network(**fields))  # type: ignore[arg-type]
    except HelperError:
        return
    assert all(gateway in subnet for gateway, subnet in zip(spec.gateways, spec.subnets, strict=True))


@given(
    endpoint_id=text | st.just("e1"),
    network_id=text | st.just("n1"),
    mac_address=text | st.just("02:00:00:00:00:02"),
    addresses=st.lists(text | st.ip_addresses().map(str), max_size=3),
    names=st.lists(text | st.sampled_from(["web", "a.b"]), max_size=4),
)
def test_any_endpoint_is_accepted_or_refused(**fields: object) -> None:
    try:
        spec = parse_endpoint(Endpoint(**fields))  # type: ignore[arg-type]
    except HelperError as exc:
        assert "\n" not in exc.message
        return
    assert all(character.isalnum() or character in "_.-" for name in spec.names for character in name)
    link_local = any(address.version == 6 for address in spec.addresses)
    assert len(spec.port_addresses.split()) == 1 + len(spec.addresses) + link_local
