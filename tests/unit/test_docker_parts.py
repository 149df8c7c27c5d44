"""Parts of Docker's API without a server: filters, versions, paths, queries, times, checks."""

from __future__ import annotations

import datetime
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_bridge.docker_api import endpoints, ipam
from host_bridge.docker_api.errors import DockerError
from host_bridge.docker_api.filters import Filters
from host_bridge.docker_api.http import Request, json_line, parse_query, unquote_path
from host_bridge.docker_api.router import Router, clean_path, parse_version, split_version
from host_bridge.docker_api.times import TimeError, parse_duration, parse_moment
from host_bridge.model import NetworkRecord, SubnetRecord

SECOND = 10**9


# Filters


@pytest.mark.parametrize("text", ['{"name":["a","b"]}', '{"name":{"a":true,"b":true}}'])
def test_filters_in_both_forms(text: str) -> None:
    filters = Filters.parse(text)
    assert filters.get("name") == ("a", "b")
    assert "name" in filters and "id" not in filters and bool(filters)


@pytest.mark.parametrize("text", ["", "null", "{}"])
def test_no_filters(text: str) -> None:
    filters = Filters.parse(text)
    assert not filters and filters.exact("name", "x") and filters.match("name", "x") and filters.labels("label", {})


@pytest.mark.parametrize("text", ["x", "[]", "5", '{"a"', '{"name":"a"}', '{"name":[5]}', '{"name":{"a":"b"}}'])
def test_broken_filters(text: str) -> None:
    with pytest.raises(DockerError) as caught:
        Filters.parse(text)
    assert (caught.value.status, caught.value.message) == (400, "invalid filter")


def test_unknown_keys() -> None:
    with pytest.raises(DockerError, match="invalid filter 'foo'"):
        Filters({"foo": []}).check_keys({"name"})


@pytest.mark.parametrize(
    ("value", "source", "matches"),
    [
        ("fa", "fab", True),
        ("^fa$", "fab", False),
        ("^fa$", "fa", True),
        ("f.b", "fab", True),
        ("FA", "fa", False),
        ("(?i)FA", "fa", True),
        ("[", "[", True),
        ("[", "a", False),
        ("", "a", True),
        (r"(a)\1", "aa", False),
        ("(?=a)", "a", False),
        ("(a+)+$", "a" * 60 + "b", False),
        ("^(ab)+$", "abab", True),
        ("a|b", "b", True),
    ],
)
def test_names_match_by_equality_or_expression(value: str, source: str, matches: bool) -> None:
    assert Filters({"name": [value]}).match("name", source) is matches


def test_a_value_that_is_false_equals_nothing() -> None:
    filters = Filters({"driver": {"bridge": False}, "name": {"fa": False}})
    assert not filters.exact("driver", "bridge")
    assert filters.match("name", "fa")


@pytest.mark.parametrize(
    ("wanted", "matches"),
    [(["k"], True), (["k=v"], True), (["k=w"], False), (["k", "j="], True), (["k=v", "x"], False), (["j=1"], False)],
)
def test_labels(wanted: list[str], matches: bool) -> None:
    assert Filters({"label": wanted}).labels("label", {"k": "v", "j": ""}) is matches


@given(st.text(), st.text(max_size=64))
def test_any_expression_is_answered(value: str, source: str) -> None:
    assert Filters({"name": [value]}).match("name", source) in (True, False)


@given(st.dictionaries(st.text(), st.lists(st.text())))
def test_filters_keep_their_values(values: dict[str, list[str]]) -> None:
    filters = Filters.parse(json.dumps(values))
    assert {key: set(filters.get(key)) for key in values} == {key: set(given) for key, given in values.items()}


# Versions and paths


