"""Requests as no client sends them: bodies, types, routes, versions, filters, headers."""

from __future__ import annotations

import json
from urllib.parse import quote

from script import Scenario

SCENARIOS: list[Scenario] = []


def scenario(name: str) -> Scenario:
    made = Scenario(name)
    SCENARIOS.append(made)
    return made


def filters(value: object) -> str:
    return quote(value if isinstance(value, str) else json.dumps(value))


JSON = ("content-type",)
s = scenario("system routes")
s.api("GET", "/_ping", show=("content-type", "cache-control", "pragma", "ostype", "swarm", "content-length"))
s.api("HEAD", "/_ping", show=("content-type", "cache-control", "pragma", "ostype", "swarm"))
s.api("GET", "/_ping", version="", show=("content-type",))
s.api("POST", "/_ping")
s.api("GET", "/version", show=JSON, silent=True)
s.api("GET", "/info", show=JSON, silent=True)
s.api("GET", "/nosuch", show=JSON)
s.api("GET", "/", version="")
s.api("GET", "/v1.41", version="")
s.api("GET", "/networks/", show=JSON, silent=True)
s.api("GET", "/networks//x")
s.api("DELETE", "/networks")
s.api("PUT", "/networks/create", {})
s.api("PATCH", "/networks/bridge")
s.api("POST", "/networks")
s.api("POST", "/networks/bridge/nosuch", {})
for version in ("v1.24", "v1.30", "v1.40", "v1.41"):
    s.api("GET", "/networks/none", version=version)
    s.api("GET", "/containers/json", version=version)
for version in ("v1.11", "v1.5", "v0.1", "v9.99", "v2.0", "v1", "vx", "v1.2.3"):
    s.api("GET", "/networks", version=version)
    s.api("GET", "/_ping", version=version)

s = scenario("network list, raw")
s.cli("network create --label a=1 one", capture="one")
s.cli("network create two")
s.api("GET", "/networks", show=JSON)
for value in (
    {"name": ["one"]},
    {"name": {"one": True}},
    {"name": {"one": False}},
    {"name": "one"},
    {"name": [1]},
    {"name": []},
    {},
    {"driver": ["bridge"]},
    {"driver": ["bridge"], "name": ["one"]},
    {"id": ["<one>"]},
    {"type": ["custom"]},
    {"type": ["builtin"]},
    {"type": ["custom", "builtin"]},
    {"type": ["x"]},
    {"scope": ["local"]},
    {"scope": ["x"]},
    {"label": ["a"]},
    {"label": ["a=1"]},
    {"label": ["a=2"]},
    {"dangling": ["1"]},
    {"dangling": ["0"]},
    {"dangling": ["true"]},
    {"dangling": ["x"]},
    {"dangling": ["true", "false"]},
    {"nonsense": ["1"]},
    [],
    7,
    "nonsense",
    "",
    "{",
    "null",
):
    text = filters(value).replace("%3Cone%3E", "<one>")
    s.api("GET", f"/networks?filters={text}")
s.api("GET", "/networks?filters=%zz")
s.api("GET", "/networks?nonsense=1", silent=True)

s = scenario("network inspect, raw")
s.cli("network create one", capture="one")
s.cli("network create --subnet 10.51.0.0/24 two", capture="two")
s.api("GET", "/networks/one", show=JSON)
s.api("GET", "/networks/<one>")
s.api("GET", "/networks/<one:12>")
s.api("GET", "/networks/ONE")
s.api("GET", "/networks/nosuch", show=JSON)
s.api("GET", "/networks/one?scope=local")
s.api("GET", "/networks/one?scope=swarm")
s.api("GET", "/networks/one?scope=nonsense")
s.api("GET", "/networks/one?verbose=true")
s.api("GET", "/networks/one?verbose=nonsense")
s.api("GET", "/networks/one?verbose=")
s.api("GET", "/networks/%6fne")
s.api("GET", "/networks/o%2Fne")
s.api("GET", "/networks/bridge")
s.api("HEAD", "/networks/one")

