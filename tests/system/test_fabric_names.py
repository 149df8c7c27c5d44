"""Guests on a network find each other by name, over both families, as Docker's containers do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fabric import Fabric, fabric

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def lab() -> Iterator[Fabric]:
    with fabric("web", "db") as lab:
        lab.run("network", "create", "app", "--ipv6")
        lab.run("network", "connect", "app", "web")
        lab.run("network", "connect", "app", "db", "--alias", "postgres", "--alias", "Primary")
        yield lab


def dig(lab: Fabric, *arguments: str) -> tuple[str, list[str]]:
    """The status and the answers' data that dig shows in `web`."""
    output = lab.in_guest("web", "dig", "+tries=1", "+time=10", "+noall", "+comments", "+answer", *arguments)
    status = output.split("status: ")[1].split(",")[0]
    answers = [line.split()[4] for line in output.splitlines() if line and not line.startswith(";")]
    return status, answers


@pytest.mark.parametrize("name", ["db", "postgres", "db.app", "postgres.app", "primary", "DB", "PostGres.APP"])
def test_ping_by_every_name(lab: Fabric, name: str) -> None:
    assert lab.answers("web", name, "-4")
    assert lab.answers("web", name, "-6")


def test_getent(lab: Fabric) -> None:
    v4, v6 = lab.address("db", "app"), lab.address("db", "app", 6)
    assert lab.in_guest("web", "getent", "ahostsv4", "db").split()[0] == v4
    assert lab.in_guest("web", "getent", "ahostsv6", "db").split()[0] == v6
    assert lab.in_guest("web", "getent", "hosts", v4).split() == [v4, "db.app"]
    assert lab.guest("web", "getent", "hosts", "nobody").returncode == 2


@pytest.mark.parametrize("transport", ["+notcp", "+tcp"])
def test_records(lab: Fabric, transport: str) -> None:
    v4, v6 = lab.address("db", "app"), lab.address("db", "app", 6)
    assert dig(lab, transport, "db", "A") == ("NOERROR", [v4])
    assert dig(lab, transport, "dB.aPP", "A") == ("NOERROR", [v4])
    assert dig(lab, transport, "postgres", "AAAA") == ("NOERROR", [v6])
    assert dig(lab, transport, "-x", v4) == ("NOERROR", ["db.app."])
    assert dig(lab, transport, "-x", v6) == ("NOERROR", ["db.app."])
    assert dig(lab, transport, "nobody", "A") == ("NXDOMAIN", [])
    assert dig(lab, transport, "nobody.app", "A") == ("NXDOMAIN", [])
    assert dig(lab, transport, "db", "MX") == ("NOERROR", [])
    assert dig(lab, transport, "-x", "203.0.113.9") == ("NXDOMAIN", [])


def test_a_name_known_in_the_other_family_only(lab: Fabric) -> None:
    lab.run("lab", "add", "cache")
    lab.run("network", "create", "four")
    lab.run("network", "connect", "four", "web")
    lab.run("network", "connect", "four", "cache")
    assert dig(lab, "cache", "A")[0] == "NOERROR"
    assert dig(lab, "cache", "AAAA") == ("NOERROR", [])


def test_names_end_with_the_connection(lab: Fabric) -> None:
    lab.run("lab", "add", "brief")
    lab.run("network", "connect", "app", "brief", "--alias", "shortly")
    assert dig(lab, "shortly", "A")[0] == "NOERROR"
    lab.run("network", "disconnect", "app", "brief")
    assert dig(lab, "shortly", "A") == ("NXDOMAIN", [])
    assert dig(lab, "brief.app", "A") == ("NXDOMAIN", [])


def test_a_shared_alias_has_every_holder(lab: Fabric) -> None:
    lab.run("network", "create", "pool")
    for name in ("one", "two"):
        lab.run("lab", "add", name)
        lab.run("network", "connect", "pool", name, "--alias", "worker")
    lab.run("network", "connect", "pool", "web")
    expected = sorted([lab.address("one", "pool"), lab.address("two", "pool")])
    status, answers = dig(lab, "worker", "A")
    assert (status, sorted(answers)) == ("NOERROR", expected)


def test_resolv_conf_is_dockers(lab: Fabric) -> None:
    lines = lab.in_guest("web", "cat", "/etc/resolv.conf").splitlines()
    assert "nameserver 127.0.0.11" in lines
    assert "options ndots:0" in lines


def test_gateway_answers(lab: Fabric) -> None:
    network = lab.json("network", "inspect", "app")
    for gateway in network["gateways"]:
        lab.until_answers("web", gateway)
