"""The /networks family: the real CLI, docker-py, and requests by hand. The texts are dockerd's."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import docker
import pytest
import trio
from bridge_support import unchanged
from docker_support import DockerRig, open_docker

PREFIX = "com.docker.network."


async def create(rig: DockerRig, name: str, **fields: Any) -> str:
    answer = await rig.docker("POST", "/networks/create", {"Name": name, **fields})
    assert answer.status == 201, answer.body
    assert answer.value["Warning"] == ""
    return str(answer.value["Id"])


async def inspect(rig: DockerRig, name: str, version: str = "/v1.51") -> Any:
    answer = await rig.docker("GET", f"{version}/networks/{name}")
    assert answer.status == 200, answer.body
    return answer.value


async def names(rig: DockerRig, filters: object) -> list[str]:
    query = urllib.parse.quote(json.dumps(filters))
    return sorted(network["Name"] for network in (await rig.docker("GET", f"/networks?filters={query}")).value)


async def test_the_predefined_networks(tmp_path: Path) -> None:
    async with open_docker(tmp_path) as rig:
        bridge, host, none = [await inspect(rig, name) for name in ("bridge", "host", "none")]
        assert (bridge["Driver"], host["Driver"], none["Driver"]) == ("bridge", "host", "null")
        assert bridge["IPAM"]["Config"] == [{"Subnet": "172.17.0.0/16", "Gateway": "172.17.0.1"}]
        assert bridge["Options"][f"{PREFIX}bridge.default_bridge"] == "true"
        assert host["IPAM"] == {"Driver": "default", "Options": None, "Config": []}
        for name in ("bridge", "host", "none"):
            answer = await rig.docker("DELETE", f"/networks/{name}")
            assert (answer.status, answer.message) == (403, f"{name} is a pre-defined network and cannot be removed")


async def test_every_field_is_echoed_in_dockers_order(tmp_path: Path) -> None:
    async with open_docker(tmp_path) as rig:
        network_id = await create(
            rig,
            "full",
            CheckDuplicate=True,
            Driver="bridge",
            Internal=True,
            Attachable=True,
            EnableIPv6=True,
            IPAM={
                "Driver": "default",
                "Options": {"a": "b"},
                "Config": [
                    {
                        "Subnet": "10.50.0.0/24",
                        "IPRange": "10.50.0.0/28",
                        "Gateway": "10.50.0.3",
                        "AuxiliaryAddresses": {"b": "10.50.0.9", "a": "10.50.0.8"},
                    },
                    {"Subnet": "fd00:50::/64"},
                ],
            },
            Options={f"{PREFIX}driver.mtu": "1400", "unknown": "kept"},
            Labels={"z": "1", "a": "2"},
        )
        value = await inspect(rig, "full")
        assert list(value) == [
            *("Name", "Id", "Created", "Scope", "Driver", "EnableIPv4", "EnableIPv6", "IPAM", "Internal"),
            *("Attachable", "Ingress", "ConfigFrom", "ConfigOnly", "Containers", "Options", "Labels"),
        ]
        assert value["Id"] == network_id and len(network_id) == 64
        assert value["IPAM"] == {
            "Driver": "default",
            "Options": {"a": "b"},
            "Config": [
                {
                    "Subnet": "10.50.0.0/24",
                    "IPRange": "10.50.0.0/28",
                    "Gateway": "10.50.0.3",
                    "AuxiliaryAddresses": {"a": "10.50.0.8", "b": "10.50.0.9"},
                },
                {"Subnet": "fd00:50::/64"},
            ],
        }
        assert (value["Internal"], value["Attachable"], value["EnableIPv6"]) == (True, True, True)
        assert list(value["Labels"].items()) == [("a", "2"), ("z", "1")]
        assert value["Options"] == {f"{PREFIX}driver.mtu": "1400", "unknown": "kept"}
        assert "EnableIPv4" not in await inspect(rig, "full", "/v1.47")


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"Name": ""}, 400, "invalid name: name is empty"),
        ({"Name": " "}, 400, "invalid name: name is empty"),
        ({"Name": "bridge"}, 403, "operation is not permitted on predefined bridge network "),
        ({"Name": "default"}, 403, "operation is not permitted on predefined default network "),
        ({"Name": "there"}, 409, "network with name there already exists"),
        ({"Name": "x", "Driver": "foo"}, 404, 'plugin "foo" not found'),
        ({"Name": "x", "Driver": "host"}, 403, 'only one instance of "host" network is allowed'),
        ({"Name": "x", "Driver": "null"}, 403, 'only one instance of "null" network is allowed'),
        ({"Name": "x", "Scope": "swarm"}, 403, "cannot create a swarm scoped network when swarm is not active"),
        ({"Name": "x", "Ingress": True}, 403, "Ingress network can only be global scope network"),
        ({"Name": "x", "IPAM": {"Driver": "foo"}}, 404, 'plugin "foo" not found'),
        ({"Name": "x", "IPAM": {"Driver": "null"}}, 400, "ipv4 pool is empty"),
        (
            {"Name": "x", "IPAM": {"Config": [{"Subnet": "10.1.0.5/24"}]}},
            400,
            "invalid network config:\ninvalid subnet 10.1.0.5/24: it should be 10.1.0.0/24",
        ),
        (
            {"Name": "x", "IPAM": {"Config": [{"Subnet": "172.17.0.0/24"}]}},
            403,
            "invalid pool request: Pool overlaps with other one on this address space",
        ),
        (
            {"Name": "x", "IPAM": {"Config": [{"Subnet": "10.1.0.0/24"}, {"Subnet": "10.2.0.0/24"}]}},
            403,
            "bridge driver doesn't support multiple subnets",
        ),
        (
            {"Name": "x", "IPAM": {"Config": [{"Subnet": "10.1.0.0/24", "Gateway": "10.1.0.255"}]}},
            500,
            "failed to allocate gateway (10.1.0.255): Address already in use",
        ),
        (
            {"Name": "x", "IPAM": {"Config": [{"Subnet": "10.1.0.0/24", "AuxiliaryAddresses": {"a": "10.1.0.1"}}]}},
            500,
            "failed to allocate secondary ip address (a:10.1.0.1): Address already in use",
        ),
        ({"Name": "x", "EnableIPv4": False}, 400, "IPv4 or IPv6 must be enabled"),
        (
            {"Name": "x", "Options": {f"{PREFIX}driver.mtu": "x"}},
            400,
            f'failed to parse {PREFIX}driver.mtu value: x (strconv.Atoi: parsing "x": invalid syntax)',
        ),
        ({"Name": "x", "Options": {f"{PREFIX}driver.mtu": "-1"}}, 400, "invalid MTU number: -1"),
        (
            {"Name": "x", "Options": {f"{PREFIX}bridge.enable_icc": "x"}},
            400,
            f'failed to parse {PREFIX}bridge.enable_icc value: x (strconv.ParseBool: parsing "x": invalid syntax)',
        ),
        (
            {"Name": "x", "Options": {f"{PREFIX}bridge.host_binding_ipv4": "x"}},
            400,
            f"failed to parse {PREFIX}bridge.host_binding_ipv4 value: x (nil ip)",
        ),
        (
            {"Name": "x", "Options": {f"{PREFIX}enable_ipv6": "x"}},
            400,
            f'driver-opt "{PREFIX}enable_ipv6" is not a valid bool',
        ),
        ({"Name": "x", "ConfigFrom": {"Network": "nope"}}, 404, 'configuration network "nope" does not exist'),
        ({"Name": "x", "ConfigFrom": {"Network": "there"}}, 404, 'configuration network "there" does not exist'),
        (
            {"Name": "x", "ConfigOnly": True, "Scope": "local"},
            403,
            "configuration network can only contain network specific fields. Network operator fields like "
            "[ ingress | internal | attachable | scope ] are not supported.",
        ),
        (
            {"Name": "x", "ConfigFrom": {"Network": "config"}, "Labels": {"a": "b"}},
            403,
            "user specified configurations are not supported if the network depends on a configuration network",
        ),
        (
            {"Name": "x", "ConfigFrom": {"Network": "config"}, "Options": {"a": "b"}},
            403,
            "network driver options are not supported if the network depends on a configuration network",
        ),
        (
            {"Name": "x", "ConfigFrom": {"Network": "config"}, "ConfigOnly": True},
            403,
            "a configuration network cannot depend on another configuration network",
        ),
    ],
)
async def test_what_cannot_be_created(tmp_path: Path, body: Any, status: int, message: str) -> None:
    async with open_docker(tmp_path) as rig:
        await create(rig, "there")
        await create(rig, "config", ConfigOnly=True)
        with unchanged(rig.rig):
            answer = await rig.docker("POST", "/networks/create", body)
        assert (answer.status, answer.message) == (status, message)


async def test_explicit_nulls_and_unknown_keys(tmp_path: Path) -> None:
    async with open_docker(tmp_path) as rig:
        keys = (
            "CheckDuplicate Driver Scope EnableIPv4 EnableIPv6 IPAM Internal Attachable Ingress ConfigOnly ConfigFrom"
        )
        nulls = dict.fromkeys([*keys.split(), "Options", "Labels", "Whatever"])
        await create(rig, "nulls", **nulls)
        await create(rig, "more", IPAM={"Driver": None, "Options": None, "Config": None})
        assert (await inspect(rig, "more"))["IPAM"]["Options"] is None
        await create(rig, "options", IPAM={"Options": {}})
        assert (await inspect(rig, "options"))["IPAM"]["Options"] == {}


async def test_configuration_networks(tmp_path: Path) -> None:
    async with open_docker(tmp_path) as rig:
        config = {"Config": [{"Subnet": "10.9.0.0/24"}]}
        await create(
            rig, "config", ConfigOnly=True, IPAM=config, Labels={"a": "b"}, Options={f"{PREFIX}driver.mtu": "1400"}
        )
        value = await inspect(rig, "config")
        assert (value["Driver"], value["ConfigOnly"], value["IPAM"]["Config"]) == ("null", True, config["Config"])
        await create(rig, "made", ConfigFrom={"Network": "config"}, Internal=True)
        value = await inspect(rig, "made")
        assert value["ConfigFrom"] == {"Network": "config"}
        assert (value["Labels"], value["IPAM"]["Config"]) == ({"a": "b"}, config["Config"])
        answer = await rig.docker("DELETE", "/networks/config")
        assert answer.message == 'error while removing network: configuration network "config" is in use'
        await rig.rig.guest("c1")
        answer = await rig.docker("POST", "/networks/config/connect", {"Container": "c1"})
        assert (answer.status, answer.message) == (403, "cannot create endpoint on configuration-only network")
        assert (await rig.docker("POST", "/networks/prune")).value == {"NetworksDeleted": ["made"]}
        assert (await rig.docker("DELETE", "/networks/config")).status == 204


async def test_bridge_names_are_unique(tmp_path: Path) -> None:
    async with open_docker(tmp_path) as rig:
        options = {f"{PREFIX}bridge.name": "br0"}
        first = await create(rig, "one", Options=options)
        answer = await rig.docker("POST", "/networks/create", {"Name": "two", "Options": options})
        assert answer.status == 403
        assert answer.message.endswith(f"conflicts with network {first} (br0): networks have same bridge name")


async def test_filters(tmp_path: Path) -> None:
    async with open_docker(tmp_path) as rig:
        one = await create(rig, "fa", Labels={"k": "v", "j": ""})
        await create(rig, "fab", Labels={"k": "w"})
        builtin, everything = ["bridge", "host", "none"], ["bridge", "fa", "fab", "host", "none"]
        for filters, expected in (
            ({"name": ["fa"]}, ["fa", "fab"]),
            ({"name": {"^fa$": True}}, ["fa"]),
            ({"name": []}, everything),
            ({"id": [one[:12]]}, ["fa"]),
            ({"driver": ["host", "null"]}, ["host", "none"]),
            ({"driver": ["br"]}, []),
            ({"scope": ["local"]}, everything),
            ({"scope": ["swarm"]}, []),
            ({"label": ["k=v"]}, ["fa"]),
            ({"label": ["k", "j="]}, ["fa"]),
            ({"type": ["custom"]}, ["fa", "fab"]),
            ({"type": ["builtin"]}, builtin),
            ({"dangling": ["true"]}, ["fa", "fab"]),
            ({"dangling": ["0"]}, builtin),
            ({"name": ["fa"], "driver": ["host"]}, []),
        ):
            assert await names(rig, filters) == expected, filters
        for filters, status, message in (
            ({"foo": ["x"]}, 400, "invalid filter 'foo'"),
            ({"type": ["x"]}, 500, "invalid filter: 'type'='x'"),
            (
                {"dangling": ["x"]},
                400,
                """invalid value for filter 'dangling', must be "true" (or "1"), or "false" (or "0")""",
            ),
            ({"dangling": ["0", "1"]}, 400, 'got more than one value for filter key "dangling"'),
        ):
            answer = await rig.docker("GET", f"/networks?filters={urllib.parse.quote(json.dumps(filters))}")
            assert (answer.status, answer.message) == (status, message)


async def test_who_is_there_is_told_by_inspect_only(tmp_path: Path) -> None:
    async with open_docker(tmp_path) as rig:
        await rig.rig.guest("c1")
        guest = rig.rig.fabric.desired.find_guest("c1")
        await create(
            rig, "app", EnableIPv6=True, IPAM={"Config": [{"Subnet": "10.8.0.0/24"}, {"Subnet": "fd00:8::/64"}]}
        )
        answer = await rig.docker("POST", "/networks/app/connect", {"Container": "c1"})
        assert (answer.status, answer.body, answer.headers["content-length"]) == (200, b"", "0")
        containers = (await inspect(rig, "app"))["Containers"]
        endpoint = containers[guest.id]
        assert endpoint | {"EndpointID": "", "MacAddress": ""} == {
            "Name": "c1",
            "EndpointID": "",
            "MacAddress": "",
            "IPv4Address": "10.8.0.2/24",
            "IPv6Address": "fd00:8::2/64",
        }
        assert endpoint["MacAddress"] == "02:42:0a:08:00:02"
        for version, expected in (("/v1.41", {}), ("/v1.28", {}), ("/v1.27", containers)):
            listed = (await rig.docker("GET", f'{version}/networks?filters={{"name":["app"]}}')).value
            assert listed[0]["Containers"] == expected
        answer = await rig.docker("DELETE", "/networks/app")
        assert answer.status == 403
        assert answer.message == (
            "error while removing network: network app has active endpoints "
            f'(name:"c1" id:"{endpoint["EndpointID"][:12]}")'
        )


async def test_find_by_id_name_and_prefix(tmp_path: Path) -> None:
    async with open_docker(tmp_path) as rig:
        ids = {await create(rig, f"n{number}") for number in range(20)}
        one = sorted(ids)[0]
        assert (await inspect(rig, one))["Id"] == (await inspect(rig, one[:20]))["Id"] == one
        everyone = {network["Id"] for network in (await rig.docker("GET", "/networks/")).value}
        ambiguous, count = next(
            (digit, count)
            for digit in "0123456789abcdef"
            if (count := sum(one.startswith(digit) for one in everyone)) > 1
        )
        answer = await rig.docker("GET", f"/networks/{ambiguous}")
        matches = f"{count} matches found based on ID prefix"
        assert (answer.status, answer.message) == (400, f"{matches}: network {ambiguous} is ambiguous")
        answer = await rig.docker("DELETE", f"/networks/{ambiguous}")
        assert (answer.status, answer.message) == (400, f"network {ambiguous} is ambiguous ({matches})")
        for path in ("nope", "nope%2Fx", "bridge?scope=swarm", "BRIDGE"):
            assert (await rig.docker("GET", f"/networks/{path}")).status == 404
        answer = await rig.docker("GET", "/networks/bridge?verbose=x")
        assert answer.message == 'invalid value for verbose: x: strconv.ParseBool: parsing "x": invalid syntax'


STATIC = "user specified IP address is supported only when connecting to networks with user configured subnets"


@pytest.mark.parametrize(
    ("network", "body", "status", "message"),
    [
        ("auto", {}, 400, 'invalid name or ID supplied: ""'),
        ("nope", {"Container": "nope"}, 404, "No such container: nope"),
        ("nope", {"Container": "c1"}, 404, "network nope not found"),
        ("auto", {"Container": "c2"}, 403, "endpoint with name c2 already exists in network auto"),
        (
            "host",
            {"Container": "c1"},
            400,
            "container cannot be disconnected from host network or connected to host network",
        ),
        (
            "none",
            {"Container": "c1"},
            400,
            "container cannot be connected to multiple networks with one of the networks in private (none) mode",
        ),
        (
            "auto",
            {"Container": "c1", "EndpointConfig": {"IPAMConfig": {"IPv4Address": "10.1.1.1"}}},
            400,
            f"invalid endpoint settings:\n{STATIC}",
        ),
        (
            "given",
            {"Container": "c1", "EndpointConfig": {"IPAMConfig": {"IPv4Address": "10.1.1.1"}}},
            400,
            "invalid endpoint settings:\nno configured subnet or ip-range contain the IP address 10.1.1.1",
        ),
        (
            "given",
            {"Container": "c1", "EndpointConfig": {"IPAMConfig": {"IPv4Address": "10.7.0.9"}}},
            403,
            "Address already in use",
        ),
        (
            "bridge",
            {"Container": "c1", "EndpointConfig": {"Aliases": ["x"]}},
            400,
            "invalid endpoint settings:\n"
            "network-scoped alias is supported only for containers in user defined networks",
        ),
        ("given", {"Container": "c1", "EndpointConfig": {"MacAddress": "x"}}, 400, "invalid MAC address x"),
        ("given", {"Container": "c1", "EndpointConfig": {"Links": ["a:b:c"]}}, 500, "bad format for links: a:b:c"),
    ],
)
async def test_who_cannot_connect(tmp_path: Path, network: str, body: Any, status: int, message: str) -> None:
    async with open_docker(tmp_path) as rig:
        for name in ("c1", "c2"):
            await rig.rig.guest(name)
        await create(rig, "auto")
        await create(rig, "given", IPAM={"Config": [{"Subnet": "10.7.0.0/24"}]})
        await rig.docker("POST", "/networks/auto/connect", {"Container": "c2"})
        address = {"IPAMConfig": {"IPv4Address": "10.7.0.9"}}
        await rig.docker("POST", "/networks/given/connect", {"Container": "c2", "EndpointConfig": address})
        with unchanged(rig.rig):
            answer = await rig.docker("POST", f"/networks/{network}/connect", body)
        assert (answer.status, answer.message) == (status, message)


async def test_disconnect(tmp_path: Path) -> None:
    async with open_docker(tmp_path) as rig:
        await rig.rig.guest("c1")
        guest = rig.rig.fabric.desired.find_guest("c1")
        await create(rig, "app")
        await rig.docker("POST", "/networks/app/connect", {"Container": "c1"})
        assert (await rig.docker("POST", "/networks/app/disconnect", {"Container": "c1"})).status == 200
        for body, status, message in (
            ({"Container": "c1"}, 500, f"container {guest.id} is not connected to network app"),
            ({"Container": "c1", "Force": True}, 500, f"container {guest.id} is not connected to network app"),
            ({"Container": "nope"}, 404, "No such container: nope"),
            ({"Container": "nope", "Force": True}, 404, "endpoint nope not found"),
            ({"Force": True}, 400, "invalid name: name is empty"),
            ({}, 400, 'invalid name or ID supplied: ""'),
        ):
            answer = await rig.docker("POST", "/networks/app/disconnect", body)
            assert (answer.status, answer.message) == (status, message)


async def test_prune(tmp_path: Path) -> None:
    async with open_docker(tmp_path) as rig:
        await rig.rig.guest("c1")
        for name, labels in (("used", {}), ("kept", {"keep": ""}), ("old", {"k": "v"})):
            await create(rig, name, Labels=labels)
        await rig.docker("POST", "/networks/used/connect", {"Container": "c1"})

        async def prune(filters: object) -> Any:
            return await rig.docker("POST", f"/networks/prune?filters={urllib.parse.quote(json.dumps(filters))}")

        assert (await prune({"until": ["1h"]})).value == {"NetworksDeleted": None}
        assert (await prune({"label": ["nope"]})).value == {"NetworksDeleted": None}
        assert (await prune({"label!": ["keep"]})).value == {"NetworksDeleted": ["old"]}
        for filters, message in (
            ({"until": ["x"]}, 'failed to parse value as time or duration: "x"'),
            ({"until": ["1h", "2h"]}, "more than one until filter specified"),
            ({"name": ["x"]}, "invalid filter 'name'"),
        ):
            answer = await prune(filters)
            assert (answer.status, answer.message) == (400, message)
        assert (await prune({})).value == {"NetworksDeleted": ["kept"]}
        assert await names(rig, {"type": ["custom"]}) == ["used"]


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("/networks/create", "network.CreateRequest"),
        ("/networks/bridge/connect", "network.ConnectOptions"),
        ("/networks/bridge/disconnect", "network.DisconnectOptions"),
    ],
)
async def test_bodies(tmp_path: Path, path: str, shape: str) -> None:
    async with open_docker(tmp_path) as rig:
        with unchanged(rig.rig):
            for raw, content_type, message in (
                (b"{}", "text/plain", "unsupported Content-Type header (text/plain): must be 'application/json'"),
                (b"{", "application/json", "invalid JSON: unexpected EOF"),
                (
                    b"[]",
                    "application/json",
                    f"invalid JSON: json: cannot unmarshal array into Go value of type {shape}",
                ),
                (b"{} x", "application/json; charset=utf-8", "unexpected content after JSON"),
                (b" ", "application/json", "invalid JSON: got EOF while reading request body"),
            ):
                answer = await rig.docker("POST", path, raw=raw, headers={"Content-Type": content_type})
                assert (answer.status, answer.message) == (400, message)
            assert (await rig.docker("POST", path, raw=b"")).status == 400


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({"Name": 5}, "number into Go struct field CreateRequest.Name of type string"),
        ({"CheckDuplicate": "x"}, "string into Go struct field CreateRequest.CheckDuplicate of type bool"),
        ({"EnableIPv6": "x"}, "string into Go struct field CreateRequest.CreateOptions.EnableIPv6 of type bool"),
        ({"IPAM": 5}, "number into Go struct field CreateRequest.CreateOptions.IPAM of type network.IPAM"),
        (
            {"IPAM": {"Config": [{"Subnet": 5}]}},
            "number into Go struct field IPAMConfig.CreateOptions.IPAM.Config.Subnet of type string",
        ),
    ],
)
async def test_wrong_types(tmp_path: Path, body: object, where: str) -> None:
    async with open_docker(tmp_path) as rig:
        answer = await rig.docker("POST", "/networks/create", body)
        assert (answer.status, answer.message) == (400, f"invalid JSON: json: cannot unmarshal {where}")


async def test_the_real_cli(tmp_path: Path) -> None:
    async with open_docker(tmp_path) as rig:
        docker_cli = rig.docker.cli
        await rig.rig.guest("web")
        created = await docker_cli("network", "create", "--subnet", "10.6.0.0/24", "--label", "a=b", "app")
        assert len(created.stdout) == 64
        listed = await docker_cli(
            "network", "ls", "--filter", "label=a", "--format", "{{.Name}} {{.Driver}} {{.Scope}}"
        )
        assert listed.stdout == "app bridge local"
        await docker_cli("network", "connect", "--ip", "10.6.0.9", "--alias", "www", "app", "web")
        inspected = json.loads((await docker_cli("network", "inspect", "app")).stdout)[0]
        assert [one["IPv4Address"] for one in inspected["Containers"].values()] == ["10.6.0.9/24"]
        again = await docker_cli("network", "connect", "app", "web", check=False)
        assert again.returncode == 1
        assert again.stderr == "Error response from daemon: endpoint with name web already exists in network app"
        assert "has active endpoints" in (await docker_cli("network", "rm", "app", check=False)).stderr
        await docker_cli("network", "disconnect", "app", "web")
        assert (await docker_cli("network", "prune", "--force")).stdout == "Deleted Networks:\napp"
        missing = await docker_cli("network", "inspect", "app", check=False)
        assert (missing.returncode, missing.stdout) == (1, "[]")


async def _docker_py(rig: DockerRig, use: Callable[[docker.DockerClient], None]) -> None:
    def run() -> None:
        client = docker.DockerClient(base_url=f"unix://{rig.docker.path}")
        try:
            use(client)
        finally:
            client.close()

    await trio.to_thread.run_sync(run)


async def test_docker_py(tmp_path: Path) -> None:
    def use(client: docker.DockerClient) -> None:
        assert client.ping()
        assert client.version()["ApiVersion"] == "1.51"
        pool = docker.types.IPAMPool(subnet="10.5.0.0/24", gateway="10.5.0.1", iprange="10.5.0.128/25")
        network = client.networks.create(
            "app", driver="bridge", ipam=docker.types.IPAMConfig(pool_configs=[pool]), labels={"a": "b"}, internal=True
        )
        assert network.name == "app" and network.attrs["Internal"]
        assert [one.id for one in client.networks.list(names=["^app$"])] == [network.id]
        assert client.networks.list(filters={"label": "a=b"}) == [network]
        network.connect("web", aliases=["www"], ipv4_address="10.5.0.7")
        network.reload()
        assert [one["IPv4Address"] for one in network.attrs["Containers"].values()] == ["10.5.0.7/24"]
        with pytest.raises(docker.errors.APIError) as caught:
            network.connect("web")
        assert caught.value.status_code == 403
        with pytest.raises(docker.errors.NotFound):
            client.networks.get("nope")
        network.disconnect("web")
        network.remove()
        client.networks.create("unused")
        assert client.networks.prune()["NetworksDeleted"] == ["unused"]

    async with open_docker(tmp_path) as rig:
        await rig.rig.guest("web")
        await _docker_py(rig, use)


async def test_many_at_once(tmp_path: Path) -> None:
    async with open_docker(tmp_path) as rig:
        await rig.rig.guest("c1")
        statuses: list[int] = []

        async def one(method: str, target: str, body: object = None) -> None:
            statuses.append((await rig.docker(method, target, body)).status)

        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(one, "POST", "/networks/create", {"Name": f"n{number % 4}"})
        assert sorted(statuses) == [201] * 4 + [409] * 4
        statuses.clear()
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(one, "POST", f"/networks/n{number % 4}/connect", {"Container": "c1"})
        assert sorted(statuses) == [200] * 4 + [403] * 4