s = scenario("network create, raw")
s.api("POST", "/networks/create", {"Name": "n1"}, show=JSON, capture="n1", capture_path=("Id",))
s.api("POST", "/networks/create", {"Name": "n1"}, show=JSON)
s.api("POST", "/networks/create", {"Name": "n1", "CheckDuplicate": True})
s.api("POST", "/networks/create", {"Name": "n2", "CheckDuplicate": True})
s.api("POST", "/networks/create", {"name": "n3", "DRIVER": "bridge", "labels": {"a": "1"}})
s.api("GET", "/networks/n3")
s.api("POST", "/networks/create", {"Name": "n4", "Nonsense": 1})
s.api("POST", "/networks/create")
s.api("POST", "/networks/create", raw=b"")
s.api("POST", "/networks/create", raw=b"{")
s.api("POST", "/networks/create", raw=b"nonsense")
s.api("POST", "/networks/create", raw=b"[]")
s.api("POST", "/networks/create", raw=b"null")
s.api("POST", "/networks/create", raw=b'"text"')
s.api("POST", "/networks/create", raw=b"7")
s.api("POST", "/networks/create", raw=b'{"Name": "n5"} trailing')
s.api("POST", "/networks/create", raw=b'{"Name": "n6"}{"Name": "n7"}')
s.api("POST", "/networks/create", raw=b'{"Name": "n8", "Name": "n9"}')
s.api("POST", "/networks/create", raw=b'{"Name": "\xff\xfe"}')
s.api("POST", "/networks/create", raw=b"\x00\x01")
s.api("POST", "/networks/create", raw=b'{"Name": "na"}', headers={"Content-Type": "text/plain"})
s.api("POST", "/networks/create", raw=b'{"Name": "nb"}', headers={"Content-Type": "application/json; charset=utf-8"})
s.api("POST", "/networks/create", raw=b'{"Name": "nc"}', headers={"Content-Type": "APPLICATION/JSON"})
s.api("POST", "/networks/create", raw=b'{"Name": "nd"}', headers={"Content-Type": ""})
s.api("POST", "/networks/create", {})
s.api("POST", "/networks/create", {"Name": ""})
s.api("POST", "/networks/create", {"Name": " "})
s.api("POST", "/networks/create", {"Name": 7})
s.api("POST", "/networks/create", {"Name": None})
s.api("POST", "/networks/create", {"Name": ["x"]})
for number, (key, value) in enumerate(
    [
        ("Internal", "yes"),
        ("Internal", None),
        ("Internal", 1),
        ("Driver", 7),
        ("Driver", ""),
        ("Driver", None),
        ("Labels", []),
        ("Labels", {"a": 1}),
        ("Labels", None),
        ("Labels", {}),
        ("Options", "x"),
        ("Options", {"a": 1}),
        ("Options", None),
        ("IPAM", "x"),
        ("IPAM", None),
        ("IPAM", {}),
        ("IPAM", {"Config": None}),
        ("IPAM", {"Config": []}),
        ("IPAM", {"Config": [{}]}),
        ("IPAM", {"Config": {}}),
        ("IPAM", {"Config": [None]}),
        ("IPAM", {"Config": [{"Subnet": 7}]}),
        ("IPAM", {"Config": [{"Subnet": "x"}]}),
        ("IPAM", {"Driver": "default"}),
        ("IPAM", {"Driver": ""}),
        ("IPAM", {"Options": {"a": "b"}}),
        ("IPAM", {"Options": None}),
        ("IPAM", {"Config": [{"Subnet": "10.52.0.0/24", "Nonsense": 1}]}),
        ("EnableIPv6", True),
        ("EnableIPv6", "x"),
        ("EnableIPv6", False),
        ("Attachable", True),
        ("Ingress", True),
        ("ConfigOnly", True),
        ("ConfigFrom", {"Network": "nosuch"}),
        ("ConfigFrom", {}),
        ("Scope", "local"),
        ("Scope", "swarm"),
        ("Scope", "nonsense"),
        ("CheckDuplicate", "x"),
        (
            "IPAM",
            {"Config": [{"Subnet": "10.53.0.0/24", "Gateway": "10.53.0.9", "AuxiliaryAddresses": {"x": "10.53.0.10"}}]},
        ),
        ("IPAM", {"Config": [{"Gateway": "10.53.0.9"}]}),
        ("IPAM", {"Config": [{"IPRange": "10.53.0.0/24"}]}),
        ("IPAM", {"Config": [{"Subnet": "10.54.0.0/24", "IPRange": "10.55.0.0/24"}]}),
        ("IPAM", {"Config": [{"Subnet": "10.54.0.0/24", "AuxiliaryAddresses": []}]}),
        ("Options", {"com.docker.network.generic": "x"}),
        ("Options", {"com.docker.network.driver.mtu": ""}),
    ]
):
    s.api("POST", "/networks/create", {"Name": f"field{number}", key: value})
    s.api("GET", f"/networks/field{number}")
    s.api("DELETE", f"/networks/field{number}", ignored=True)