@pytest.mark.parametrize(
    ("text", "version"),
    [("1.41", (1, 41)), ("1.41.1", (1, 41, 1)), ("1", (1, 0)), ("1.41.0", (1, 41)), ("..", (0, 0)), ("1.", (1, 0))],
)
def test_versions(text: str, version: tuple[int, ...]) -> None:
    assert parse_version(text) == version


@given(st.integers(0, 99), st.integers(0, 99), st.integers(0, 99), st.integers(0, 99))
def test_versions_compare_as_numbers(a: int, b: int, c: int, d: int) -> None:
    assert (parse_version(f"{a}.{b}") < parse_version(f"{c}.{d}")) is ((a, b) < (c, d))


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("/v1.41/networks", ("1.41", "/networks")),
        ("/networks", (None, "/networks")),
        ("/v/networks", (None, "/v/networks")),
        ("/vx/networks", (None, "/vx/networks")),
        ("/v1.41", (None, "/v1.41")),
        ("/v1.41/", ("1.41", "/")),
    ],
)
def test_version_prefixes(path: str, parts: tuple[str | None, str]) -> None:
    assert split_version(path) == parts


@pytest.mark.parametrize(
    ("path", "clean"),
    [("", "/"), ("/", "/"), ("//a", "/a"), ("/a//b/", "/a/b/"), ("/a/../b", "/b"), ("/a/./b", "/a/b"), ("/..", "/")],
)
def test_clean_paths(path: str, clean: str) -> None:
    assert clean_path(path) == clean


@given(st.text(alphabet="/.ab", max_size=20))
def test_cleaning_ends(path: str) -> None:
    assert clean_path(clean_path(path)) == clean_path(path)


async def _nothing(request: Request) -> Any:
    raise NotImplementedError


def test_the_first_route_that_fits() -> None:
    router = Router()
    router.add("GET", "/networks/{id:.+}", _nothing)
    router.add("GET", "/c/{name}/json", _nothing)
    found = router.find("GET", "/networks/a/b")
    assert found is not None and found.params == {"id": "a/b"}
    assert router.find("GET", "/c/a/b/json") is None
    assert router.find("POST", "/networks/a") is None


@given(st.dictionaries(st.text(min_size=1), st.text(), max_size=5))
def test_queries_are_read_as_they_were_written(values: dict[str, str]) -> None:
    import urllib.parse

    text = urllib.parse.urlencode(values)
    assert parse_query(text) == ({key: [value] for key, value in values.items()}, "")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("filters=%zz", 'invalid URL escape "%zz"'),
        ("a=%", 'invalid URL escape "%"'),
        ("filters=a;b", "invalid semicolon separator in query"),
    ],
)
def test_broken_queries(text: str, problem: str) -> None:
    assert parse_query(f"ok=1&{text}") == ({"ok": ["1"]}, problem)


def test_paths_are_unquoted_once() -> None:
    assert unquote_path("/a%2520%2Fb") == "/a%20/b"
    assert unquote_path("/a%zz") is None


@pytest.mark.parametrize(
    ("query", "value"), [({"x": ["1"]}, True), ({"x": ["False"]}, False), ({"x": [""]}, False), ({"x": ["x"]}, True)]
)
def test_flags(query: dict[str, list[str]], value: bool) -> None:
    assert Request(method="GET", path="/", version=(1, 41), query=query).flag("x") is value


@given(st.text())
def test_answers_are_utf8_lines(text: str) -> None:
    line = json_line({"a": text})
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    line.decode("utf-8")


# Times


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1h30m", 5400), ("1.5h", 5400), ("-10s", -10), ("100ms", 0.1), ("1us", 1e-6), ("0", 0), (".5s", 0.5)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == round(seconds * SECOND)


