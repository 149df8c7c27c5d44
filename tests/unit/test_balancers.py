"""Load balancers without a fabric: the file, the database, and what the helper is told and makes of it."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_helper.balancer import Around, parse_balancers
from agent_helper.balancer_ways import ways_of
from agent_helper.errors import InvalidSpecError
from agent_helper.spec import parse_endpoint, parse_network, parse_uplink
from host_bridge.balancer.check import checked_balancers
from host_bridge.balancer.document import read
from host_bridge.balancer.messages import from_message, to_message
from host_bridge.balancer.model import Balancer, from_json
from host_bridge.balancer.parts import parse_port, parse_publish, parse_seconds
from host_bridge.balancer.publishing import BalancerPorts
from host_bridge.describe import helper_endpoint, helper_network, helper_uplink
from host_bridge.desired import DesiredState
from host_bridge.documents import DocumentError
from host_bridge.errors import ActiveEndpointsError, InvalidError, NotFoundError, TakenError
from host_bridge.ipam import highest_free
from host_bridge.model import ContainerRecord, EndpointOptions, EndpointRecord, NetworkOptions
from host_bridge.ports import PortBinding, PublishedPort
from host_bridge.sources import Source
from host_bridge.store import Store
from host_bridge.values import to_json
from taploom.contracts.taploom.bridge import v1 as bridge
from taploom.contracts.taploom.helper import v1 as helper

EXAMPLE = """
balancers:
  shop:
    network: app
    ports: [80:8080, 53/udp, {port: 443, target: 8443}]
    backends:
      - {alias: web}
      - {guest: old, port: 9000}
    address: [172.18.0.200]
    name: store
    affinity: true
    health: {interval: 2s, timeout: 1s, failures: 2}
    publish: ["8080:80", "[::1]:53:53/udp", ":443"]
    also: {front: 172.19.0.9}