s = scenario("network delete and prune, raw")
s.api("POST", "/networks/create", {"Name": "n1"}, silent=True)
s.api("DELETE", "/networks/n1", show=JSON)
s.api("DELETE", "/networks/n1", show=JSON)
s.api("DELETE", "/networks/bridge")
s.api("DELETE", "/networks/")
s.api("POST", "/networks/prune")
s.api("POST", "/networks/create", {"Name": "n1", "Labels": {"a": "1"}}, silent=True)
s.api("POST", "/networks/create", {"Name": "n2"}, silent=True)
for value in (
    {"nonsense": ["1"]},
    {"until": ["x"]},
    {"until": ["1h", "2h"]},
    {"until": ["1h"]},
    {"label": ["b"]},
    {"label": "b"},
    "{",
    [],
    {"label": ["a=1"]},
    {"label!": ["b"]},
):
    s.api("POST", f"/networks/prune?filters={filters(value)}")
s.api("POST", "/networks/prune", raw=b"ignored?")
s.api("GET", "/networks/prune")

s = scenario("network connect and disconnect, raw")
s.cli("network create one", capture="one")
s.cli("network create --subnet 10.56.0.0/24 two", capture="two")
s.cli("network create --ipv6 --subnet 10.57.0.0/24 --subnet fd00:57::/64 six", capture="six")
s.run("--name web --network one", capture="web")
s.api("POST", "/networks/two/connect", {"Container": "web"}, show=JSON)
s.api("POST", "/networks/two/connect", {"Container": "web"}, show=JSON)
s.api("POST", "/networks/two/disconnect", {"Container": "web"}, show=JSON)
s.api("POST", "/networks/two/disconnect", {"Container": "web"}, show=JSON)
s.api("POST", "/networks/two/disconnect", {"Container": "web", "Force": True})
s.api("POST", "/networks/two/disconnect", {"Container": "nosuch"})
s.api("POST", "/networks/two/disconnect", {"Container": "nosuch", "Force": True})
s.api("POST", "/networks/nosuch/disconnect", {"Container": "web"})
s.api("POST", "/networks/nosuch/connect", {"Container": "web"})
s.api("POST", "/networks/two/connect", {"Container": "nosuch"})
for action in ("connect", "disconnect"):
    for raw in (
        None,
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"Container": ""}',
        b'{"Container": 7}',
        b'{"Container": null}',
        b'{"Container": "web"} trailing',
    ):
        s.api("POST", f"/networks/two/{action}", raw=raw)
    s.api("POST", f"/networks/two/{action}", raw=b"{}", headers={"Content-Type": "text/plain"})