@pytest.mark.parametrize("text", ["", "1", "h", "1h30", ".s", "1 h", "--1h", "1x"])
def test_no_durations(text: str) -> None:
    assert parse_duration(text) is None


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2020-01-01", 1577836800),
        ("2020-01-01T00:00:00Z", 1577836800),
        ("2020-01-01T01:00:00+01:00", 1577836800),
        ("2020-01-01T00:00:00.5", 1577836800.5),
        ("2020-01-01T00:00", 1577836800),
        ("1577836800", 1577836800),
        ("1577836800.5", 1577836800.5),
        ("0", 0),
        ("1h", 10**9 - 3600),
        ("-1h", 10**9 + 3600),
    ],
)
def test_moments(text: str, moment: float) -> None:
    assert parse_moment(text, 10**9 * SECOND) == round(moment * SECOND)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", 'failed to parse value as time or duration: "x"'),
        ("", 'failed to parse value as time or duration: ""'),
        ("2020-13-01", 'parsing time "2020-13-01": month out of range'),
        ("abc-def", 'parsing time "abc-def" as "2006-01-02": cannot parse "abc-def" as "2006"'),
    ],
)
def test_no_moments(text: str, message: str) -> None:
    with pytest.raises(TimeError, match=re.escape(message)):
        parse_moment(text, 0)


@given(st.text(alphabet="0123456789-T:.Z+hms ", max_size=30))
def test_any_time_is_read_or_refused(text: str) -> None:
    try:
        assert isinstance(parse_moment(text, 10**18), int)
    except TimeError as error:
        assert text in str(error)


# Address configurations


def config(subnet: str = "", gateway: str = "", ip_range: str = "", **auxiliary: str) -> dict[str, Any]:
    return {"Subnet": subnet, "Gateway": gateway, "IPRange": ip_range, "AuxiliaryAddresses": auxiliary or None}


@pytest.mark.parametrize(
    ("given_config", "reasons"),
    [
        (config("bogus"), ["invalid subnet bogus: invalid CIDR block notation"]),
        (config("10.1.0.0/255.255.0.0"), ["invalid subnet 10.1.0.0/255.255.0.0: invalid CIDR block notation"]),
        (config("10.1.0.5/24"), ["invalid subnet 10.1.0.5/24: it should be 10.1.0.0/24"]),
        (config("10.1.0.0/24", "x"), ["invalid gateway x: invalid address"]),
        (
            config("10.1.0.0/24", "10.2.0.1", "fd00::/64", a="10.3.0.1"),
            [
                "invalid ip-range fd00::/64: parent subnet is an IPv4 block",
                "invalid gateway 10.2.0.1: parent subnet 10.1.0.0/24 doesn't contain this address",
                "invalid auxiliary address a: parent subnet 10.1.0.0/24 doesn't contain this address",
            ],
        ),
        (
            config("10.1.0.0/24", ip_range="10.1.0.5/16"),
            [
                "invalid ip-range 10.1.0.5/16: CIDR block is bigger than its parent subnet 10.1.0.0/24",
                "invalid ip-range 10.1.0.5/16: it should be 10.1.0.0/16",
            ],
        ),
    ],
)
def test_wrong_address_configurations(given_config: dict[str, Any], reasons: list[str]) -> None:
    with pytest.raises(DockerError) as caught:
        ipam.check([given_config], ipv6=False)
    listed = reasons[0] if len(reasons) == 1 else "* " + "\n* ".join(reasons)
    assert (caught.value.status, caught.value.message) == (400, f"invalid network config:\n{listed}")


def test_right_address_configurations() -> None:
    both = [config("10.1.0.0/24", "10.1.0.1", "10.1.0.128/25", a="10.1.0.9"), config("fd00::5/64", "x")]
    ipam.check(both, ipv6=False)
    assert ipam.subnets(both)[0].auxiliary == {"a": "10.1.0.9"}


def test_own_subnets_overlap() -> None:
    with pytest.raises(DockerError, match="Pool overlaps"):
        ipam.check([config("10.1.0.0/24"), config("10.1.0.0/16")], ipv6=False)


