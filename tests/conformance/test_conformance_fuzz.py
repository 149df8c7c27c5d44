"""Requests of Docker's field types and of others, to both sides: no 5xx of taploom's where dockerd has none,
nobody is kept waiting, and what is refused has changed nothing."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import pytest
from comparison import Pair
from engines import IMAGE, Answer, Engine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.system
PATIENCE = 30  # seconds: longer than any request here takes on a busy machine
FUZZ = settings(
    max_examples=60,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

WRONG = st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.just("x"), st.just([]), st.just({}), st.just(["x"]))
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=12)
ADDRESS = st.sampled_from(
    [
        "10.88.0.1",
        "10.88.0.9",
        "10.88.0.255",
        "10.88.1.0",
        "10.89.0.9",
        "fd00:88::9",
        "0.0.0.0",
        "1.2.3",
        "",
        "x",
        "10.88.0.9/24",
    ]
)
SUBNET = st.sampled_from(
    [
        "10.88.0.0/24",
        "10.88.0.0/30",
        "10.88.0.7/24",
        "10.88.0.0/16",
        "10.88.0.0/33",
        "fd00:88::/64",
        "fd00:88::/120",
        "",
        "x",
        "224.0.0.0/8",
    ]
)


def typed(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Mostly of the right type."""
    return st.one_of(strategy, strategy, strategy, strategy, strategy, WRONG)


def fields(**strategies: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """An object with any of these members."""
    return st.fixed_dictionaries({}, optional={name: typed(strategy) for name, strategy in strategies.items()})


MAP = st.dictionaries(TEXT, typed(TEXT), max_size=2)
POOL = fields(
    Subnet=SUBNET, IPRange=SUBNET, Gateway=ADDRESS, AuxiliaryAddresses=st.dictionaries(TEXT, typed(ADDRESS), max_size=2)
)
OPTIONS = st.dictionaries(
    st.sampled_from(
        [
            "com.docker.network.driver.mtu",
            "com.docker.network.bridge.enable_icc",
            "com.docker.network.bridge.enable_ip_masquerade",
            "com.docker.network.bridge.host_binding_ipv4",
            "other",
        ]
    ),
    typed(st.sampled_from(["true", "false", "1400", "68", "70000", "x", "", "127.0.0.1"])),
    max_size=2,
)
NETWORK = fields(
    CheckDuplicate=st.booleans(),
    Driver=st.sampled_from(["bridge", ""]),
    Internal=st.booleans(),
    Attachable=st.booleans(),
    EnableIPv6=st.booleans(),
    ConfigOnly=st.booleans(),
    ConfigFrom=fields(Network=TEXT),
    IPAM=fields(Driver=st.sampled_from(["default", ""]), Options=MAP, Config=st.lists(typed(POOL), max_size=2)),
    Options=OPTIONS,
    Labels=MAP,
)
ENDPOINT = fields(
    IPAMConfig=fields(IPv4Address=ADDRESS, IPv6Address=ADDRESS, LinkLocalIPs=st.lists(typed(ADDRESS), max_size=2)),
    Aliases=st.lists(typed(TEXT), max_size=2),
    Links=st.lists(typed(st.sampled_from(["fuzzed:x", "nosuch:x", "fuzzed", ":", ""])), max_size=2),
    DriverOpts=MAP,
    MacAddress=st.sampled_from(["02:00:00:00:00:01", "x", ""]),
    GwPriority=st.integers(-3, 3),
)
FILTERS = st.dictionaries(
    st.sampled_from(["name", "id", "driver", "type", "scope", "label", "dangling", "until", "x"]),
    typed(st.lists(typed(TEXT), max_size=2)),
    max_size=2,
)


@pytest.fixture
def sides(pair: Pair) -> Any:
    yield pair
    pair.both(Engine.clean)


def ask(engine: Engine, method: str, path: str, body: object = None) -> Answer:
    data = None if body is None else json.dumps(body).encode()
    headers = {} if data is None else {"Content-Type": "application/json"}
    return engine.request(method, f"/v1.41{path}", data, headers, timeout=PATIENCE)


def judge(real: Answer, ours: Answer) -> None:
    """A 5xx is as good as dockerd's."""
    assert ours.status < 500 or real.status >= 500, (
        f"dockerd {real.status} {real.body!r}, taploom {ours.status} {ours.body!r}"
    )
    if ours.status >= 400:
        assert set(ours.json()) == {"message"}


def state(engine: Engine) -> Any:
    """What a refused request must leave as it is."""
    networks = {network["Name"]: (network["Id"], network["IPAM"]) for network in ask(engine, "GET", "/networks").json()}
    containers = ask(engine, "GET", "/containers/json?all=1").json()
    attached = {c["Id"]: sorted(c["NetworkSettings"]["Networks"]) for c in containers}
    return networks, attached


def test_network_create(sides: Pair) -> None:
    @FUZZ
    @given(typed(st.sampled_from(["fuzz", "fuzz two", "fuzz/3"])), NETWORK)
    def check(name: Any, body: dict[str, Any]) -> None:
        before = state(sides.ours)
        real, ours = sides.both(lambda engine: ask(engine, "POST", "/networks/create", {"Name": name, **body}))
        judge(real, ours)
        if ours.status >= 400:
            assert state(sides.ours) == before
        else:
            shown = ask(sides.ours, "GET", f"/networks/{ours.json()['Id']}")
            assert shown.status == 200
            assert ask(sides.ours, "DELETE", f"/networks/{ours.json()['Id']}").status == 204
            assert state(sides.ours) == before
        if real.status < 400:
            ask(sides.real, "DELETE", f"/networks/{real.json()['Id']}")

    check()


def test_network_connect(sides: Pair) -> None:
    sides.both(lambda engine: engine.must("network", "create", "--subnet", "10.88.0.0/24", "net"))
    sides.both(lambda engine: engine.must("run", "-d", "--name", "fuzzed", IMAGE, "sleep", "86400"))

    @FUZZ
    @given(st.sampled_from(["fuzzed", "nosuch", ""]) | WRONG, typed(ENDPOINT))
    def check(container: Any, endpoint: Any) -> None:
        before = state(sides.ours)
        body = {"Container": container, "EndpointConfig": endpoint}
        real, ours = sides.both(lambda engine: ask(engine, "POST", "/networks/net/connect", body))
        judge(real, ours)
        if ours.status >= 400:
            assert state(sides.ours) == before
        gone = {"Container": "fuzzed", "Force": True}
        sides.both(lambda engine: ask(engine, "POST", "/networks/net/disconnect", gone))
        assert "net" not in str(state(sides.ours)[1])

    check()


def test_filters(sides: Pair) -> None:
    @FUZZ
    @given(st.sampled_from(["GET /networks", "POST /networks/prune", "GET /containers/json"]), typed(FILTERS) | TEXT)
    def check(route: str, filters: Any) -> None:
        method, path = route.split()
        text = filters if isinstance(filters, str) else json.dumps(filters)
        judge(*sides.both(lambda engine: ask(engine, method, f"{path}?filters={quote(text)}")))

    check()
