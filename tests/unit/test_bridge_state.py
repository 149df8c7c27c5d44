"""The desired state on a real database: every refusal leaves it as it was, and no value has two holders."""

from __future__ import annotations

import ipaddress
import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from host_bridge import store as store_module
from host_bridge.desired import DesiredState
from host_bridge.errors import (
    BridgeError,
    ExhaustedError,
    InvalidError,
    InvalidSubnetError,
    NotFoundError,
    PoolOverlapError,
    PreconditionError,
    StateError,
    TakenError,
)
from host_bridge.model import EndpointOptions, EndpointRecord, NetworkOptions, NetworkRecord, SubnetOptions
from host_bridge.store import Store

Refusal = TypeVar("Refusal", bound=BridgeError)


@pytest.fixture
def state(tmp_path: Path) -> Iterator[DesiredState]:
    with Store(tmp_path / "state") as store:
        yield DesiredState(store)


def network(state: DesiredState, name: str = "app", **options: Any) -> NetworkRecord:
    record = state.create_network(name, network_options(**options))
    assert state.activate_network(record.id)
    return record


def network_options(*, subnets: Sequence[str | SubnetOptions] = (), **options: Any) -> NetworkOptions:
    given = [one if isinstance(one, SubnetOptions) else SubnetOptions(subnet=one) for one in subnets]
    return NetworkOptions(subnets=given, **options)


def created(state: DesiredState) -> list[NetworkRecord]:
    return [record for record in state.networks() if not record.predefined]


def guest(state: DesiredState, name: str) -> str:
    return state.register_guest(name, f"unix:/run/vms/{name}/control.sock").id


def connect(state: DesiredState, net: str, who: str, **options: Any) -> EndpointRecord:
    record = state.connect(net, who, EndpointOptions(**options))
    assert state.activate_endpoint(record.id)
    return record