"""


def test_the_file() -> None:
    (shop,) = checked_balancers(Source(), read(EXAMPLE)).values()
    assert [(one.port, one.target, one.protocol) for one in shop.ports] == [
        (80, 8080, "tcp"),
        (53, 53, "udp"),
        (443, 8443, "tcp"),
    ]
    assert [(one.selector.given(), one.target) for one in shop.backends] == [
        ({"alias": "web"}, 0),
        ({"guest": "old"}, 9000),
    ]
    assert [(one.network, one.address) for one in shop.addresses] == [("app", "172.18.0.200"), ("front", "172.19.0.9")]
    assert (shop.known_as, shop.affinity, shop.networks) == ("store", True, ("app", "front"))
    assert shop.health is not None
    assert (shop.health.interval, shop.health.timeout, shop.health.failures, shop.health.successes) == (2, 1, 2, 1)
    assert [(one.host_ip, one.host_port, one.port, one.protocol) for one in shop.publish] == [
        ("", 8080, 80, "tcp"),
        ("::1", 53, 53, "udp"),
        ("", 0, 443, "tcp"),
    ]
    assert from_json("shop", to_json(shop)) == shop
    assert from_message(bridge.Balancer.parse(bytes(to_message(shop)))) == shop


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("", 1, "there is nothing in it"),
        ("balancers:\n  a: 5\n", 2, "must be keys and values"),
        ("balancers:\n  a: {ports: [1]}\n", 2, "has no network"),
        ("balancers:\n  a: {network: n}\n", 2, "has no port, so its backends have none"),
        ("balancers:\n  a: {network: n, ports: [1, 1]}\n", 2, "port 1/tcp is given twice"),
        ("balancers:\n  a: {network: n, ports: [99999]}\n", 2, "port 99999 is out of range"),
        ("balancers:\n  a: {network: n, ports: ['80:0']}\n", 2, "leads to port 0"),
        ("balancers:\n  a: {network: n, ports: [80/sctp]}\n", 2, "'sctp' is no protocol"),
        ("balancers:\n  a: {network: n, ports: [a]}\n", 2, "'a' is no port"),
        ("balancers:\n  a:\n    network: n\n    ports: [{target: 1}]\n", 4, "a port without 'port'"),
        (
            "balancers:\n  a:\n    network: n\n    ports: [1]\n    health: {interval: 0}\n",
            5,
            "interval 0 s is out of range",
        ),
        (
            "balancers:\n  a:\n    network: n\n    ports: [1]\n    health: {failures: 0}\n",
            5,
            "failures 0 is out",
        ),
        ("balancers:\n  a:\n    network: n\n    ports: [1]\n    health: false\n", 5, "is said by leaving it out"),
        ("balancers:\n  a:\n    network: n\n    ports: [1]\n    also: n\n", 5, "network 'n' is its own"),
        ("balancers:\n  a:\n    network: n\n    ports: [1]\n    address: x\n", 5, "'x' is not an address"),
        (
            "balancers:\n  a:\n    network: n\n    ports: [1]\n    address: [10.0.0.1, 10.0.0.2]\n",
            5,
            "two IPv4 addresses",
        ),
        ("balancers:\n  a:\n    network: n\n    ports: [1]\n    publish: 80\n", 5, "'80' publishes nothing"),
        ("balancers:\n  a:\n    network: n\n    ports: [1]\n    publish: '80:2'\n", 5, "has no port 2/tcp to publish"),
        ("balancers:\n  a:\n    network: n\n    ports: [1]\n    backends: [{group: g}]\n", 5, "'group' is not a key"),
        ("balancers:\n  a:\n    network: n\n    ports: [1]\n    backends: [{port: 1}]\n", 5, "this selects nobody"),
        ("balancers:\n  a:\n    network: n\n    ports: [1]\n    name: 'a b'\n", 2, "is no name that DNS can carry"),
        ("balancers:\n  a:\n    network: n\n    ports: [1]\n    network: m\n", 5, "'network' is given twice"),
    ],
)
def test_what_is_wrong_is_refused_with_its_line(text: str, line: int, reason: str) -> None:
    try:
        checked_balancers(Source("f"), read(text))
    except DocumentError as error:
        told = f"f:{error.line}: {error}"
    except InvalidError as error:
        told = str(error)
    else:
        pytest.fail("it was taken")
    assert told.startswith(f"f:{line}: "), told
    assert reason in told


@given(st.text(max_size=200))
@settings(max_examples=100, deadline=None)
def test_any_text_is_read_or_refused(text: str) -> None:
    for parse in (parse_port, parse_publish, parse_seconds):
        try:
            parse(text)
        except ValueError as error:
            assert str(error)
    try:
        checked_balancers(Source(), read(text))
    except (DocumentError, InvalidError) as error:
        assert str(error)


@given(st.integers(0, len(EXAMPLE) - 1), st.text("{}[]:,-&*!|>'\"%@`# \nag0", min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_a_damaged_file_is_read_or_refused(place: int, damage: str) -> None:
    try:
        checked_balancers(Source(), read(EXAMPLE[:place] + damage + EXAMPLE[place:]))
    except (DocumentError, InvalidError) as error:
        assert str(error)


@given(st.integers(1, 65535), st.integers(1, 65535), st.sampled_from(("tcp", "udp")))
@settings(max_examples=50, deadline=None)
def test_short_forms(port: int, target: int, protocol: str) -> None:
    found = parse_port(f"{port}:{target}/{protocol}")
    assert (found.port, found.target, found.protocol) == (port, target, protocol)
    published = parse_publish(f"127.0.0.1:{target}:{port}/{protocol}")
    assert (published.host_ip, published.host_port, published.port, published.protocol) == (
        *("127.0.0.1", target, port, protocol),
    )


@given(st.sets(st.integers(1, 14), max_size=14))
@settings(deadline=None)
def test_the_highest_free_address(taken: set[int]) -> None:
    subnet = ipaddress.ip_network("10.0.0.0/28")
    free = [n for n in range(1, 15) if n not in taken]
    if free:
        assert highest_free(subnet, [subnet[n] for n in taken]) == subnet[max(free)]


# State


@pytest.fixture
def desired(tmp_path: Path) -> Iterator[DesiredState]:
    with Store(tmp_path) as store:
        state = DesiredState(store)
        for name in ("app", "front"):
            state.activate_network(state.create_network(name, NetworkOptions(enable_ipv6=True)).id)
        yield state


def connected(desired: DesiredState, guest: str, *aliases: str, network: str = "app") -> EndpointRecord:
    desired.register_guest(guest, f"unix:/run/{guest}.control/control.sock")
    endpoint = desired.connect(network, guest, EndpointOptions(aliases=aliases))
    desired.activate_endpoint(endpoint.id)
    return endpoint


def apply(desired: DesiredState, body: str, **options: Any) -> None:
    desired.balancers.apply("", read(f"balancers: {body}"), **options)


def backends(message: helper.Balancers) -> dict[str, int]:
    return {one.endpoint_id: one.target_port for balancer in message.balancers for one in balancer.backends}


def test_backends_and_addresses(desired: DesiredState) -> None:
    web = connected(desired, "w1", "web")
    other = connected(desired, "w2", "web2")
    connected(desired, "w3", "web", network="front")
    apply(desired, "{shop: {network: app, ports: [80:81], backends: [{alias: WEB}], health: true, also: [front]}}")
    (told,) = desired.balancers.message.balancers
    assert backends(desired.balancers.message) == {web.id: 0}
    assert [len(one.addresses) for one in told.frontends] == [2, 2]
    assert told.health_check is not None
    everything = [*told.frontends[0].addresses, *told.health_check.source_addresses]
    assert len(set(everything)) == 4
    parse_balancers(desired.balancers.message)
    # What is taken is taken.
    for address in everything:
        network = desired.find_network("app")
        assert address in desired.store.taken_addresses(network.id)
    with pytest.raises(ActiveEndpointsError, match="in use by balancer shop"):
        desired.disconnect("front", "w3")
        desired.delete_network("front")
    # A container's label counts, and its port.
    labels = {"taploom.lb.shop": "9090", "taploom.lb.nosuch": ""}
    container = ContainerRecord(
        id=other.guest_id, name="w2c", created_at=other.created_at, config={"Config": {"Labels": labels}}, state={}
    )
    desired.store.insert_container(container)
    assert backends(desired.balancers.message) == {web.id: 0, other.id: 9090}
    assert desired.balancers.unknown_labels() == ["nosuch"]
    # Kept, changed and given back.
    before = desired.balancers.addresses("shop")
    apply(desired, "{shop: {network: app, ports: [90], backends: [{guest: w2}], also: [front]}}")
    assert desired.balancers.addresses("shop") == before
    assert desired.store.balancer_addresses() == [
        (one[0], one[1], "shop") for one in desired.store.balancer_addresses()
    ], "no checks, no address for them"
    apply(desired, "{}", prune=True)
    assert desired.store.balancer_addresses() == []
    desired.delete_network("front")


def test_all_or_nothing(desired: DesiredState) -> None:
    own = connected(desired, "w1").addresses[0]
    apply(desired, "{a: {network: app, ports: [80]}}")
    before = desired.store.dump()
    taken = desired.balancers.addresses("a")[0].address
    gateway = desired.find_network("app").subnets[0].gateway
    wrong = {
        f"{{b: {{network: app, ports: [1]}}, c: {{network: app, ports: [1], address: {own}}}}}": TakenError,
        f"{{b: {{network: app, ports: [80], address: {taken}}}}}": TakenError,
        f"{{b: {{network: app, ports: [80], address: {gateway}}}}}": TakenError,
        "{b: {network: app, ports: [80], address: 10.99.0.1}}": InvalidError,
        "{b: {network: nosuch, ports: [80]}}": InvalidError,
        "{b: {network: host, ports: [80]}}": InvalidError,
        "{b: {network: app, ports: [80], name: A}}": InvalidError,
    }
    for body, kind in wrong.items():
        with pytest.raises(kind):
            apply(desired, body)
        assert desired.store.dump() == before, body
    with pytest.raises(TakenError, match="a exists"):
        apply(desired, "{a: {network: app, ports: [80]}}", create_only=True)
    with pytest.raises(NotFoundError):
        desired.balancers.remove(["a", "b"])
    assert desired.store.dump() == before
    # An address may change hands in one go.
    apply(desired, f"{{b: {{network: app, ports: [80], address: {taken}}}}}", prune=True)
    assert desired.balancers.addresses("b")[0].address == taken


class Publisher:
    """Listens on nothing; port 1 is somebody else's."""

    def __init__(self) -> None:
        self.ports: dict[str, tuple[PublishedPort, ...]] = {}
        self.targets: dict[str, list[str]] = {}

    def publish(self, owner: str, bindings: Any) -> tuple[PublishedPort, ...]:
        (binding,) = bindings
        assert isinstance(binding, PortBinding)
        held = {one.host_port for ports in self.ports.values() for one in ports}
        if binding.host_port == 1 or binding.host_port in held:
            raise TakenError("port is taken")
        self.ports[owner] = (PublishedPort(binding.container_port, "tcp", "0.0.0.0", binding.host_port),)
        return self.ports[owner]

    def set_target(self, owner: str, addresses: Any) -> None:
        self.targets[owner] = list(addresses)

    def release(self, owner: str) -> None:
        self.ports.pop(owner, None)

    def published(self, owner: str) -> tuple[PublishedPort, ...]:
        return self.ports.get(owner, ())


