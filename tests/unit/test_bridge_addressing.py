"""How hosts come to addresses and packets get out: options of networks, and what guests and the helper are told."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_bridge import addressing
from host_bridge.containers.ports import translated
from host_bridge.describe import guest_interface, helper_network, needs_of_network, published_ports
from host_bridge.desired import DesiredState
from host_bridge.errors import NetworkOptionError
from host_bridge.model import EndpointOptions, NetworkOptions, SubnetOptions
from host_bridge.ports import PortBinding
from host_bridge.store import Store
from taploom.contracts.taploom.helper.v1 import GatewayMode, HelperFeature, RouterAdvertisementMode

MODE4, MODE6 = addressing.OPTION_GATEWAY_MODES[4], addressing.OPTION_GATEWAY_MODES[6]
ALL = frozenset({int(HelperFeature.IPV6), int(HelperFeature.DHCP)})


def network(desired: DesiredState, name: str, **fields: object) -> str:
    record = desired.create_network(name, NetworkOptions(**fields))  # type: ignore[arg-type]
    desired.activate_network(record.id)
    return record.id


def test_only_in_ipv6(tmp_path: Path) -> None:
    with Store(tmp_path / "state") as store:
        desired = DesiredState(store)
        six = network(desired, "six", enable_ipv4=False, enable_ipv6=True)
        guest = desired.register_guest("web", "vsock:3")
        endpoint = desired.connect("six", "web")
        record = store.network(six)
        assert record is not None
        told = guest_interface(endpoint, record)
        assert told.dns_servers == ["fe80::53"]
        assert all(":" in address for address in (*told.addresses, *told.gateways))
        assert helper_network(record, ALL).dns_servers == ["fe80::53"]
        assert needs_of_network(record) == {HelperFeature.IPV6}
        assert guest.card is None


def test_options_reach_the_helper(tmp_path: Path) -> None:
    with Store(tmp_path / "state") as store:
        desired = DesiredState(store)
        options = {MODE6: "routed", addressing.OPTION_RA: "slaac", addressing.OPTION_RA_INTERVAL: "30"}
        options |= {addressing.OPTION_DHCP_LEASE: "600", addressing.OPTION_RDNSS: "fd00::9"}
        record = store.network(network(desired, "app", enable_ipv6=True, options=options))
        plain = store.network(network(desired, "plain", enable_ipv6=True))
        assert record is not None and plain is not None
        told = helper_network(record, ALL, ["9.9.9.9", "127.0.0.1", "[2001:db8::1]:53"])
        assert (told.gateway_mode_ipv4, told.gateway_mode_ipv6) == (GatewayMode.UNSPECIFIED, GatewayMode.ROUTED)
        assert told.router_advertisements is not None and told.dhcp is not None
        assert told.router_advertisements.mode == RouterAdvertisementMode.SLAAC
        assert told.router_advertisements.interval_seconds == 30
        assert told.router_advertisements.dns_server == "fd00::9"
        assert told.dhcp.lease_seconds == 600
        assert told.dhcp.dns_servers == [record.dns_server, "fe80::53", "9.9.9.9"]
        assert needs_of_network(record) == {HelperFeature.IPV6}
        assert needs_of_network(plain) == frozenset()
        # A helper that knows none of it is told none of it.
        old = helper_network(plain)
        assert (old.dns_servers, old.dhcp, old.router_advertisements) == ([plain.dns_server], None, None)


def test_an_address_made_of_the_mac_is_ipams(tmp_path: Path) -> None:
    with Store(tmp_path / "state") as store:
        desired = DesiredState(store)
        network(
            desired,
            "app",
            enable_ipv6=True,
            subnets=[SubnetOptions(subnet="10.9.0.0/24"), SubnetOptions(subnet="fd00:9::/64")],
            options={addressing.OPTION_RA: "slaac"},
        )
        for name, number in (("web", 3), ("db", 4)):
            desired.register_guest(name, f"vsock:{number}")
        one = desired.connect("app", "web")
        assert (one.mac_address, one.addresses[1]) == ("02:42:0a:09:00:02", "fd00:9::42:aff:fe09:2")
        assert not one.static_mac
        two = desired.connect("app", "db", EndpointOptions(addresses=["fd00:9::7"], mac_address="02:00:00:00:00:07"))
        assert two.addresses[1] == "fd00:9::7"
        assert two.static_mac


@pytest.mark.parametrize(
    ("key", "value", "fields"),
    [
        (MODE4, "bridged", {}),
        (MODE6, "isolated", {}),
        (addressing.OPTION_RA, "on", {}),
        (addressing.OPTION_RA, "slaac", {"subnets": [SubnetOptions(subnet="fd00:9::/80")]}),
        (addressing.OPTION_RA, "slaac", {"enable_ipv6": False}),
        (addressing.OPTION_RA_INTERVAL, "3", {}),
        (addressing.OPTION_RA_INTERVAL, "1801", {}),
        (addressing.OPTION_RA_PREFERENCE, "best", {}),
        (addressing.OPTION_RDNSS, "9.9.9.9", {}),
        (addressing.OPTION_DHCP, "yes", {}),
        (addressing.OPTION_DHCP_LEASE, "0", {}),
        (addressing.OPTION_DHCP_DNS, "9.9.9.9,x", {}),
        ("taploom.ipv6.slaac", "true", {}),
        ("taploom.dhcp.leases", "60", {}),
    ],
)
def test_what_cannot_be_is_refused_as_a_whole(tmp_path: Path, key: str, value: str, fields: dict[str, object]) -> None:
    with Store(tmp_path / "state") as store:
        desired = DesiredState(store)
        before = store.dump()
        with pytest.raises(NetworkOptionError, match=key.replace(".", r"\.")):
            desired.create_network("app", NetworkOptions(**({"enable_ipv6": True, "options": {key: value}} | fields)))  # type: ignore[arg-type]
        assert store.dump() == before


@given(st.text(max_size=12))
def test_any_text_is_right_or_refused(text: str) -> None:
    for key in (addressing.OPTION_RA_INTERVAL, addressing.OPTION_DHCP_DNS, addressing.OPTION_RDNSS, MODE4):
        try:
            addressing.check({key: text}, internal=False, ipv6=True, prefix=64)
        except NetworkOptionError:
            continue
        read = addressing.Addressing({key: text})
        read.router_message("app", has_dns=True)
        read.dhcp_message(())
        assert read.mode(4)


def test_published_ports_by_gateway_mode(tmp_path: Path) -> None:
    with Store(tmp_path / "state") as store:
        desired = DesiredState(store)
        both, own = PortBinding(80), PortBinding(81, host_ip="::1")
        modes: dict[str, dict[str, str]] = {
            "nat": {},
            "six": {MODE6: "routed"},
            "neither": {MODE4: "routed", MODE6: "routed"},
            "open": {MODE4: "nat-unprotected"},
        }
        wanted = {"nat": ["", "::1"], "six": ["0.0.0.0"], "neither": [], "open": ["", "::1"]}
        for name, options in modes.items():
            record = store.network(network(desired, name, enable_ipv6=True, options=options))
            assert record is not None
            assert [one.host_ip for one in translated([both, own], record)] == wanted[name]


def test_what_a_container_publishes() -> None:
    config = {
        "Config": {"ExposedPorts": {"53/udp": {}, "9/sctp": {}}},
        "HostConfig": {"PortBindings": {"80/tcp": [{"HostPort": "8080"}], "443": None}, "PublishAllPorts": True},
    }
    assert published_ports(config) == [("tcp", 80), ("tcp", 443), ("udp", 53)]
    config["HostConfig"]["PublishAllPorts"] = False
    assert published_ports(config) == [("tcp", 80), ("tcp", 443)]