@given(st.lists(st.builds(config, st.text(), st.text(), st.text(), a=st.text()), max_size=3), st.booleans())
def test_any_address_configuration_is_right_or_refused(configs: list[dict[str, Any]], ipv6: bool) -> None:
    try:
        ipam.check(configs, ipv6=ipv6)
    except DockerError as error:
        assert error.status in (400, 403)


# Endpoint settings

NETWORK = NetworkRecord(
    id="1" * 64,
    name="n",
    internal=False,
    mtu=1500,
    created_at=datetime.datetime.now(datetime.UTC),
    active=True,
    dns_server="",
    gateway_mac="",
    dns_mac="",
    subnets=(SubnetRecord(4, "10.1.0.0/24", "10.1.0.1"), SubnetRecord(6, "fd00::/64", "fd00::1", configured=False)),
)
STATIC = "user specified IP address is supported only when connecting to networks with user configured subnets"


def settings(**given: Any) -> dict[str, Any]:
    keys = ("IPAMConfig", "Links", "Aliases", "DriverOpts")
    return dict.fromkeys(keys) | {"MacAddress": "", "GwPriority": 0} | given


@pytest.mark.parametrize(
    ("given_settings", "reason"),
    [
        (
            {"IPAMConfig": {"IPv4Address": "10.2.0.1"}},
            "no configured subnet or ip-range contain the IP address 10.2.0.1",
        ),
        ({"IPAMConfig": {"IPv6Address": "fd00::5"}}, STATIC),
        ({"IPAMConfig": {"IPv6Address": "10.1.0.5"}}, f"* invalid IPv6 address: 10.1.0.5\n* {STATIC}"),
        ({"IPAMConfig": {"IPv4Address": "0.0.0.0"}}, "* invalid IPv4 address: 0.0.0.0\n* no configured subnet"),
        ({"IPAMConfig": {"LinkLocalIPs": ["169.254.1.1", "x"]}}, "invalid link-local IP address: x"),
        (
            {"DriverOpts": {"com.docker.network.endpoint.sysctls": "net.ipv4.x"}},
            "unrecognised network interface sysctl",
        ),
    ],
)
def test_wrong_endpoint_settings(given_settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(DockerError) as caught:
        endpoints.check(settings(**given_settings), NETWORK)
    assert caught.value.status == 400
    assert caught.value.message.startswith(f"invalid endpoint settings:\n{reason}")


def test_right_endpoint_settings() -> None:
    given_settings = settings(
        IPAMConfig={"IPv4Address": "10.1.0.5", "IPv6Address": "", "LinkLocalIPs": None},
        Links=["db:database", "cache", "/web:/app/www"],
        Aliases=["a", "b", "a"],
        GwPriority=5,
        MacAddress="02:42:0A:01:00:05",
        DriverOpts={"com.docker.network.endpoint.sysctls": "net.ipv4.conf.IFNAME.log_martians=1"},
    )
    endpoints.check(given_settings, NETWORK)
    options = endpoints.options(given_settings)
    assert options.addresses == ("10.1.0.5",)
    assert options.aliases == ("a", "b")
    assert options.links == (("database", "db"), ("cache", "cache"), ("www", "web"))
    assert options.gateway_priority == 5


@pytest.mark.parametrize("link", ["", "a:b:c"])
def test_wrong_links(link: str) -> None:
    with pytest.raises(DockerError):
        endpoints.parse_link(link)


@given(st.text(), st.text(), st.lists(st.text()), st.text())
def test_any_endpoint_settings_are_right_or_refused(ipv4: str, ipv6: str, local: list[str], mac: str) -> None:
    ipam_config = {"IPv4Address": ipv4, "IPv6Address": ipv6, "LinkLocalIPs": local}
    given_settings = settings(IPAMConfig=ipam_config, MacAddress=mac)
    try:
        endpoints.check(given_settings, NETWORK)
    except DockerError as error:
        assert error.status == 400
    else:
        endpoints.options(given_settings)