def test_published_ports_change_with_it(desired: DesiredState) -> None:
    state, publisher = desired.balancers, Publisher()
    ports = BalancerPorts(publisher, lambda name: [place.address for place in state.addresses(name)])
    state.before_commit, state.after_commit = ports.change, ports.retarget
    apply(desired, "{a: {network: app, ports: [80, 81], publish: ['5000:80', '5001:81']}}")
    held = dict(publisher.ports)
    assert sorted(one.host_port for (one,) in held.values()) == [5000, 5001]
    assert {tuple(target) for target in publisher.targets.values()} == {
        tuple(place.address for place in state.addresses("a"))
    }
    before = desired.store.dump()
    with pytest.raises(TakenError, match="balancer b: port is taken"):
        apply(
            desired,
            "{a: {network: app, ports: [80], publish: ['5002:80']}, b: {network: app, ports: [80], publish: ['1:80']}}",
        )
    assert publisher.ports == held
    assert desired.store.dump() == before
    # From one to another at once.
    apply(desired, "{b: {network: app, ports: [80], publish: ['5000:80']}}", prune=True)
    assert [one.host_port for (one,) in publisher.ports.values()] == [5000]


# The helper


def test_ways_between_networks(desired: DesiredState) -> None:
    web = connected(desired, "w1", "web")
    apply(desired, "{shop: {network: app, ports: [80:8080, 53/udp], backends: [{alias: web}], also: [front]}}")
    networks = {
        network.id: parse_network(helper_network(network, frozenset(), ()))
        for network in desired.networks()
        if network.switched
    }
    guest, app = desired.store.guest(web.guest_id), desired.store.network(web.network_id)
    assert guest is not None
    assert app is not None
    endpoints = {web.id: parse_endpoint(helper_endpoint(web, guest, app))}
    uplink = parse_uplink(helper_uplink(desired.store.host_id(), []))
    specs = parse_balancers(desired.balancers.message)
    ways = ways_of(specs, Around(networks, endpoints, uplink))
    assert [(way.version, [str(one) for one in way.addresses]) for way in ways] == [
        (4, [web.addresses[0]]),
        (6, [web.addresses[1]]),
    ]
    front = desired.find_network("front")
    assert ways[0].routes(front.id) == [
        {"ip_prefix": f"{web.addresses[0]}/32", "nexthop": app.uplink_addresses[0].partition("/")[0]}
    ]
    assert ways[0].routes(app.id)[0]["ip_prefix"] == front.subnets[0].subnet
    assert len(ways[0].outside()) == 4
    assert not ways_of(specs, Around(networks, endpoints, None)), "no uplink, no way"
    assert not ways_of(specs, Around(networks, {}, uplink)), "no backend, no way"


