"""Networks, endpoints and containers with Docker's options, on a real database."""

from __future__ import annotations

import dataclasses
import datetime
import ipaddress
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_guest.resolver.config import ResolverConfig
from host_bridge import store as store_module
from host_bridge.describe import endpoint_names, guest_interface, guest_resolver, helper_network, helper_uplink
from host_bridge.desired import DesiredState
from host_bridge.errors import (
    ActiveEndpointsError,
    AddressTakenError,
    AliasOnDefaultError,
    AlreadyConnectedError,
    AmbiguousIdError,
    BridgeError,
    ConfigNetworkError,
    GuestNotFoundError,
    InvalidAliasError,
    InvalidError,
    InvalidNameError,
    InvalidSubnetError,
    MacTakenError,
    MultipleSubnetsError,
    NameInUseError,
    NetworkNameTakenError,
    NetworkNotFoundError,
    NetworkOptionError,
    NoAddressLeftError,
    NoFamilyError,
    NoPoolLeftError,
    NotConnectedError,
    OutsideSubnetError,
    PoolOverlapError,
    PredefinedNetworkError,
    StaticAddressError,
    TakenError,
    UnsupportedDriverError,
)
from host_bridge.model import (
    OPTION_HOST_BINDING,
    OPTION_ICC,
    OPTION_INTERFACE,
    OPTION_MASQUERADE,
    OPTION_MTU,
    OPTION_PREFIX,
    ContainerRecord,
    EndpointOptions,
    EndpointRecord,
    GuestSettings,
    NetworkOptions,
    NetworkRecord,
    SubnetOptions,
    parse_bool,
)
from host_bridge.names import dns_name
from host_bridge.store import Store
from taploom.contracts.taploom.guest.v1 import GuestFeature

NOW = datetime.datetime(2026, 11, 22, 1, 0, tzinfo=datetime.UTC)
ALL = frozenset(GuestFeature)


@pytest.fixture
def state(tmp_path: Path) -> Iterator[DesiredState]:
    with Store(tmp_path / "state") as store:
        yield DesiredState(store)


def create(state: DesiredState, name: str = "app", *subnets: SubnetOptions, **options: Any) -> NetworkRecord:
    record = state.create_network(name, NetworkOptions(subnets=subnets, **options))
    assert state.activate_network(record.id)
    return state.find_network(name)


def register(state: DesiredState, name: str, **options: Any) -> str:
    return state.register_guest(name, f"unix:/run/vms/{name}/control.sock", **options).id


def connect(state: DesiredState, network: str, guest: str, **options: Any) -> EndpointRecord:
    record = state.connect(network, guest, EndpointOptions(**options))
    assert state.activate_endpoint(record.id)
    found = state.store.endpoint(record.id)
    assert found is not None
    return found


def net(cidr: str, **options: Any) -> SubnetOptions:
    return SubnetOptions(subnet=cidr, **options)


class refused:
    """Fails unless the block is refused with this error and changes nothing; `error` is it."""

    def __init__(self, state: DesiredState, kind: type[BridgeError]) -> None:
        self._state, self._kind = state, kind
        self.error: Any = None

    def __enter__(self) -> refused:
        self._before = self._state.store.dump()
        return self

    def __exit__(self, kind: object, value: BaseException | None, traceback: object) -> bool:
        assert isinstance(value, self._kind), f"{value!r} is no {self._kind.__name__}"
        assert self._state.store.dump() == self._before
        assert "\n" not in str(value) and str(value).isprintable()
        self.error = value
        return True


# Predefined networks


def test_predefined_networks_are_dockers(state: DesiredState) -> None:
    bridge, host, none = (state.find_network(name) for name in ("bridge", "host", "none"))
    assert [(s.subnet, s.gateway, s.configured) for s in bridge.subnets] == [("172.17.0.0/16", "172.17.0.1", False)]
    assert bridge.options == {
        "com.docker.network.bridge.default_bridge": "true",
        "com.docker.network.bridge.enable_icc": "true",
        "com.docker.network.bridge.enable_ip_masquerade": "true",
        "com.docker.network.bridge.host_binding_ipv4": "0.0.0.0",
        "com.docker.network.bridge.name": "docker0",
        "com.docker.network.driver.mtu": "1500",
    }
    assert (bridge.driver, host.driver, none.driver) == ("bridge", "host", "null")
    assert all(one.predefined and one.active for one in (bridge, host, none))
    assert (bridge.switched, host.switched, none.switched) == (True, False, False)
    assert bridge.default_bridge and not host.default_bridge
    assert bridge.uplink_addresses == ("169.254.128.2/18",)
    assert not host.subnets and not none.uplink_addresses


def test_predefined_networks_stay(state: DesiredState) -> None:
    register(state, "web")
    for name in ("bridge", "host", "none", "default"):
        with refused(state, PredefinedNetworkError) as caught:
            state.create_network(name)
        assert (caught.error.name, caught.error.action) == (name, "create")
    for name in ("bridge", "host", "none"):
        with refused(state, PredefinedNetworkError) as caught:
            state.delete_network(name)
        assert caught.error.action == "remove"
    for name in ("host", "none"):
        with refused(state, PredefinedNetworkError) as caught:
            state.connect(name, "web")
        assert caught.error.action == "connect"


