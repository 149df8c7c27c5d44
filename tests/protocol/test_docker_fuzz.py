"""Any request gets an answer of Docker's: never an error of the server's own, never a hang, never half a change."""

from __future__ import annotations

import json
import re
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio
from containers_support import ContainerRig, open_container_rig
from docker_support import DockerRig, open_docker
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from host_bridge.docker_api import container_shapes, endpoints, networks
from host_bridge.docker_api.gojson import Map, Optional, Scalar, Shape, Struct

# What dockerd answers with 500, where its code has no better status for the error.
_DOCKERS_OWN = (
    "bad format for links: ",
    "container ",
    "empty string specified for links",
    "failed to allocate gateway (",
    "failed to allocate secondary ip address (",
    "invalid filter: 'type'=",
    "strconv.ParseInt: parsing ",
    "Multiple IDs found with provided prefix",
)
_CONTAINERS_OWN = ("strconv.Atoi: parsing ",)


def mostly(usual: list[Any], unusual: list[Any]) -> st.SearchStrategy[Any]:
    """One of the usual values nine times of ten: a request of only strange values gets no further than its first."""
    return st.integers(0, 9).flatmap(lambda dice: st.sampled_from(unusual if dice == 7 else usual))


ADDRESSES = mostly(
    ["", "", "10.1.0.1", "10.1.0.9", "10.9.0.9"],
    ["10.1.0.0", "172.17.0.5", "fd00:1::5", "::", "0.0.0.0", "x", "10.1.0.300", "fe80::1%eth0"],
)
SUBNETS = mostly(
    ["10.1.0.0/24", "10.2.0.0/29", "fd00:1::/64"],
    ["", "10.1.0.5/24", "10.1.0.0/32", "172.17.0.0/16", "fd00:1::/128", "::/0", "0.0.0.0/0", "x/y", "10.1.0.0/024"],
)
RANGES = mostly(["", "", "10.1.0.128/25"], ["10.2.0.0/30", "x", "fd00:1::/80"])
NETWORKS = mostly(["app", "one", "two", "bridge"], ["", " ", "host", "none", "nope", "a/b", "\u00fc", "0", "f" * 64])
CONTAINERS = mostly(["web", "db"], ["", " ", "nope", "/web", "0", "x" * 300])
TEXTS = st.sampled_from(["", "a", "b", "true", "0", "-1", "1500", "x y", "\u00fc"]) | st.text(max_size=12)
_BRIDGE = "com.docker.network.bridge."
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        f"{_BRIDGE}name": mostly(["br0", "br1"], ["", "x/y"]),
        f"{_BRIDGE}enable_icc": mostly(["true", "false"], ["", "x"]),
        f"{_BRIDGE}host_binding_ipv4": mostly(["127.0.0.1"], ["", "x"]),
        "com.docker.network.driver.mtu": mostly(["1400", "0"], ["", "x", "-1", "20", "99999"]),
        "com.docker.network.enable_ipv6": mostly(["0", "1"], ["x"]),
        "other": TEXTS,
    },
)
_BY_KEY: dict[str, st.SearchStrategy[Any]] = {
    "Name": NETWORKS,
    "Container": CONTAINERS,
    "Driver": mostly(["", "bridge", "default"], ["host", "null", "overlay", "foo"]),
    "Scope": mostly(["", "local"], ["swarm", "x"]),
    "ConfigFrom": st.none() | st.fixed_dictionaries({"Network": mostly(["", "two"], ["nope"])}),
    "ConfigOnly": mostly([False], [True]),
    "Ingress": mostly([False], [True]),
    "EnableIPv4": mostly([True, None], [False]),
    "Subnet": SUBNETS,
    "IPRange": RANGES,
    "Gateway": ADDRESSES,
    "AuxiliaryAddresses": st.dictionaries(st.text(max_size=3), ADDRESSES, max_size=2),
    "IPv4Address": ADDRESSES,
    "IPv6Address": ADDRESSES,
    "Options": OPTIONS,
    "DriverOpts": OPTIONS,
    "MacAddress": mostly(["", "02:42:00:00:00:01"], ["x"]),
    "Links": st.lists(mostly(["db:database", "web"], ["a:b:c", ""]), max_size=2) | st.none(),
    "Aliases": st.lists(mostly(["one", "two"], ["x y", "", "x" * 300]), max_size=2) | st.none(),
    "GwPriority": st.integers(-(2**31), 2**31) | st.integers(),
    "Network": NETWORKS,
}