@pytest.mark.parametrize(
    "change",
    [
        {"balancer_id": "a b"},
        {"frontends": [helper.BalancerFrontend(network_id="n", addresses=["10.0.0.1", "10.0.0.2"])]},
        {"frontends": [helper.BalancerFrontend(network_id="n", names=["a b"])]},
        {"frontends": [helper.BalancerFrontend(network_id="n"), helper.BalancerFrontend(network_id="n")]},
        {"ports": [helper.BalancerPort(protocol=helper.BalancerProtocol.TCP, port=0, target_port=1)]},
        {"ports": [helper.BalancerPort(port=1, target_port=1)]},
        {"backends": [helper.BalancerBackend(endpoint_id="e", target_port=65536)]},
        {"health_check": helper.BalancerHealthCheck(interval_seconds=0, timeout_seconds=1, failures=1, successes=1)},
        {"health_check": helper.BalancerHealthCheck(interval_seconds=1, timeout_seconds=1, failures=0, successes=1)},
    ],
)
def test_the_helper_refuses(change: dict[str, Any]) -> None:
    right: dict[str, Any] = {"balancer_id": "a", "network_id": "n"}
    parse_balancers(helper.Balancers(balancers=[helper.Balancer(**right)]))
    with pytest.raises(InvalidSpecError):
        parse_balancers(helper.Balancers(balancers=[helper.Balancer(**(right | change))]))
    with pytest.raises(InvalidSpecError, match="twice"):
        parse_balancers(helper.Balancers(balancers=[helper.Balancer(**right)] * 2))