def test_predefined_networks_keep_their_ids(tmp_path: Path) -> None:
    ids = []
    for _ in range(2):
        with Store(tmp_path) as store:
            ids.append([(record.name, record.id) for record in DesiredState(store).networks()])
    assert ids[0] == ids[1]


def test_default_subnets_avoid_the_hosts_networks(tmp_path: Path) -> None:
    mine = [
        ipaddress.ip_network("172.17.0.0/16"),
        ipaddress.ip_network("172.18.5.0/24"),
        ipaddress.ip_network("fd00::/64"),
    ]
    with Store(tmp_path) as store:
        state = DesiredState(store, host_networks=lambda: mine)
        assert state.find_network("bridge").subnets[0].subnet == "172.19.0.0/16"
        assert create(state).subnets[0].subnet == "172.20.0.0/16"
        # One that is asked for is the user's business.
        assert create(state, "back", net("172.17.0.0/16")).subnets[0].subnet == "172.17.0.0/16"


# Schema 1


_OLD = """
INSERT INTO networks VALUES ('n1', 'app', 0, 1500, 1, 1, '169.254.64.1');
INSERT INTO networks VALUES ('n2', 'bridge', 1, 1400, 1, 1, '169.254.64.2');
INSERT INTO networks VALUES ('n3', 'own', 0, 1500, 1, 1, '169.254.64.3');
INSERT INTO guests VALUES ('g1', 'web', 'vsock:3:5555', 'vsock:3:5556', 1);
INSERT INTO addresses VALUES ('n1', '172.18.0.1', 4, NULL);
INSERT INTO addresses VALUES ('n2', '172.17.0.1', 4, NULL);
INSERT INTO addresses VALUES ('n3', '10.5.0.1', 4, NULL);
INSERT INTO addresses VALUES ('n3', 'fd12::1', 6, NULL);
INSERT INTO subnets VALUES ('n1', 4, '172.18.0.0/16', '172.18.0.1');
INSERT INTO subnets VALUES ('n2', 4, '172.17.0.0/16', '172.17.0.1');
INSERT INTO subnets VALUES ('n3', 4, '10.5.0.0/24', '10.5.0.1');
INSERT INTO subnets VALUES ('n3', 6, 'fd12::/64', 'fd12::1');
INSERT INTO endpoints VALUES ('e1', 'n1', 'g1', 'eth0', 7, 1, 1);
INSERT INTO aliases VALUES ('e1', 0, 'www');
INSERT INTO addresses VALUES ('n1', '172.18.0.2', 4, 'e1');
INSERT INTO macs VALUES ('02:42:ac:12:00:02', 'endpoint', NULL, 'e1');
INSERT INTO macs VALUES ('02:00:00:00:00:01', 'gateway', 'n1', NULL);
INSERT INTO macs VALUES ('02:00:00:00:00:02', 'dns', 'n1', NULL);
INSERT INTO macs VALUES ('02:00:00:00:00:03', 'gateway', 'n2', NULL);
INSERT INTO macs VALUES ('02:00:00:00:00:04', 'dns', 'n2', NULL);
INSERT INTO macs VALUES ('02:00:00:00:00:05', 'gateway', 'n3', NULL);
INSERT INTO macs VALUES ('02:00:00:00:00:06', 'dns', 'n3', NULL);
"""


def test_database_of_schema_1_is_carried_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(store_module, "MIGRATIONS", store_module.MIGRATIONS[:1])
        Store(tmp_path).close()
    connection = sqlite3.connect(tmp_path / store_module.DATABASE)
    assert connection.execute("PRAGMA user_version").fetchone() == (1,)
    connection.executescript("PRAGMA foreign_keys = ON;" + _OLD)
    connection.close()
    with Store(tmp_path) as store:
        state = DesiredState(store)
        assert [record.name for record in state.networks()] == ["app", "bridge", "bridge-1", "host", "none", "own"]
        app, own, moved = (state.find_network(name) for name in ("app", "own", "bridge-1"))
        assert (app.id, app.dns_server, app.gateway_mac) == ("n1", "169.254.64.1", "02:00:00:00:00:01")
        assert [(s.subnet, s.gateway, s.configured) for s in app.subnets] == [("172.18.0.0/16", "172.18.0.1", False)]
        assert [s.configured for s in own.subnets] == [True, True]
        assert (own.enable_ipv6, app.enable_ipv6) == (True, False)
        assert (moved.id, moved.internal, moved.mtu, moved.uplink_addresses) == ("n2", True, 1400, ())
        # Its subnet was the one that the default bridge would have had.
        assert state.find_network("bridge").subnets[0].subnet == "172.19.0.0/16"
        assert len({*app.uplink_addresses, *own.uplink_addresses}) == 3
        assert app.uplink_mac and app.uplink_mac != own.uplink_mac
        (web,) = store.endpoints()
        assert (web.id, web.addresses, web.mac_address) == ("e1", ("172.18.0.2",), "02:42:ac:12:00:02")
        assert (web.aliases, web.gateway_priority, web.static_addresses) == (("www",), 7, ())
        assert state.find_guest("web").settings == GuestSettings()
        assert not store._all("PRAGMA foreign_key_check")
        before = store.dump()
        register(state, "db")
        assert connect(state, "app", "db").addresses == ("172.18.0.3",)
        state.remove_guest("db")
    with Store(tmp_path) as store:
        DesiredState(store)
        assert store.dump() == before