for config in (
    {"IPAMConfig": {"IPv4Address": "10.56.0.9"}},
    {"IPAMConfig": {"IPv4Address": "10.58.0.9"}},
    {"IPAMConfig": {"IPv4Address": "x"}},
    {"IPAMConfig": {"IPv6Address": "fd00::9"}},
    {"IPAMConfig": {"IPv6Address": "x"}},
    {"IPAMConfig": {"LinkLocalIPs": ["169.254.7.7"]}},
    {"IPAMConfig": {"LinkLocalIPs": ["x"]}},
    {"IPAMConfig": None},
    {"IPAMConfig": {}},
    {"IPAMConfig": "x"},
    {"Aliases": ["x", "y"]},
    {"Aliases": "x"},
    {"Aliases": None},
    {"Aliases": []},
    {"Links": ["web:x"]},
    {"Links": "x"},
    {"Links": ["nosuch:x"]},
    {"DriverOpts": {"a": "b"}},
    {"DriverOpts": {"a": 1}},
    {"DriverOpts": None},
    {"IPAddress": "10.56.0.44"},
    {"NetworkID": "x", "EndpointID": "y"},
    {"Nonsense": 1},
    "x",
    None,
    [],
    {"IPAMConfig": {"IPv4Address": "10.56.0.1"}},
    {"IPAMConfig": {"IPv4Address": "10.56.0.0"}},
    {"IPAMConfig": {"IPv4Address": "10.56.0.256"}},
    {"IPAMConfig": {"IPv4Address": "fd00::1"}},
    {"IPAMConfig": {"IPv4Address": "10.56.0.9/24"}},
):
    s.api("POST", "/networks/two/connect", {"Container": "web", "EndpointConfig": config})
    s.cli("inspect web --format '{{json .NetworkSettings.Networks.two}}'")
    s.api("POST", "/networks/two/disconnect", {"Container": "web", "Force": True}, ignored=True)
s.api(
    "POST",
    "/networks/six/connect",
    {"Container": "web", "EndpointConfig": {"IPAMConfig": {"IPv6Address": "fd00:57::9"}}},
)
s.cli("inspect web --format '{{json .NetworkSettings.Networks.six}}'")
s.api("POST", "/networks/one/connect", {"Container": "<web>"})
s.api("POST", "/networks/<one>/disconnect", {"Container": "<web:12>"})

s = scenario("containers, raw")
s.api(
    "POST",
    "/containers/create?name=web",
    {"Image": "box", "Cmd": ["sleep", "86400"]},
    capture="web",
    capture_path=("Id",),
    show=JSON,
)
s.api("POST", "/containers/create?name=web", {"Image": "box"}, show=JSON)
s.api("POST", "/containers/create?name=!", {"Image": "box", "Cmd": ["true"]})
s.api("POST", "/containers/create?name=x1", {"Image": "nosuch", "Cmd": ["true"]})
s.api("POST", "/containers/create?name=x2", {"Image": "", "Cmd": ["true"]})
s.api("DELETE", "/containers/x2", ignored=True)
s.api("POST", "/containers/create?name=x3", {})
s.api("POST", "/containers/create?name=x4")
s.api("POST", "/containers/create?name=x5", raw=b"{")
s.api("POST", "/containers/create?name=x6", {"Image": "box"})
s.api("POST", "/containers/create?name=x7", {"Image": "box", "Cmd": "sleep 1"}, silent=True)
s.api("POST", "/containers/create?name=x8", {"Image": "box", "Cmd": 7})
s.api(
    "POST",
    "/containers/create?name=x9",
    {"Image": "box", "Cmd": ["true"], "HostConfig": {"NetworkMode": "nosuch"}},
    silent=True,
)
s.api("POST", "/containers/x9/start")
s.api(
    "POST",
    "/containers/create?name=x10",
    {"Image": "box", "Cmd": ["true"], "HostConfig": {"PortBindings": {"x": [{}]}}},
)
s.api(
    "POST",
    "/containers/create?name=x11",
    {"Image": "box", "Cmd": ["true"], "HostConfig": {"PortBindings": {"80/tcp": [{"HostPort": "x"}]}}},
)
s.api("POST", "/containers/create?name=x12", {"Image": "box", "Cmd": ["true"], "ExposedPorts": {"x": {}}})
s.api("POST", "/containers/create?name=x13", {"Image": "box", "Cmd": ["true"], "Env": "A=1"})
s.api(
    "POST",
    "/containers/create?name=x14",
    {"Image": "box", "Cmd": ["true"], "NetworkingConfig": {"EndpointsConfig": {"bridge": {}, "host": {}}}},
    silent=True,
)
s.api(
    "POST",
    "/containers/create?name=x15",
    {"Image": "box", "Cmd": ["true"], "HostConfig": {"NetworkMode": "container:nosuch"}},
)
s.api("POST", "/containers/x15/start")
s.api("POST", "/containers/web/start", show=JSON)
s.api("POST", "/containers/web/start", show=JSON)
s.api("POST", "/containers/web/start", {})
s.api("POST", "/containers/nosuch/start")
s.api("GET", "/containers/web/json?size=x")
s.api("GET", "/containers/nosuch/json")
s.api("GET", "/containers/json?all=x", silent=True)
s.api("GET", "/containers/json?limit=x")
s.api("GET", "/containers/json?all=1&size=0")
for value in (
    {"name": ["web"]},
    {"id": ["<web>"]},
    {"status": ["running"]},
    {"status": ["x"]},
    {"network": ["bridge"]},
    {"label": ["x"]},
    {"exited": ["x"]},
    {"before": ["nosuch"]},
    {"since": ["nosuch"]},
    {"nonsense": ["x"]},
    "{",
    {"is-task": ["x"]},
    {"publish": ["x"]},
    {"health": ["none"]},
    {"health": ["x"]},
    {"volume": ["x"]},
    {"ancestor": ["nosuch"]},
):
    s.api("GET", f"/containers/json?filters={filters(value).replace('%3Cweb%3E', '<web>')}")