# Without them every request would be the same error.
_NEEDED = frozenset({"Name", "Container", "Image", "Cmd"})


def values(shape: Shape, key: str = "") -> st.SearchStrategy[Any]:
    """Values of a type, most of them such as people send."""
    right: st.SearchStrategy[Any]
    match shape:
        case _ if key in _BY_KEY:
            right = _BY_KEY[key]
        case Struct():
            strategies = {name: values(inner, name) for name, inner in shape.fields.items()}
            needed = {name: strategy for name, strategy in strategies.items() if name in _NEEDED}
            right = st.fixed_dictionaries(
                needed, optional={name: one for name, one in strategies.items() if name not in needed}
            )
        case Map():
            right = st.dictionaries(TEXTS, values(shape.element), max_size=3)
        case Optional():
            right = values(shape.element)
        case Scalar("bool"):
            right = st.booleans()
        case Scalar("string"):
            right = TEXTS
        case Scalar():
            right = st.integers()
        case _:
            right = st.lists(values(shape.element), max_size=3)
    wrong = st.none() | st.integers() | st.text(max_size=5) | st.lists(st.integers(), max_size=2) | st.just({})
    return st.integers(0, 99).flatmap(lambda dice: wrong if dice == 57 else right)


FILTERS = st.dictionaries(
    st.sampled_from(["name", "id", "driver", "label", "label!", "scope", "type", "dangling", "until", "event", "x"]),
    st.lists(TEXTS | st.sampled_from(["custom", "builtin", "1h", "[", "a=b", "^app$"]), max_size=2)
    | st.dictionaries(TEXTS, st.booleans(), max_size=2),
    max_size=3,
)
VERSIONS = mostly(["", "/v1.24", "/v1.41", "/v1.51"], ["/v1.2", "/v9.9", "/v"])
QUERIES = st.one_of(
    st.just(""),
    FILTERS.map(lambda value: "?" + urllib.parse.urlencode({"filters": json.dumps(value)})),
)
STRANGE_QUERIES = st.text(alphabet='abfilters=&;%2{}[]":0', max_size=20).map(lambda text: f"?{text}")
NETWORK = NETWORKS.map(lambda name: urllib.parse.quote(name, safe=""))
BODIES: tuple[tuple[str, Shape], ...] = (
    ("/networks/create", networks.CREATE),
    ("/networks/{}/connect", networks.CONNECT),
    ("/networks/{}/disconnect", networks.DISCONNECT),
)
REQUESTS = st.one_of(
    *(
        st.tuples(st.just("POST"), VERSIONS, NETWORK.map(path.format), st.just(""), values(shape))
        for path, shape in BODIES
    ),
    st.tuples(st.just("GET"), VERSIONS, st.just("/networks"), QUERIES, st.none()),
    st.tuples(st.just("POST"), VERSIONS, st.just("/networks/prune"), QUERIES, st.none()),
    st.tuples(st.sampled_from(["GET", "DELETE"]), VERSIONS, NETWORK.map("/networks/{}".format), st.just(""), st.none()),
    st.tuples(
        st.sampled_from(["GET", "HEAD", "POST", "DELETE", "PUT"]),
        VERSIONS,
        st.sampled_from(["/networks", "/networks/", "/networks/prune", "/_ping", "/version", "/info", "/system/df"])
        | st.text(alphabet="/.abnetworks%20", max_size=15).map(lambda text: f"/{text}"),
        QUERIES | STRANGE_QUERIES,
        st.none() | st.integers() | st.just({}),
    ),
)
EXAMPLES = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))