# Subnets


def test_ranges_gateways_and_auxiliary_addresses(state: DesiredState) -> None:
    app = create(state, "app", net("10.1.0.0/16", ip_range="10.1.5.0/24", auxiliary={"a": "10.1.5.1", "b": "10.1.9.9"}))
    (subnet,) = app.subnets
    # As dockerd: the gateway is the range's lowest address, of a range that is not at the subnet's edge its very first.
    assert (subnet.gateway, subnet.ip_range, subnet.gateway_given) == ("10.1.5.0", "10.1.5.0/24", False)
    assert subnet.auxiliary == (("a", "10.1.5.1"), ("b", "10.1.9.9"))
    for name in ("web", "db", "cache"):
        register(state, name)
    assert connect(state, "app", "web").addresses == ("10.1.5.2",)
    with refused(state, AddressTakenError) as caught:
        state.connect("app", "db", EndpointOptions(addresses=["10.1.9.9"]))
    assert caught.error.holder == "an auxiliary address"
    # Outside of the range, but in the subnet.
    assert connect(state, "app", "db", addresses=["10.1.200.1"]).static_addresses == ("10.1.200.1",)
    given = create(state, "given", net("10.2.0.0/24", gateway="10.2.0.9"))
    assert (given.subnets[0].gateway, given.subnets[0].gateway_given) == ("10.2.0.9", True)
    assert connect(state, "given", "web").addresses == ("10.2.0.1",)
    six = create(state, "six", net("fd12::/64", ip_range="fd12::5:0/112"), enable_ipv4=False, enable_ipv6=True)
    assert [s.gateway for s in six.subnets] == ["fd12::5:0"]
    assert connect(state, "six", "web").addresses == ("fd12::5:1",)
    assert len(six.uplink_addresses) == 1 and ":" in six.uplink_addresses[0]


def test_range_that_is_full(state: DesiredState) -> None:
    create(state, "app", net("10.1.0.0/16", ip_range="10.1.5.4/30"))
    for number in range(3):
        register(state, f"g{number}")
        assert connect(state, "app", f"g{number}").addresses == (f"10.1.5.{5 + number}",)
    register(state, "more")
    with refused(state, NoAddressLeftError) as caught:
        state.connect("app", "more")
    assert caught.error.subnet == "10.1.5.4/30"
    assert connect(state, "app", "more", addresses=["10.1.0.1"]).addresses == ("10.1.0.1",)


@pytest.mark.parametrize(
    ("subnet", "what", "reason"),
    [
        (net("10.1.0.5/24"), "subnet", "host-bits"),
        (net("10.1.0.0"), "subnet", "malformed"),
        (net("10.1.0.0/31"), "subnet", "prefix"),
        (net("169.254.0.0/16"), "subnet", "special"),
        (SubnetOptions(gateway="10.1.0.1"), "subnet", "malformed"),
        (net("10.1.0.0/24", gateway="10.2.0.1"), "gateway", "outside"),
        (net("10.1.0.0/24", gateway="fd00::1"), "gateway", "family"),
        (net("10.1.0.0/24", gateway="10.1.0.0"), "gateway", "reserved"),
        (net("10.1.0.0/24", gateway="10.1.0.255"), "gateway", "reserved"),
        (net("10.1.0.0/24", gateway="x\x1b"), "gateway", "malformed"),
        (net("10.1.0.0/24", ip_range="10.2.0.0/24"), "ip-range", "outside"),
        (net("10.1.0.0/24", ip_range="10.1.0.0/16"), "ip-range", "outside"),
        (net("10.1.0.0/24", ip_range="10.1.0.7/28"), "ip-range", "host-bits"),
        (net("10.1.0.0/24", auxiliary={"a": "10.2.0.1"}), "aux-address", "outside"),
        (net("10.1.0.0/24", auxiliary={"a": "zz"}), "aux-address", "malformed"),
        # As dockerd: the gateway is chosen first.
        (net("10.1.0.0/24", auxiliary={"a": "10.1.0.1"}), "aux-address", "taken"),
        (net("10.1.0.0/24", auxiliary={"a": "10.1.0.7", "b": "10.1.0.7"}), "aux-address", "taken"),
    ],
)
def test_bad_subnets_say_what_is_wrong(state: DesiredState, subnet: SubnetOptions, what: str, reason: str) -> None:
    with refused(state, InvalidSubnetError) as caught:
        state.create_network("app", NetworkOptions(subnets=[subnet]))
    assert (caught.error.what, caught.error.reason) == (what, reason)


def test_several_subnets(state: DesiredState) -> None:
    with refused(state, MultipleSubnetsError) as caught:
        state.create_network("app", NetworkOptions(subnets=[net("10.1.0.0/24"), net("10.2.0.0/24")]))
    assert caught.error.family == 4
    with refused(state, PoolOverlapError) as overlap:
        state.create_network("app", NetworkOptions(subnets=[net("172.17.5.0/24")]))
    assert (overlap.error.subnet, overlap.error.other, overlap.error.network) == (
        "172.17.5.0/24",
        "172.17.0.0/16",
        "bridge",
    )
    both = create(state, "both", net("fd12::/64"), net("10.5.0.0/24"), enable_ipv6=True)
    assert [s.family for s in both.subnets] == [4, 6]