def refused(state: DesiredState, kind: type[Refusal], message: str, call: str, *args: str, **options: Any) -> Refusal:
    before = state.store.dump()
    with pytest.raises(kind) as caught:
        if call == "create_network":
            state.create_network(args[0], network_options(**options))
        elif call == "connect":
            state.connect(args[0], args[1], EndpointOptions(**options))
        else:
            getattr(state, call)(*args, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert state.store.dump() == before
    return caught.value


def test_first_networks_and_endpoints_are_dockers(state: DesiredState) -> None:
    app, back = network(state), network(state, "back")
    assert [s.subnet for s in app.subnets] == ["172.18.0.0/16"]
    assert [s.gateway for s in app.subnets] == ["172.18.0.1"]
    assert [s.subnet for s in back.subnets] == ["172.19.0.0/16"]
    assert (app.dns_server, back.dns_server) == ("169.254.64.1", "169.254.64.2")
    assert app.mtu == 1500
    guest(state, "web")
    guest(state, "db")
    assert connect(state, "app", "web").addresses == ("172.18.0.2",)
    assert connect(state, "app", "db").addresses == ("172.18.0.3",)
    second = connect(state, "back", "web")
    assert (second.addresses, second.interface_name) == (("172.19.0.2",), "eth1")
    state.disconnect("app", "web")
    again = connect(state, "app", "web")
    assert (again.addresses, again.interface_name) == (("172.18.0.2",), "eth0")


def test_ipv6(state: DesiredState) -> None:
    one = network(state, "one", enable_ipv6=True)
    two = network(state, "two", enable_ipv6=True)
    prefix = ipaddress.ip_network(one.subnets[1].subnet).supernet(new_prefix=48)
    assert prefix.network_address.packed[0] == 0xFD
    assert ipaddress.ip_network(two.subnets[1].subnet).subnet_of(prefix)  # type: ignore[arg-type]
    given = network(
        state,
        "given",
        subnets=[SubnetOptions(subnet="fd12:3456::/64", gateway="fd12:3456::9"), "10.5.0.0/24"],
        enable_ipv6=True,
    )
    assert [(s.subnet, s.gateway) for s in given.subnets] == [
        ("10.5.0.0/24", "10.5.0.1"),
        ("fd12:3456::/64", "fd12:3456::9"),
    ]
    guest(state, "web")
    assert connect(state, "given", "web", addresses=["fd12:3456:0::50"]).addresses == ("10.5.0.2", "fd12:3456::50")
    guest(state, "db")
    assert connect(state, "given", "db").addresses == ("10.5.0.3", "fd12:3456::1")


def test_macs_are_local_unicast_and_unique(state: DesiredState) -> None:
    default = state.find_network("bridge")
    macs = [default.gateway_mac, default.uplink_mac]
    for number in range(5):
        record = network(state, f"n{number}")
        macs += [record.gateway_mac, record.dns_mac, record.uplink_mac]
        guest(state, f"g{number}")
        macs += [connect(state, f"n{m}", f"g{number}").mac_address for m in range(number + 1)]
    assert len(set(macs)) == len(macs)
    assert all(mac.startswith("02:") for mac in macs)
    assert set(state.store.taken_macs()) == set(macs)


def test_network_refusals(state: DesiredState) -> None:
    network(state, subnets=["10.1.0.0/16"], enable_ipv6=True)
    refused(state, TakenError, "network with name app already exists", "create_network", "app")
    for name in ("", " ", "x" * 256, "a\n", "a\x1b[2J", "\ud800"):
        refused(state, InvalidError, "name", "create_network", name)
    for text in ("10.1.4.0/24", "10.0.0.0/8", "10.1.0.0/16"):
        refused(state, PoolOverlapError, "overlaps 10.1.0.0/16 of network app", "create_network", "b", subnets=[text])
    refused(state, InvalidError, "host bits", "create_network", "b", subnets=["10.2.0.1/16"])
    refused(state, InvalidError, "one per family", "create_network", "b", subnets=["10.2.0.0/16", "10.3.0.0/16"])
    for gateway, message in (("10.3.0.1", "is not in"), ("10.2.0.0", "network address"), ("x", "malformed")):
        subnet = SubnetOptions(subnet="10.2.0.0/16", gateway=gateway)
        error = refused(state, InvalidSubnetError, message, "create_network", "b", subnets=[subnet])
        assert (error.what, error.value) == ("gateway", gateway)
    refused(state, InvalidSubnetError, "", "create_network", "b", subnets=[SubnetOptions(gateway="fd00::1")])
    refused(state, InvalidError, "out of range", "create_network", "b", mtu=67)
    refused(state, InvalidError, "out of range", "create_network", "b", mtu=65536)
    refused(state, InvalidError, "at least 1280", "create_network", "b", mtu=1000, enable_ipv6=True)
    refused(state, NotFoundError, "network nope not found", "delete_network", "nope")
    refused(state, InvalidError, "name a network", "delete_network", "")


def test_network_in_use_names_the_guests(state: DesiredState) -> None:
    network(state)
    for name in ("web", "db"):
        guest(state, name)
        connect(state, "app", name)
    refused(state, PreconditionError, "in use by guests db, web: disconnect first", "delete_network", "app")
    state.disconnect("app", "web")
    state.remove_guest("db")
    state.delete_network("app")
    assert created(state) == []


def test_guest_refusals(state: DesiredState) -> None:
    state.register_guest("web", "vsock:3")
    assert state.find_guest("web").address == "vsock:3:5555"
    assert state.find_guest("web").data_address == "vsock:3:5556"
    refused(state, TakenError, "already exists", "register_guest", "web", "vsock:4")
    refused(state, TakenError, "is the one of guest web", "register_guest", "db", "vsock:3:5555")
    refused(state, TakenError, "is the one of guest web", "register_guest", "db", "vsock:3:5556")
    refused(state, InvalidError, "at least 2", "register_guest", "x", "vsock:4")
    refused(state, InvalidError, "is not allowed", "register_guest", "a b", "vsock:4")
    for address in (
        "",
        "tcp:1.2.3.4:5",
        "unix:relative",
        "fd:3",
        "vsock:any",
        "vsock:x",
        "unix:/" + "a" * 200,
        "\x1b[2J",
    ):
        refused(state, InvalidError, "address", "register_guest", "db", address)
    refused(state, InvalidError, "two ports", "register_guest", "db", "vsock:4:9", "vsock:4:9")
    refused(state, NotFoundError, "guest nope not found", "remove_guest", "nope")


def test_connect_refusals(state: DesiredState) -> None:
    network(state, subnets=["10.1.0.0/24"])
    guest(state, "web")
    guest(state, "db")
    mac = connect(state, "app", "web", addresses=["10.1.0.9"]).mac_address
    for kind, message, options in (
        (TakenError, "taken by guest web", {"addresses": ["10.1.0.9"]}),
        (TakenError, "taken by the gateway", {"addresses": ["10.1.0.1"]}),
        (InvalidError, "is not in 10.1.0.0/24", {"addresses": ["10.2.0.1"]}),
        (TakenError, "network address", {"addresses": ["10.1.0.0"]}),
        (TakenError, "broadcast", {"addresses": ["10.1.0.255"]}),
        (InvalidError, "malformed", {"addresses": ["10.1.0"]}),
        (InvalidError, "without a prefix length", {"addresses": ["10.1.0.4/24"]}),
        (InvalidError, "one per family", {"addresses": ["10.1.0.4", "10.1.0.5"]}),
        (InvalidError, "has no IPv6 subnet", {"addresses": ["fd00::4"]}),
        (InvalidError, "use at most 255", {"aliases": ["a" * 256]}),
        (InvalidError, "printable", {"aliases": ["a\nb"]}),
        (InvalidError, "too many", {"aliases": [f"a{n}" for n in range(129)]}),
        (InvalidError, "malformed", {"mac_address": "02:00"}),
        (InvalidError, "multicast", {"mac_address": "01:00:00:00:00:01"}),
        (TakenError, "taken by guest web", {"mac_address": mac.upper()}),
        (InvalidError, "out of range", {"gateway_priority": 2**31}),
    ):
        refused(state, kind, message, "connect", "app", "db", **options)
    refused(state, TakenError, "already connected to network app", "connect", "app", "web")
    refused(state, NotFoundError, "network nope", "connect", "nope", "db")
    refused(state, NotFoundError, "guest nope", "connect", "app", "nope")
    refused(state, PreconditionError, "guest db is not connected to network app", "disconnect", "app", "db")


def test_aliases_are_case_insensitive(state: DesiredState) -> None:
    network(state)
    guest(state, "web")
    assert connect(state, "app", "web", aliases=["Db", "DB", "x.y", "db"]).aliases == ("Db", "x.y")


def test_full_subnet(state: DesiredState) -> None:
    network(state, subnets=["10.1.0.0/30"])
    guest(state, "web")
    guest(state, "db")
    connect(state, "app", "web")
    refused(state, ExhaustedError, "no address is left in 10.1.0.0/30", "connect", "app", "db")
    state.disconnect("app", "web")
    assert connect(state, "app", "db").addresses == ("10.1.0.2",)


def test_lookup_order_and_ambiguity(state: DesiredState) -> None:
    records = [network(state, f"n{number}") for number in range(20)]
    # An id beats a name, a name beats a prefix.
    named = network(state, records[0].id[:10])
    assert state.find_network(records[0].id[:10]) == state.find_network(named.id)
    assert state.find_network(records[0].id[:12]).name == "n0"
    firsts = [record.id[0] for record in records]
    shared = next(first for first in firsts if firsts.count(first) > 1)
    refused(state, InvalidError, "is ambiguous", "find_network", shared)


def test_pending_networks_are_not_visible_but_hold_their_names(state: DesiredState) -> None:
    pending = state.create_network("app")
    assert created(state) == []
    refused(state, NotFoundError, "not found", "find_network", "app")
    refused(state, TakenError, "already exists", "create_network", "app")
    state.cancel_network(pending.id)
    network(state)
    assert not state.activate_network(pending.id)


def test_interface_names_skip_what_the_guest_refused(state: DesiredState) -> None:
    network(state)
    guest(state, "web")
    record = state.connect("app", "web")
    assert record.interface_name == "eth0"
    assert state.rename_interface(record.id, {"eth0"}) == "eth1"
    assert state.rename_interface(record.id, {"eth0", "eth1"}) == "eth2"
    assert state.rename_interface("gone", set()) is None


def test_state_survives_reopening_and_pending_rows_do_not(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        state = DesiredState(store)
        kept = network(state, enable_ipv6=True)
        guest(state, "web")
        guest(state, "db")
        web = connect(state, "app", "web", aliases=["a", "b"])
        before = store.dump()
        state.connect("app", "db")
        state.create_network("half")
    with Store(tmp_path) as store:
        state = DesiredState(store)
        assert state.remove_pending() == 2
        assert store.dump() == before
        assert created(state)[0].id == kept.id
        endpoint = store.endpoint(web.id)
        assert endpoint is not None
        assert (endpoint.addresses, endpoint.aliases, endpoint.mac_address) == (
            web.addresses,
            web.aliases,
            web.mac_address,
        )


def test_files_are_private(tmp_path: Path) -> None:
    with Store(tmp_path / "new") as store:
        network(DesiredState(store))
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
        for path in (tmp_path / "new").iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_second_bridge_is_refused(tmp_path: Path) -> None:
    with Store(tmp_path), pytest.raises(StateError, match=rf"another bridge \(process {os.getpid()}\) uses"):
        Store(tmp_path)
    Store(tmp_path).close()


def test_damaged_database(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        network(DesiredState(store))
    path = tmp_path / store_module.DATABASE
    whole = path.read_bytes()
    for damaged in (
        b"not a database at all" * 100,
        whole[: len(whole) // 2],
        whole[:4096] + os.urandom(len(whole) - 4096),
    ):
        path.write_bytes(damaged)
        with pytest.raises(StateError, match="damaged") as caught:
            Store(tmp_path)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    Store(tmp_path).close()


def test_newer_schema_and_foreign_database(tmp_path: Path) -> None:
    Store(tmp_path).close()
    path = tmp_path / store_module.DATABASE
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StateError, match=f"schema 99, this bridge knows {len(store_module.MIGRATIONS)}"):
        Store(tmp_path)
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE recipes (name)")
    connection.close()
    with pytest.raises(StateError, match="another program's database"):
        Store(tmp_path)


def test_migrations_run_once_and_roll_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store(tmp_path) as store:
        network(DesiredState(store))

    def broken(connection: sqlite3.Connection) -> None:
        connection.execute("CREATE TABLE half (x)")
        raise sqlite3.OperationalError("disk full")

    def good(connection: sqlite3.Connection) -> None:
        connection.execute("ALTER TABLE meta ADD COLUMN remark TEXT NOT NULL DEFAULT ''")

    monkeypatch.setattr(store_module, "MIGRATIONS", (*store_module.MIGRATIONS, broken))
    with pytest.raises(StateError, match="disk full"):
        Store(tmp_path)
    monkeypatch.setattr(store_module, "MIGRATIONS", (*store_module.MIGRATIONS[:-1], good))
    for _ in range(2):
        with Store(tmp_path) as store:
            assert [record.name for record in created(DesiredState(store))] == ["app"]


_KILLED = """
import os, sys
from pathlib import Path
from host_bridge.desired import DesiredState
from host_bridge.model import NetworkOptions, SubnetOptions
from host_bridge.store import Store
state = DesiredState(Store(Path(sys.argv[1])))
print("ready", flush=True)
number = 0
while True:
    number += 1
    subnet = SubnetOptions(subnet=f"10.{number % 250}.{number // 250}.0/24")
    record = state.create_network(f"n{number}", NetworkOptions(subnets=[subnet]))
    state.activate_network(record.id)
    print(number, flush=True)
    if number % 3 == 0:
        state.delete_network(f"n{number}")
"""


def test_kill_9_leaves_a_consistent_database(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", _KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told = 0
    for line in process.stdout:
        if line.strip() != "ready":
            told = int(line)
        if told >= 40:
            break
    process.kill()
    rest = process.stdout.read().split()
    process.wait()
    process.stdout.close()
    told = int(rest[-1]) if rest and rest[-1].isdecimal() else told
    with Store(tmp_path) as store:
        state = DesiredState(store)
        state.remove_pending()
        names = {record.name for record in state.networks()}
        assert {f"n{number}" for number in range(1, told + 1) if number % 3 and number < told} <= names
        assert not store._all("PRAGMA foreign_key_check")


class Allocation(RuleBasedStateMachine):
    """Any sequence of changes: one holder per address, always the lowest free one, freed ones reused."""

    networks = Bundle("networks")
    guests = Bundle("guests")

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.directory = tempfile.TemporaryDirectory()
        self.store = Store(Path(self.directory.name))
        self.state = DesiredState(self.store)
        self.count = 0

    def teardown(self) -> None:
        self.store.close()
        self.directory.cleanup()

    @rule(target=networks, prefix=st.sampled_from([29, 30, 28]), ipv6=st.booleans())
    def add_network(self, prefix: int, ipv6: bool) -> object:
        self.count += 1
        subnet = f"10.{self.count % 256}.0.0/{prefix}"
        try:
            return network(self.state, f"n{self.count}", subnets=[subnet], enable_ipv6=ipv6).name
        except PreconditionError:
            return multiple()

    @rule(target=guests)
    def add_guest(self) -> object:
        self.count += 1
        guest(self.state, f"g{self.count}")
        return f"g{self.count}"

    @rule(net=networks, who=guests, keep=st.booleans())
    def connect(self, net: str, who: str, keep: bool) -> None:
        record = self.state.find_network(net)
        held = set(self.store.taken_addresses(record.id))
        before = self.store.dump()
        try:
            endpoint = self.state.connect(net, who)
        except (TakenError, ExhaustedError):
            assert self.store.dump() == before
            return
        for subnet, address in zip(record.subnets, endpoint.addresses, strict=True):
            lower = [a for a in _hosts(subnet.subnet) if a < int(ipaddress.ip_address(address))]
            assert address not in held
            assert all(str(_same(subnet.family, a)) in held for a in lower)
        if keep:
            assert self.state.activate_endpoint(endpoint.id)
        else:
            self.state.cancel_endpoint(endpoint.id)
            assert self.store.dump() == before

    @rule(net=networks, who=guests)
    def disconnect(self, net: str, who: str) -> None:
        try:
            self.state.disconnect(net, who)
        except PreconditionError:
            return

    @rule(net=consumes(networks))
    def remove_network(self, net: str) -> None:
        for endpoint in self.store.endpoints(network_id=self.state.find_network(net).id):
            self.state.disconnect(net, endpoint.guest_id)
        self.state.delete_network(net)

    @rule(who=consumes(guests))
    def remove_guest(self, who: str) -> None:
        self.state.remove_guest(who)

    @invariant()
    def nothing_has_two_holders(self) -> None:
        endpoints = self.store.endpoints()
        places = [(e.network_id, a) for e in endpoints for a in e.addresses]
        places += [(n.id, s.gateway) for n in self.state.networks() for s in n.subnets]
        assert len(set(places)) == len(places)
        interfaces = [(e.guest_id, e.interface_name) for e in endpoints]
        assert len(set(interfaces)) == len(interfaces)
        macs = [(e.network_id, e.mac_address) for e in endpoints]
        switched = [n for n in self.state.networks() if n.switched]
        macs += [(n.id, mac) for n in switched for mac in (n.gateway_mac, n.dns_mac) if mac]
        uplinks = [address for n in switched for address in n.uplink_addresses]
        assert len(set(uplinks)) == len(uplinks)
        assert len(set(macs)) == len(macs)
        assert not self.store._all("PRAGMA foreign_key_check")


def _hosts(subnet: str) -> list[int]:
    net = ipaddress.ip_network(subnet)
    first = int(net.network_address) + 1
    return list(range(first, first + 16))


def _same(family: int, value: int) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.IPv4Address(value) if family == 4 else ipaddress.IPv6Address(value)


TestAllocation = Allocation.TestCase
TestAllocation.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