async def asked(rig: DockerRig, method: str, target: str, body: object) -> None:
    """Sends a request and checks all that must hold of every answer."""
    store = rig.rig.store
    before = store.dump()
    answer = await rig.docker(method, target, body)
    assert 200 <= answer.status < 600
    if answer.status >= 400 and method != "HEAD":
        if answer.headers["content-type"] == "application/json":
            assert isinstance(answer.message, str)
        assert answer.status < 500 or answer.message.startswith(_DOCKERS_OWN), (method, target, body, answer)
    if answer.status >= 400 or method in ("GET", "HEAD"):
        assert store.dump() == before, (method, target, body, answer)


def runs(directory: Path, use: Callable[[DockerRig], Any]) -> None:
    """A fresh fabric with two guests and a network for each example would take too long: they share one."""

    async def main() -> None:
        async with open_docker(directory) as rig:
            for name in ("web", "db"):
                await rig.rig.guest(name)
            await rig.docker(
                "POST", "/networks/create", {"Name": "app", "IPAM": {"Config": [{"Subnet": "10.9.0.0/24"}]}}
            )
            portal = trio.lowlevel.current_trio_token()

            def ask(*request: Any) -> None:
                trio.from_thread.run(asked, rig, *request, trio_token=portal)

            await trio.to_thread.run_sync(use, ask)
            # What the fabric holds in the end is what the helper was told.
            assert (await rig.docker("GET", "/networks")).status == 200
            wanted = {network.id for network in rig.rig.fabric.desired.networks() if network.switched}
            await rig.rig.until(lambda: rig.rig.helper.networks.keys() == wanted)
            endpoints = {endpoint.id for endpoint in rig.rig.store.endpoints()}
            await rig.rig.until(lambda: rig.rig.helper.endpoints.keys() == endpoints)

    trio.run(main)


def test_any_request(tmp_path: Path) -> None:
    def use(ask: Callable[..., None]) -> None:
        @EXAMPLES
        @given(REQUESTS)
        def check(request: tuple[str, str, str, str, object]) -> None:
            method, version, path, query, body = request
            ask(method, f"{version}{path}{query}", body)

        check()

    runs(tmp_path, use)