def test_families(state: DesiredState) -> None:
    with refused(state, NoFamilyError):
        state.create_network("app", NetworkOptions(enable_ipv4=False))
    four = create(state, "four", net("fd12::/64"))
    # As dockerd: the IPv6 subnet of a network without IPv6 is echoed, and that is all.
    assert [s.subnet for s in four.subnets] == ["172.18.0.0/16"]
    assert [(s.subnet, s.gateway) for s in four.idle_subnets] == [("fd12::/64", "")]
    six = create(state, "six", enable_ipv4=False, enable_ipv6=True)
    assert [s.family for s in six.subnets] == [6]
    register(state, "web")
    (address,) = connect(state, "six", "web").addresses
    assert ipaddress.ip_address(address) in ipaddress.ip_network(six.subnets[0].subnet)


def test_pools_run_out(state: DesiredState) -> None:
    for number in range(30):
        create(state, f"n{number}")
    with refused(state, NoPoolLeftError) as caught:
        state.create_network("more")
    assert caught.error.family == 4
    state.delete_network("n5")
    assert create(state, "again").subnets[0].subnet == "172.23.0.0/16"


# Options


def test_options_are_kept_and_known_ones_work(state: DesiredState) -> None:
    options = {
        OPTION_ICC: "false",
        OPTION_MASQUERADE: "0",
        OPTION_MTU: "9000",
        OPTION_HOST_BINDING: "127.0.0.1",
        "x": "",
    }
    app = create(
        state,
        labels={"a": "b", "ä": "\ud83d"},
        options=options,
        ipam_options={"k": "v"},
        attachable=True,
        ingress=True,
    )
    assert (app.options, app.labels, app.ipam_options) == (options, {"a": "b", "ä": "\ud83d"}, {"k": "v"})
    assert (app.isolated, app.masquerade, app.mtu, app.host_binding) == (True, False, 9000, "127.0.0.1")
    assert (app.attachable, app.ingress) == (True, True)
    told = helper_network(app)
    assert (told.endpoints_isolated, told.masquerade_disabled, told.mtu) == (True, True, 9000)
    plain = create(state, "plain")
    assert (plain.isolated, plain.masquerade, plain.host_binding, plain.ipam_options) == (False, True, "", None)
    told = helper_network(plain)
    assert (told.endpoints_isolated, told.masquerade_disabled) == (False, False)
    assert told.uplink_addresses == list(plain.uplink_addresses) and told.uplink_mac == plain.uplink_mac


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        (OPTION_ICC, "maybe", "bool"),
        (OPTION_MASQUERADE, "", "bool"),
        (OPTION_MTU, "abc", "integer"),
        (OPTION_MTU, "", "integer"),
        (OPTION_MTU, "-1", "negative"),
        (OPTION_MTU, "10", "range"),
        (OPTION_MTU, "70000", "range"),
        (OPTION_HOST_BINDING, "zz", "address"),
    ],
)
def test_bad_options(state: DesiredState, key: str, value: str, reason: str) -> None:
    with refused(state, NetworkOptionError) as caught:
        state.create_network("app", NetworkOptions(options={key: value}))
    assert (caught.error.option, caught.error.value, caught.error.reason) == (key, value, reason)


def test_drivers(state: DesiredState) -> None:
    for driver in ("foo", "macvlan", "host", "null", ""):
        with refused(state, UnsupportedDriverError) as caught:
            state.create_network("app", NetworkOptions(driver=driver))
        assert (caught.error.kind, caught.error.driver) == ("network", driver)
    with refused(state, UnsupportedDriverError) as caught:
        state.create_network("app", NetworkOptions(ipam_driver="foo"))
    assert caught.error.kind == "ipam"


_GOS_BOOLEANS = frozenset(["1", "t", "T", "TRUE", "true", "True", "0", "f", "F", "FALSE", "false", "False"])


@given(st.one_of(st.text(max_size=8), st.sampled_from(sorted(_GOS_BOOLEANS))))
def test_booleans_are_gos(text: str) -> None:
    assert parse_bool(text) in (True, False, None)
    assert (parse_bool(text) is None) == (text not in _GOS_BOOLEANS)