s.api("POST", "/containers/web/exec", {"Cmd": ["true"]}, silent=True, capture="exec", capture_path=("Id",))
s.api("GET", "/exec/<exec>/json", silent=True)
s.api("POST", "/exec/<exec>/start", {"Detach": True})
s.api("POST", "/exec/<exec>/start", {"Detach": True}, silent=True)
s.api("GET", "/exec/nosuch/json")
s.api("POST", "/exec/nosuch/start", {"Detach": True})
s.api("POST", "/containers/web/exec", {"Cmd": []})
s.api("POST", "/containers/web/exec", {})
s.api("POST", "/containers/web/exec")
s.api("POST", "/containers/nosuch/exec", {"Cmd": ["true"]})
s.api("POST", "/containers/web/rename")
s.api("POST", "/containers/web/rename?name=")
s.api("POST", "/containers/web/rename?name=/web2")
s.api("POST", "/containers/web2/rename?name=web")
s.api("POST", "/containers/web/kill?signal=x")
s.api("POST", "/containers/web/kill?signal=0", silent=True)
s.api("POST", "/containers/web/kill?signal=SIGUSR2")
s.api("POST", "/containers/web/resize?h=10&w=10", silent=True)
s.api("POST", "/containers/web/resize?h=x&w=10")
s.api("POST", "/containers/web/stop?t=x", silent=True)
s.api("POST", "/containers/web/stop?t=0")
s.api("POST", "/containers/web/stop?t=0")
s.api("POST", "/containers/web/wait")
s.api("POST", "/containers/nosuch/wait")
s.api("GET", "/containers/web/logs")
s.api("GET", "/containers/web/logs?stdout=1&tail=x")
s.api("GET", "/containers/web/logs?stdout=1&since=x")
s.api("GET", "/containers/nosuch/logs?stdout=1")
s.api("GET", "/containers/web/top")
s.api("POST", "/containers/web/pause")
s.api("DELETE", "/containers/web?force=x", silent=True)
s.api("DELETE", "/containers/web")
s.api("DELETE", "/containers/web")
s.api("DELETE", "/containers/")
s.api("POST", "/containers/prune?filters=" + filters({"label": ["nosuch"]}))
s.api("POST", "/containers/prune?filters=" + filters({"nonsense": ["x"]}))

s = scenario("events, raw")
s.api("GET", "/events?since=0&until=x")
s.api("GET", "/events?since=x&until=1")
s.api("GET", "/events?until=1&filters=%7B")
s.api("GET", "/events?since=9&until=1")