_CONTAINER_KEYS = """
    Image Cmd Entrypoint Env Labels Hostname Domainname ExposedPorts User WorkingDir Tty StopSignal MacAddress
    NetworkingConfig
"""
_HOST_KEYS = """
    NetworkMode PortBindings PublishAllPorts Links Dns DnsSearch DnsOptions ExtraHosts RestartPolicy AutoRemove Tmpfs
    LogConfig
"""
PORTS = st.sampled_from(["80/tcp", "80", "53/udp", "0", "x", "70000/tcp", "80-82/tcp", "80/sctp"])
_BY_KEY |= {
    "Image": mostly(["box"], ["", "nope", "a/b:c", "host", "x y"]),
    "Cmd": mostly([["sleep", "1000"], ["true"]], [None, [], [""], "sleep 5"]),
    "Entrypoint": mostly([None, []], [["sh", "-c"], "sh", [""]]),
    "Env": mostly([None, ["A=b"]], [["=x"], ["A"]]),
    "Hostname": mostly(["", "host1"], ["in_valid-", "x" * 300, "a b"]),
    "WorkingDir": mostly(["", "/tmp"], ["x"]),
    "StopSignal": mostly(["", "SIGTERM"], ["x", "9"]),
    "ExposedPorts": st.dictionaries(PORTS, st.just({}), max_size=2),
    "PortBindings": st.dictionaries(
        PORTS,
        st.lists(
            st.fixed_dictionaries(
                {
                    "HostIp": mostly(["", "127.0.0.1"], ["x", "::1", "10.255.255.1"]),
                    "HostPort": mostly(["", "0"], ["x", "70000", "80000-80001"]),
                }
            ),
            max_size=2,
        ),
        max_size=2,
    ),
    "NetworkMode": mostly(["", "default", "app", "one", "bridge"], ["none", "nope", "container:web", "container:"]),
    "EndpointsConfig": st.dictionaries(NETWORKS, values(endpoints.ENDPOINT_SETTINGS), max_size=2),
    "ExtraHosts": mostly([None, ["db:10.0.0.1"], ["up:host-gateway"]], [["x"], ["a:b:c"]]),
    "Dns": mostly([None, ["10.0.0.1"]], [["x"]]),
    "RestartPolicy": mostly(
        [{"Name": ""}, {"Name": "no"}], [{"Name": "x"}, {"Name": "on-failure", "MaximumRetryCount": -1}]
    ),
    "Tmpfs": mostly([None, {"/tmp": ""}], [{"x": ""}]),
    "LogConfig": mostly([{"Type": "", "Config": None}], [{"Type": "x"}]),
    "AutoRemove": mostly([False], [True]),
}
_HOST_SHAPE = Struct("h", {key: container_shapes.HOST_CONFIG[key] for key in _HOST_KEYS.split()})
_CONTAINER_SHAPE = Struct(
    "c",
    {key: container_shapes.CREATE.fields[key] for key in _CONTAINER_KEYS.split()} | {"HostConfig": _HOST_SHAPE},
)
CONTAINER = mostly(["web", "db", "c3"], ["", "nope", "/web", "0", "a b", "x" * 300]).map(
    lambda name: urllib.parse.quote(name, safe="")
)
CONTAINER_REQUESTS = st.one_of(
    st.tuples(st.just("POST"), CONTAINER.map("/containers/create?name={}".format), values(_CONTAINER_SHAPE)),
    st.tuples(
        st.just("POST"),
        st.builds(
            "/containers/{}/{}".format,
            CONTAINER,
            mostly(
                ["start", "stop?t=0", "restart?t=0", "kill"], ["rename?name=db", "stop?t=x", "kill?signal=x", "pause"]
            ),
        ),
        st.none(),
    ),
    st.tuples(st.just("DELETE"), CONTAINER.map("/containers/{}?force=1".format), st.none()),
    st.tuples(
        st.just("GET"),
        CONTAINER.map("/containers/{}/json".format)
        | QUERIES.map("/containers/json{}".format)
        | st.sampled_from(["/containers/json?all=1", "/images/json", "/info", "/system/df"]),
        st.none(),
    ),
    st.tuples(st.just("POST"), NETWORK.map("/networks/{}/connect".format), values(networks.CONNECT)),
    st.tuples(st.just("POST"), NETWORK.map("/networks/{}/disconnect".format), values(networks.DISCONNECT)),
    st.tuples(st.just("POST"), st.just("/networks/create"), values(networks.CREATE)),
    st.tuples(st.just("DELETE"), NETWORK.map("/networks/{}".format), st.none()),
)


def test_any_container(tmp_path: Path) -> None:
    """With a runtime that keeps its containers in a dictionary."""

    async def asked_container(rig: ContainerRig, method: str, target: str, body: object) -> None:
        store = rig.fabric.desired.store
        before = store.dump()
        answer = await rig.docker(method, target, body)
        context = (method, target, body, answer)
        if answer.status >= 400 and answer.headers["content-type"] == "application/json":
            assert isinstance(answer.message, str), context
        if answer.status >= 500:
            assert answer.message.startswith(_DOCKERS_OWN + _CONTAINERS_OWN), context
        # A start that fails is remembered in the container's state, as it is by dockerd.
        if method == "GET" or (answer.status >= 400 and not re.search("start$|restart", target)):
            assert store.dump() == before, context

    async def main() -> None:
        async with open_container_rig(tmp_path) as rig:
            await rig.docker("POST", "/networks/create", {"Name": "app"})
            portal = trio.lowlevel.current_trio_token()

            def use() -> None:
                @EXAMPLES
                @given(CONTAINER_REQUESTS)
                def check(request: tuple[str, str, object]) -> None:
                    trio.from_thread.run(asked_container, rig, *request, trio_token=portal)

                check()

            await trio.to_thread.run_sync(use)
            await settled(rig)

    trio.run(main)