def test_configurations(state: DesiredState) -> None:
    conf = create(
        state,
        "conf",
        net("10.9.0.0/24", auxiliary={"a": "10.9.0.7"}),
        config_only=True,
        options={"a": "b"},
        labels={"l": "m"},
    )
    assert (conf.driver, conf.config_only, conf.switched, conf.subnets, conf.uplink_addresses) == (
        "null",
        True,
        False,
        (),
        (),
    )
    register(state, "web")
    with refused(state, ConfigNetworkError) as caught:
        state.connect("conf", "web")
    assert caught.error.reason == "config-only"
    made = create(state, "made", config_from="conf")
    assert (made.driver, made.config_from, made.options, made.labels) == ("bridge", "conf", {"a": "b"}, {"l": "m"})
    assert [(s.subnet, s.gateway, s.gateway_given) for s in made.subnets] == [("10.9.0.0/24", "10.9.0.1", False)]
    for options, reason in (
        (NetworkOptions(config_from="conf", subnets=[net("10.8.0.0/24")]), "conflict"),
        (NetworkOptions(config_from="conf", labels={"a": "b"}), "conflict"),
        (NetworkOptions(config_from="nope"), "not-found"),
        (NetworkOptions(config_from="made"), "not-config-only"),
        (NetworkOptions(config_from="conf", config_only=True), "nested"),
        (NetworkOptions(config_only=True, internal=True), "operator"),
    ):
        with refused(state, ConfigNetworkError) as caught:
            state.create_network("more", options)
        assert caught.error.reason == reason
    with refused(state, PoolOverlapError):
        state.create_network("more", NetworkOptions(config_from="conf"))
    with refused(state, ConfigNetworkError) as caught:
        state.delete_network("conf")
    assert caught.error.reason == "in-use"
    state.delete_network("made")
    state.delete_network("conf")


# Errors carry what they are about


def test_errors_of_names(state: DesiredState) -> None:
    app = create(state)
    web = register(state, "web")
    with refused(state, NetworkNameTakenError) as caught:
        state.create_network("app")
    assert (caught.error.name, caught.error.id) == ("app", app.id)
    with refused(state, NetworkNotFoundError) as caught:
        state.find_network("x\x1b[2J")
    assert caught.error.name == "x\x1b[2J"
    with refused(state, GuestNotFoundError):
        state.find_guest("nope")
    with refused(state, NameInUseError) as caught:
        register(state, "web")
    assert (caught.error.name, caught.error.id) == ("web", web)
    for number in range(20):
        create(state, f"n{number}", net(f"10.{number}.0.0/24"))
    firsts = [record.id[0] for record in state.networks()]
    with refused(state, AmbiguousIdError) as caught:
        state.find_network(next(first for first in firsts if firsts.count(first) > 1))
    assert caught.error.kind == "network"
    endpoint = connect(state, "app", "web")
    with refused(state, ActiveEndpointsError) as caught:
        state.delete_network("app")
    assert caught.error.endpoints == (("web", endpoint.id),)
    with refused(state, AlreadyConnectedError):
        state.connect("app", "web")
    with refused(state, NotConnectedError) as caught:
        state.disconnect("n1", "web")
    assert (caught.error.guest, caught.error.network, caught.error.guest_id) == ("web", "n1", web)


def test_networks_may_be_called_as_with_docker(state: DesiredState) -> None:
    register(state, "web")
    for number, name in enumerate(("a b", "-x", ".x", "x/y", "ä", "x" * 100, "a..b", "container:x", "fine.name")):
        record = create(state, name, net(f"10.{number}.0.0/24"))
        endpoint = connect(state, name, "web")
        told = helper_network(record).name
        assert told == guest_interface(endpoint, record).network_name
        assert told == (name if name in ("fine.name", "-x") else record.id[:12])
        assert dns_name(told)
    assert not dns_name("a" * 64) and not dns_name(".".join(["a" * 60] * 5))


def test_aliases_may_be_any_text_and_names_are_what_dns_carries(state: DesiredState) -> None:
    app = create(state)
    register(state, "web")
    odd = ["y y", "", "ü", "x" * 64, "a..b", "fine.one", "FINE.one"]
    endpoint = connect(
        state, "app", "web", aliases=odd, links=[("a b", "db"), ("ok", "x y"), ("good", "db"), ("", "db")]
    )
    assert endpoint.aliases == ("y y", "ü", "x" * 64, "a..b", "fine.one")
    assert endpoint_names(endpoint, state.find_guest("web"), app)[2:] == ["fine.one"]
    told = guest_interface(endpoint, app)
    assert [(link.alias, link.target) for link in told.name_links] == [("good", "db")]


def test_containers_may_have_long_names(state: DesiredState) -> None:
    long = "x" * 200
    record = container(long)
    state.store.insert_container(record)
    with refused(state, InvalidNameError):
        state.register_guest(long, "vsock:9")
    assert state.register_guest(long, "vsock:9", guest_id=record.id).name == long
    with refused(state, InvalidNameError):
        state.rename_guest(long, "y" * 256)


# Endpoints


def test_static_addresses(state: DesiredState) -> None:
    create(state, "auto", enable_ipv6=True)
    create(state, "app", net("10.1.0.0/24"), enable_ipv6=True)
    register(state, "web")
    for network, address, kind in (
        ("auto", "172.18.0.9", StaticAddressError),
        ("auto", "10.1.0.9", StaticAddressError),
        ("bridge", "172.17.0.9", StaticAddressError),
        # Its IPv6 subnet was not asked for.
        ("app", "fd00::9", StaticAddressError),
        ("app", "10.2.0.9", OutsideSubnetError),
        ("app", "10.1.0.0", AddressTakenError),
        ("app", "10.1.0.255", AddressTakenError),
        ("app", "10.1.0.1", AddressTakenError),
        ("app", "zz", InvalidError),
    ):
        with refused(state, kind):
            state.connect(network, "web", EndpointOptions(addresses=[address]))
    endpoint = connect(state, "app", "web", addresses=["10.1.0.9"])
    assert endpoint.static_addresses == ("10.1.0.9",) and endpoint.addresses[0] == "10.1.0.9"
    state.disconnect("app", "web")
    create(state, "four", net("10.2.0.0/24"))
    with refused(state, OutsideSubnetError):
        state.connect("four", "web", EndpointOptions(addresses=["fd00::9"]))