NAMES = st.from_regex(r"[a-z][a-z0-9]{0,8}", fullmatch=True)
BALANCERS = st.dictionaries(
    NAMES,
    st.fixed_dictionaries(
        {
            "network": NAMES,
            "ports": st.lists(st.integers(1, 99), min_size=1, unique=True).map(
                lambda ports: [f"{port}:{port + 1}/{'udp' if port % 2 else 'tcp'}" for port in ports]
            ),
        },
        optional={
            "backends": st.lists(st.fixed_dictionaries({"alias": NAMES}, optional={"port": st.integers(1, 65535)})),
            "affinity": st.booleans(),
            "health": st.fixed_dictionaries(
                {}, optional={"interval": st.integers(1, 99), "failures": st.integers(1, 9)}
            ),
            "name": NAMES,
        },
    ),
    min_size=1,
    max_size=3,
)


@given(BALANCERS)
@settings(max_examples=50, deadline=None)
def test_nothing_is_lost_on_the_way(value: dict[str, Any]) -> None:
    """Read, checked, sent over the contract, kept in the database: it is the same."""
    found = checked_balancers(Source(), read(json.dumps({"balancers": value}, indent=1)))
    assert list(found) == list(value)
    for name, balancer in found.items():
        assert isinstance(balancer, Balancer)
        assert from_message(bridge.Balancer.parse(bytes(to_message(balancer)))) == balancer
        assert from_json(name, to_json(balancer)) == balancer
        given_backends = value[name].get("backends", [])
        assert [(one.selector.alias, one.target) for one in balancer.backends] == [
            (one["alias"], one.get("port", 0)) for one in given_backends
        ]
        assert balancer.affinity is value[name].get("affinity", False)
        assert (balancer.health is None) == ("health" not in value[name])