def test_many_clients_at_once(tmp_path: Path) -> None:
    """The same requests, several at a time: whatever wins, what is left fits together."""

    async def at_once(rig: ContainerRig, requests: list[tuple[str, str, object]]) -> None:
        async def one(method: str, target: str, body: object) -> None:
            answer = await rig.docker(method, target, body)
            if answer.status >= 500:
                assert answer.message.startswith(_DOCKERS_OWN + _CONTAINERS_OWN), (method, target, body, answer)

        async with trio.open_nursery() as nursery:
            for request in requests:
                nursery.start_soon(one, *request)

    async def main() -> None:
        async with open_container_rig(tmp_path) as rig:
            await rig.docker("POST", "/networks/create", {"Name": "app"})
            portal = trio.lowlevel.current_trio_token()

            def use() -> None:
                @settings(EXAMPLES, max_examples=60)
                @given(st.lists(CONTAINER_REQUESTS, min_size=4, max_size=10))
                def check(requests: list[tuple[str, str, object]]) -> None:
                    trio.from_thread.run(at_once, rig, requests, trio_token=portal)

                check()

            await trio.to_thread.run_sync(use)
            await settled(rig)

    trio.run(main)


async def settled(rig: ContainerRig) -> None:
    """Checks that records, guests, endpoints, the helper and published ports say the same."""
    store = rig.fabric.desired.store
    endpoints = store.endpoints()
    held = [(endpoint.network_id, address) for endpoint in endpoints for address in endpoint.addresses]
    assert len(held) == len(set(held)), "an address has two holders"
    assert all(endpoint.active for endpoint in endpoints)
    containers = rig.manager.containers()
    assert {guest.id for guest in store.guests()} == {
        one.id for one in containers if one.running and one.mode != "host"
    }
    await rig.until(lambda: rig.helper.endpoints.keys() == {endpoint.id for endpoint in endpoints})
    networks = {network.id for network in rig.fabric.desired.networks() if network.switched}
    await rig.until(lambda: rig.helper.networks.keys() == networks)
    for container in containers:
        assert container.running or not rig.publisher.published(container.id)


PIECES = st.binary(max_size=40) | st.sampled_from(
    [
        b"GET /_ping HTTP/1.1\r\nHost: d\r\n",
        b"POST /networks/create HTTP/1.1\r\n",
        b"Host: d\r\n",
        b"\r\n",
        b"Content-Length: 5\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"5\r\n",
        b"Upgrade: tcp\r\n",
        b"Connection: close\r\n",
        b"Expect: 100-continue\r\n",
    ]
)


def test_any_bytes(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_docker(tmp_path) as rig:
            portal = trio.lowlevel.current_trio_token()

            def send() -> None:
                @EXAMPLES
                @given(st.lists(PIECES, max_size=8).map(b"".join))
                def check(data: bytes) -> None:
                    answer = trio.from_thread.run(lambda: rig.docker.raw(data, eof=True), trio_token=portal)
                    assert not answer or answer.startswith(b"HTTP/1.1 ")
                    assert b"HTTP/1.1 5" not in answer.replace(b"HTTP/1.1 501", b"")

                check()

            await trio.to_thread.run_sync(send)
            assert (await rig.docker("GET", "/_ping")).status == 200

    trio.run(main)