def test_macs_are_a_networks_own(state: DesiredState) -> None:
    create(state)
    create(state, "back")
    for name in ("web", "db"):
        register(state, name)
    mac = "02:00:00:00:aa:01"
    assert connect(state, "app", "web", mac_address=mac).static_mac
    assert connect(state, "back", "web", mac_address=mac).mac_address == mac
    with refused(state, MacTakenError) as caught:
        state.connect("app", "db", EndpointOptions(mac_address=mac))
    assert (caught.error.mac, caught.error.holder) == (mac, "guest web")
    assert connect(state, "app", "db").mac_address == "02:42:ac:12:00:03"


def test_interfaces_are_counted_as_with_docker(state: DesiredState) -> None:
    """dockerd 20.10 gives what is connected again the next number, for as long as the container runs."""
    create(state)
    create(state, "back")
    create(state, "foo", options={OPTION_PREFIX: "foo"})
    create(state, "odd", options={OPTION_PREFIX: "a/b" * 9})
    _container_guest(state, "web", 1)

    def reconnected(network: str, **options: Any) -> str:
        if state.store.endpoint_of(state.find_network(network).id, state.find_guest("web").id):
            state.disconnect(network, "web")
        return connect(state, network, "web", **options).interface_name

    assert [reconnected(name) for name in ("app", "back", "back", "app", "foo", "foo", "odd")] == [
        *("eth0", "eth1", "eth2", "eth3"),
        *("foo0", "foo1"),
        "eth4",
    ]
    assert reconnected("app", driver_options={OPTION_INTERFACE: "lan"}) == "lan"
    for value, kind in (("lan", TakenError), ("a/b", InvalidError), ("x" * 16, InvalidError)):
        state.disconnect("back", "web")
        with refused(state, kind):
            state.connect("back", "web", EndpointOptions(driver_options={OPTION_INTERFACE: value}))
        connect(state, "back", "web")
    state.remove_guest("web")
    register(state, "web", guest_id=f"{1:064x}")
    assert connect(state, "app", "web").interface_name == "eth0"
    # Another guest has the lowest free one.
    register(state, "plain")
    for _ in range(3):
        assert connect(state, "app", "plain").interface_name == "eth0"
        state.disconnect("app", "plain")


def test_endpoint_options_survive(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        state = DesiredState(store)
        create(state)
        register(
            state, "web", settings=GuestSettings(hostname="h", dns=("1.1.1.1",), extra_hosts=(("a b", "10.0.0.1"),))
        )
        made = connect(
            state, "app", "web", links=[("al", "db"), ("AL", "other")], driver_options={"a": "b"}, names=["extra"]
        )
    with Store(tmp_path) as store:
        kept = store.endpoint(made.id)
        assert kept == made
        assert (kept.links, kept.driver_options, kept.names) == ((("al", "other"),), {"a": "b"}, ("extra",))
        settings = DesiredState(store).find_guest("web").settings
        assert (settings.hostname, settings.dns, settings.extra_hosts) == ("h", ("1.1.1.1",), (("a b", "10.0.0.1"),))


def test_default_bridge_has_no_names(state: DesiredState) -> None:
    guest_id = register(state, "web", settings=GuestSettings(hostname="box"))
    with refused(state, AliasOnDefaultError):
        state.connect("bridge", "web", EndpointOptions(aliases=["x"]))
    with refused(state, InvalidAliasError):
        state.connect("bridge", "web", EndpointOptions(links=[("a\n", "x")]))
    create(state)
    guest = state.find_guest("web")
    on_bridge, on_app = connect(state, "bridge", "web"), connect(state, "app", "web", aliases=["www"], names=["more"])
    bridge, app = state.find_network("bridge"), state.find_network("app")
    assert endpoint_names(on_bridge, guest, bridge) == []
    assert endpoint_names(on_app, guest, app) == ["web", guest_id[:12], "www", "more", "box"]
    assert guest_interface(on_bridge, bridge).dns_servers == []
    assert guest_interface(on_app, app).dns_servers == [app.dns_server]


def test_gateway_order_is_dockers(state: DesiredState) -> None:
    """Highest priority, then non-internal, then more families, then the name in byte order (which the guest does)."""
    create(state, "zz", enable_ipv6=True)
    create(state, "aa")
    create(state, "high")
    create(state, "inside", internal=True)
    register(state, "web")
    told = {}
    for name, priority in (("zz", 0), ("aa", 0), ("high", 1), ("inside", 9)):
        endpoint = connect(state, name, "web", gateway_priority=priority)
        told[name] = guest_interface(endpoint, state.find_network(name))
    assert told["high"].gateway_priority > told["zz"].gateway_priority > told["aa"].gateway_priority
    assert told["inside"].gateways == []
    extreme = dataclasses.replace(endpoint, gateway_priority=-(2**31))
    assert guest_interface(extreme, state.find_network("aa")).gateway_priority == -(2**31)


def test_auxiliary_address_can_be_the_way_out(state: DesiredState) -> None:
    create(state, "app", net("10.1.0.0/24", auxiliary={"DefaultGatewayIPv4": "10.1.0.200"}))
    register(state, "web")
    endpoint = connect(state, "app", "web")
    assert guest_interface(endpoint, state.find_network("app")).gateways == ["10.1.0.200"]


# Containers


def container(name: str, number: int = 1) -> ContainerRecord:
    return ContainerRecord(f"{number:064x}", name, NOW, {"Image": "bb"}, {"Running": False})


def test_containers_share_names_with_guests(state: DesiredState) -> None:
    store = state.store
    web = container("web")
    store.insert_container(web)
    assert store.container(web.id) == web and store.containers() == [web]
    with refused(state, NameInUseError) as caught:
        store.insert_container(container("web", 2))
    assert caught.error.id == web.id
    with refused(state, NameInUseError):
        register(state, "web")
    assert register(state, "web", guest_id=web.id) == web.id
    with refused(state, TakenError):
        state.register_guest("web", "vsock:9", guest_id=web.id)
    plain = register(state, "plain")
    with refused(state, NameInUseError):
        store.insert_container(container("plain", 3))
    with refused(state, NameInUseError):
        store.update_container(dataclasses.replace(web, name="plain"))
    store.update_container(dataclasses.replace(web, state={"Running": True}))
    before, after = state.rename_guest("web", "www")
    assert (before.name, after.name) == ("web", "www")
    renamed = store.container(web.id)
    assert renamed is not None
    assert (renamed.name, renamed.state) == ("www", {"Running": True})
    assert state.find_guest("www").id == web.id
    with refused(state, NameInUseError):
        state.rename_guest("www", "plain")
    with refused(state, InvalidError):
        state.rename_guest("www", "a b")
    state.rename_guest(plain, "web")
    state.remove_guest("www")
    store.delete_container(web.id)
    store.delete_container(web.id)
    with refused(state, GuestNotFoundError):
        store.update_container(dataclasses.replace(web, name="gone"))


def test_guest_ids_are_checked(state: DesiredState) -> None:
    for bad in ("x", "A" * 64, "a" * 63, "a" * 64 + "\n"):
        with refused(state, InvalidError):
            register(state, "web", guest_id=bad)


# What containers are told


def _container_guest(state: DesiredState, name: str, number: int, **settings: Any) -> str:
    record = container(name, number)
    state.store.insert_container(record)
    return register(state, name, guest_id=record.id, settings=GuestSettings(**settings))


def _resolver(state: DesiredState, name: str, features: frozenset[int] = ALL) -> Any:
    return guest_resolver(state.find_guest(name), state.store, ["9.9.9.9"], features)


def _hosts(state: DesiredState, name: str) -> list[tuple[str, list[str]]]:
    return [(entry.address, entry.names) for entry in _resolver(state, name).hosts]


def test_hosts_are_dockers(state: DesiredState) -> None:
    """The order and the names are those of /etc/hosts under dockerd 20.10."""
    create(state, "app", net("10.1.0.0/16"))
    first = _container_guest(state, "r1", 1, hostname="1" * 12)
    connect(state, "bridge", "r1")
    _container_guest(
        state,
        "h1",
        2,
        hostname="myhost",
        domainname="dom.example",
        extra_hosts=(("x", "1.2.3.4"), ("y", "1.2.3.5"), ("x", "1.2.3.6")),
        dns=("8.8.8.8",),
        dns_search=("s.example",),
        dns_options=("ndots:3",),
    )
    connect(state, "bridge", "h1", links=[("lnk", "r1"), ("gone", "nobody")])
    extra = [("1.2.3.4", ["x"]), ("1.2.3.5", ["y"]), ("1.2.3.6", ["x"])]
    link = [("172.17.0.2", ["lnk", "1" * 12, "r1"])]
    own = ["myhost.dom.example", "myhost"]
    assert _hosts(state, "h1") == [*extra, *link, ("172.17.0.3", own)]
    resolver = _resolver(state, "h1")
    assert (resolver.direct, resolver.manage_hosts, resolver.hostname) == (True, True, "myhost")
    assert (resolver.upstreams, resolver.search, resolver.options) == (["8.8.8.8"], ["s.example"], ["ndots:3"])
    connect(state, "app", "h1")
    assert _hosts(state, "h1") == [*extra, *link, ("172.17.0.3", own), ("10.1.0.2", own)]
    assert not _resolver(state, "h1").direct
    state.disconnect("bridge", "r1")
    assert _hosts(state, "h1") == [*extra, ("172.17.0.3", own), ("10.1.0.2", own)]
    # A link to another by its own name has that name once.
    connect(state, "bridge", "r1")
    state.disconnect("bridge", "h1")
    connect(state, "bridge", "h1", links=[("r1", "r1")])
    assert ("172.17.0.2", ["r1", "1" * 12]) in _hosts(state, "h1")
    assert first == f"{1:064x}"


def test_links_of_own_networks_are_names_only_the_guest_has(state: DesiredState) -> None:
    create(state)
    _container_guest(state, "web", 1)
    endpoint = connect(state, "app", "web", links=[("database", "db")])
    (link,) = guest_interface(endpoint, state.find_network("app")).name_links
    assert (link.alias, link.target) == ("database", "db")
    assert _hosts(state, "web") == []


def test_plain_guests_and_old_agents(state: DesiredState) -> None:
    register(state, "web")
    connect(state, "bridge", "web")
    resolver = _resolver(state, "web")
    assert (resolver.enabled, resolver.direct, resolver.manage_hosts, resolver.hosts) == (True, False, False, [])
    assert resolver.upstreams == ["9.9.9.9"]
    _container_guest(state, "old", 7, hostname="h")
    old = _resolver(state, "old", frozenset({GuestFeature.RESOLVER}))
    assert (old.direct, old.manage_hosts) == (False, False)
    new = _resolver(state, "old")
    assert (new.direct, new.manage_hosts, new.hosts) == (True, True, [])


_words = st.one_of(
    st.text(max_size=10),
    st.sampled_from(
        ["9.9.9.9", "::1", "0.0.0.0", "ff02::1", "127.0.0.11", ".", "ndots:1", "a-.b", "-x", "web", "x" * 64]
    ),
)


_settings = st.builds(
    GuestSettings,
    hostname=_words,
    domainname=_words,
    dns=st.lists(_words, max_size=3).map(tuple),
    dns_search=st.lists(_words, max_size=3).map(tuple),
    dns_options=st.lists(_words, max_size=3).map(tuple),
    extra_hosts=st.lists(st.tuples(_words, _words), max_size=3).map(tuple),
)


def test_agents_take_what_containers_are_given(state: DesiredState) -> None:
    """Docker writes such settings into files as they are; the agent would refuse some, and with them its networks."""
    _container_guest(state, "web", 1)
    connect(state, "bridge", "web")
    guest = state.find_guest("web")

    @settings(max_examples=200, deadline=None)
    @given(values=_settings)
    def any_settings(values: GuestSettings) -> None:
        resolver = guest_resolver(dataclasses.replace(guest, settings=values), state.store, ["9.9.9.9"], ALL)
        parsed = ResolverConfig.parse(resolver)
        assert parsed.direct and parsed.hosts is not None

    any_settings()


def test_uplink_of_the_kernel() -> None:
    one, same = (helper_uplink("host", ["192.0.2.2", "10.0.0.1"]) for _ in range(2))
    assert bytes(one) == bytes(same)
    assert one.addresses[0] == "169.254.128.1/18"
    assert one.host_addresses == ["10.0.0.1", "192.0.2.2"]
    assert helper_uplink("other", []).mac_address != one.mac_address


# Any options


_texts = st.text(max_size=12)
_cidrs = st.one_of(
    _texts,
    st.builds(lambda a, b, p: f"10.{a}.{b}.0/{p}", st.integers(0, 255), st.integers(0, 255), st.integers(8, 32)),
    st.builds(lambda a, p: f"fd00:{a:x}::/{p}", st.integers(0, 65535), st.integers(32, 128)),
)
_addresses = st.one_of(_texts, st.builds(lambda a, b: f"10.1.{a}.{b}", st.integers(0, 255), st.integers(0, 255)))
_subnets = st.builds(
    SubnetOptions,
    subnet=st.one_of(_cidrs, st.just("10.1.0.0/16")),
    gateway=st.one_of(st.just(""), _addresses),
    ip_range=st.one_of(st.just(""), _cidrs),
    auxiliary=st.dictionaries(_texts, _addresses, max_size=2),
)
_network_options = st.builds(
    NetworkOptions,
    subnets=st.lists(_subnets, max_size=2),
    internal=st.booleans(),
    mtu=st.one_of(st.just(0), st.integers(0, 100_000)),
    enable_ipv4=st.booleans(),
    enable_ipv6=st.booleans(),
    labels=st.dictionaries(_texts, _texts, max_size=2),
    options=st.dictionaries(st.one_of(_texts, st.sampled_from([OPTION_ICC, OPTION_MTU])), _texts, max_size=2),
    config_only=st.booleans(),
    ipam_options=st.one_of(st.none(), st.dictionaries(_texts, _texts, max_size=1)),
)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database that has just been made: making one takes longer than what an example does with it."""
    directory = tmp_path_factory.mktemp("fresh")
    Store(directory).close()
    return directory / store_module.DATABASE


@settings(max_examples=150, deadline=None)
@given(options=_network_options, wanted=st.lists(_addresses, max_size=2))
def test_any_network_is_made_or_refused_clearly(options: NetworkOptions, wanted: list[str], fresh: Path) -> None:
    with tempfile.TemporaryDirectory() as directory, Store(Path(shutil.copy(fresh, directory)).parent) as store:
        state = DesiredState(store)
        before = store.dump()
        try:
            record = state.create_network("app", options)
        except BridgeError as error:
            assert type(error) is not BridgeError and str(error).isprintable()
            assert store.dump() == before
            return
        assert state.activate_network(record.id)
        assert state.find_network("app") == dataclasses.replace(record, active=True)
        if not record.switched:
            return
        register(state, "web")
        held = set(store.taken_addresses(record.id))
        before = store.dump()
        try:
            endpoint = state.connect("app", "web", EndpointOptions(addresses=wanted))
        except BridgeError:
            assert store.dump() == before
            return
        assert len(endpoint.addresses) == len(record.subnets)
        assert not held & set(endpoint.addresses)
