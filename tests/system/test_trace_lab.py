"""`taploom trace` in a lab: its verdict is what packets find, case by case and by random policies."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from fabric import Fabric, fabric, until
from policy_model import PORTS, Place, random_policy
from test_lab_docker import Docker
from test_policy_property import Prober, apply

from host_bridge.client import unary
from taploom.contracts.taploom.bridge.v1 import TraceRequest, TraceResponse, TraceVerdict

pytestmark = pytest.mark.system

GUESTS = ("web", "db", "mal")
OUTSIDE = {4: "198.51.100.1", 6: "2001:db8:1::1"}  # see lab/internet.py
POLICY = {
    "networks": {"back": "deny-in"},
    "groups": {
        "web": {
            "members": [{"guest": "web"}],
            "out": [
                {"name": "to-db", "to": [{"guest": "db"}], "protocol": "tcp", "ports": ["7001-7003"]},
                {"name": "ping", "protocol": "icmp"},
                {"name": "ping6", "protocol": "icmpv6", "to": [{"group": "db"}]},
                {"name": "no-udp", "protocol": "udp", "action": "reject", "priority": 200},
            ],
        },
        "db": {
            "members": [{"alias": "postgres"}],
            "in": [
                {"name": "from-web", "from": [{"group": "web"}], "protocol": "tcp", "ports": [7001]},
                {"name": "not-this", "protocol": "tcp", "ports": [7002], "action": "drop"},
                {"name": "nor-this", "protocol": "tcp", "ports": [7003], "action": "reject"},
                {"name": "pings", "protocol": "icmp"},
                {"name": "pings6", "protocol": "icmpv6"},
            ],
        },
    },
}


@pytest.fixture(scope="module")
def lab() -> Iterator[Fabric]:
    with fabric(*GUESTS) as lab:
        lab.run("network", "create", "app", "--ipv6")
        lab.run("network", "create", "back", "--internal")
        lab.run("network", "create", "quiet", "--ipv6", "-o", "com.docker.network.bridge.enable_icc=false")
        for network, guest, *options in (
            ("app", "web"),
            ("app", "db", "--alias", "postgres"),
            ("back", "db"),
            ("back", "mal"),
            ("quiet", "web"),
            ("quiet", "mal", "--alias", "hermit"),
        ):
            lab.run("network", "connect", network, guest, *options)
        yield lab


@pytest.fixture(scope="module")
def probers(lab: Fabric) -> Iterator[dict[str, Prober]]:
    found = {guest: Prober(lab, guest) for guest in GUESTS}
    yield found
    for prober in found.values():
        prober.close()


def told(
    lab: Fabric, source: str, target: str, protocol: str = "icmp", port: int = 0, family: int = 0
) -> TraceResponse:
    request = TraceRequest(source=source, target=target, protocol=protocol, port=port, family=family)
    return unary(f"unix:{lab.path}/bridge.sock", "TraceService/Trace", request, TraceResponse)


Case = tuple[str, str, str, int]  # who, address, protocol, port


def agree(lab: Fabric, probers: dict[str, Prober], cases: list[Case]) -> list[str]:
    """Checks that trace tells what packets find; returns the summaries, with + in front of those that pass.

    All packets of a guest are sent at once: each that is not answered is waited for.
    """
    for guest, prober in probers.items():
        prober.ask([(protocol, address, port) for source, address, protocol, port in cases if source == guest])
    answers = {guest: iter(prober.answers()) for guest, prober in probers.items()}
    summaries = []
    for source, address, protocol, port in cases:
        found = told(lab, source, address, protocol, port)
        answer = next(answers[source])
        assert found.verdict != TraceVerdict.UNSPECIFIED, found.summary
        assert (found.verdict == TraceVerdict.PASSES) is answer, f"answered: {answer}; {found.summary}"
        summaries.append(f"+ {found.summary}" if answer else found.summary)
    return summaries


def check(lab: Fabric, probers: dict[str, Prober], expected: list[tuple[str, str, str, int, str]]) -> None:
    """As `agree`, for cases with what is in their summaries."""
    found = agree(lab, probers, [case[:4] for case in expected])
    for case, summary in zip(expected, found, strict=True):
        assert case[4] in summary, case


def agrees(
    lab: Fabric, probers: dict[str, Prober], source: str, address: str, protocol: str = "icmp", port: int = 0
) -> str:
    """As `agree`, for one case."""
    return agree(lab, probers, [(source, address, protocol, port)])[0]


def test_cases(lab: Fabric, probers: dict[str, Prober]) -> None:
    at = {
        (guest, network, family): lab.address(guest, network, family)
        for guest, network in (("web", "app"), ("db", "app"), ("web", "quiet"), ("mal", "quiet"))
        for family in (4, 6)
    }
    at |= {(guest, "back", 4): lab.address(guest, "back") for guest in ("db", "mal")}
    gateways = {n: lab.json("network", "inspect", n)["gateways"] for n in ("app", "back", "quiet")}
    open_: list[tuple[str, str, str, int, str]] = [("mal", at["db", "back", 4], "tcp", 7001, "+ ")]
    for family in (4, 6):
        db = at["db", "app", family]
        apart = "guests of quiet do not reach each other (enable_icc=false)"
        open_ += [
            ("web", db, "tcp", 7004, "+ "),
            ("web", db, "udp", 7004, "+ "),
            ("web", OUTSIDE[family], "icmp", 0, "+ "),
            ("web", gateways["app"][family == 6], "icmp", 0, "+ "),
            ("mal", at["web", "quiet", family], "tcp", 7001, apart),
            ("mal", OUTSIDE[family], "icmp", 0, "+ "),
        ]
    check(lab, probers, open_)
    apply(lab, POLICY)
    ruled: list[tuple[str, str, str, int, str]] = [
        ("web", OUTSIDE[4], "icmp", 0, "+ "),
        ("web", OUTSIDE[6], "icmp", 0, "out of web: no rule allows it"),
        # Pings of the gateway always pass.
        ("web", gateways["app"][1], "icmp", 0, "+ "),
        # Its alias, and so its group, is on the other network.
        ("mal", at["db", "back", 4], "tcp", 7004, "into db: no rule allows it, and network back denies by default"),
    ]
    for family in (4, 6):
        db, web = at["db", "app", family], at["web", "app", family]
        ruled += [
            ("web", db, "tcp", 7001, "+ "),
            ("web", db, "tcp", 7002, "into db: rule not-this of group db drops it"),
            ("web", db, "tcp", 7003, "into db: rule nor-this of group db rejects it"),
            ("web", db, "tcp", 7004, "out of web: no rule allows it, and group web says what may go out"),
            ("web", db, "udp", 7001, "out of web: rule no-udp of group web rejects it"),
            ("web", db, "icmp", 0, "+ "),
            ("db", web, "tcp", 7001, "+ "),
            ("db", web, "udp", 7001, "+ "),
            ("db", at["mal", "quiet", family], "tcp", 7001, "lets nothing pass from one network to another"),
        ]
    check(lab, probers, ruled)
    apply(lab, {"networks": {"back": "allow"}})


def test_an_internal_network_and_a_guest_that_was_disconnected(lab: Fabric, probers: dict[str, Prober]) -> None:
    web, quiet, back = lab.address("web", "app"), lab.address("web", "quiet"), lab.address("db", "back")
    lab.run("network", "disconnect", "quiet", "mal")
    try:
        check(
            lab,
            probers,
            [
                *(("mal", one, "icmp", 0, "mal has no route to") for one in (OUTSIDE[4], web, quiet, OUTSIDE[6])),
                ("mal", back.rpartition(".")[0] + ".99", "icmp", 0, "nobody on back has"),
                ("mal", back, "tcp", 7001, "+ "),
            ],
        )
    finally:
        lab.run("network", "connect", "quiet", "mal", "--alias", "hermit")


def test_names(lab: Fabric) -> None:
    """What is said of a name is what the guest's resolver answers."""
    addresses = {guest: set(lab.endpoint(guest, "app")["addresses"]) for guest in ("web", "db")}
    bare = {guest: {address.partition("/")[0] for address in found} for guest, found in addresses.items()}
    for name, how in (
        ("db", "network app knows it as the name of the guest"),
        ("Postgres", "network app knows it as an alias of db"),
        ("db.app", "network app knows it as the name of the guest"),
    ):
        found = told(lab, "web", name)
        assert {path.destination_address for path in found.paths} == bare["db"], name
        assert how in found.steps[0].text
        assert {path.steps[0].network for path in found.paths} == {"app"}
        assert lab.in_guest("web", "getent", "ahosts", name).split()[0] in bare["db"]
    for source, name, reason in (
        ("mal", "postgres", "no network that mal is on knows postgres (asked: quiet back): NXDOMAIN"),
        ("web", "nosuch", "no network that web is on knows nosuch (asked: app quiet): NXDOMAIN"),
        ("db", "hermit", "no network that db is on knows hermit (asked: app back): NXDOMAIN"),
    ):
        found = told(lab, source, name)
        assert (found.verdict, found.paths) == (TraceVerdict.STOPS, [])
        assert reason in found.summary
        assert lab.guest(source, "getent", "ahosts", name).returncode == 2
    # The network that comes first in gateway order wins, as for programs.
    assert {p.destination_address for p in told(lab, "mal", "web").paths} >= {lab.address("web", "quiet")}
    assert [p.destination_address for p in told(lab, "mal", "db").paths] == [lab.address("db", "back")]
    lab.run("network", "disconnect", "back", "db")
    try:
        found = told(lab, "mal", "db")
        assert "guest db is on app only: NXDOMAIN" in found.summary
    finally:
        lab.run("network", "connect", "back", "db")


def test_the_command(lab: Fabric) -> None:
    passes = lab.command("trace", "web", "db:7001")
    assert (passes.returncode, passes.stderr) == (0, "")
    assert "by app (eth0): " in passes.stdout
    assert passes.stdout.splitlines()[-1].startswith("tcp 7001 from web to db passes (")
    stops = lab.command("trace", "mal", lab.address("web", "quiet") + ":80")
    assert stops.returncode == 1
    assert stops.stdout.splitlines()[-1].endswith("guests of quiet do not reach each other (enable_icc=false)")
    document = json.loads(lab.command("trace", "web", "db:7001", "-6", "--udp", "--json").stdout)
    assert (document["verdict"], len(document["paths"])) == ("passes", 1)
    assert document["paths"][0]["steps"][0]["topic"] == "route"
    assert "ls_in_check_port_sec" in lab.run("trace", "web", "db", "--ovn")
    for arguments, reason in (
        (("nosuch", "db:1"), "guest nosuch not found"),
        (("10.99.0.1", "db:1"), "nobody has the address 10.99.0.1"),
        (("web", "db:0"), "'0' is not a port"),
        (("web", "db:"), "has no port after the colon"),
        (("web", "[fd00::1"), "is malformed"),
        (("web", "db:80", "--icmp"), "icmp has no ports"),
        (("web", "db", "--udp"), "udp needs a port"),
        (("web", "10.0.0.1", "-6"), "10.0.0.1 is no IPv6 address"),
        (("web", "a b"), "is neither a name nor an address"),
    ):
        refused = lab.command("trace", *arguments)
        assert (refused.returncode, refused.stdout) == (2, ""), arguments
        assert reason in refused.stderr
        assert "Traceback" not in refused.stderr


def test_random_policies(lab: Fabric, probers: dict[str, Prober]) -> None:
    seed = int(os.environ.get("TAPLOOM_SEED", time.time_ns() % 1_000_000))
    rng = random.Random(seed)
    places = [
        Place(
            endpoint["guest_name"],
            network,
            tuple(endpoint["aliases"]),
            tuple(address.partition("/")[0] for address in endpoint["addresses"]),
        )
        for network in ("app", "quiet")
        for endpoint in lab.json("network", "inspect", network)["endpoints"]
    ]
    cases = [
        (source, target, family, protocol, port)
        for source in places
        for target in places
        if source.guest != target.guest
        for family in (4, 6)
        for protocol, port in [("icmp", 0), *((p, n) for p in ("tcp", "udp") for n in PORTS)]
    ]
    checked = passed = number = 0
    # Policies at random may allow nothing: until both verdicts have been had.
    while number < 4 or not 0 < passed < checked:
        assert number < 20
        number += 1
        policy = random_policy(rng, places)
        apply(lab, policy)
        chosen: list[Case] = [
            (source.guest, next(a for a in target.addresses if (":" in a) == (family == 6)), protocol, port)
            for source, target, family, protocol, port in rng.sample(cases, 30)
        ]
        try:
            found = agree(lab, probers, chosen)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, policy {number}: {error}\n{json.dumps(policy)}") from error
        checked, passed = checked + len(found), passed + sum(one.startswith("+") for one in found)
    apply(lab, {"networks": dict.fromkeys(("app", "back", "quiet"), "allow")})
    print(f"{checked} verdicts checked, {passed} of them that it passes (seed {seed})")


def test_links_and_guests_that_are_down(lab: Fabric, probers: dict[str, Prober]) -> None:
    web, db = lab.address("web", "app"), lab.address("db", "app")
    supervisor = int((lab.path / "supervisor.lock").read_text())
    agent = lab.processes()["guest/db"]["pid"]
    os.kill(supervisor, signal.SIGSTOP)  # or it would start the agent again at once
    try:
        os.kill(agent, signal.SIGKILL)
        until(lambda: not lab.endpoint("db", "app")["link_up"], "the link is down")
        assert "the link of db on app is down: " in agrees(lab, probers, "web", db, "tcp", 7001)
        down = told(lab, "db", web, "tcp", 7001)
        assert down.verdict == TraceVerdict.STOPS
        assert "note: the agent of db does not answer" in down.steps[0].text
        assert "the link of db on app is down: " in down.summary
    finally:
        os.kill(supervisor, signal.SIGCONT)
    lab.until_converged()
    until(lambda: "+" in agrees(lab, probers, "web", db, "tcp", 7001), "it passes again")
    lab.run("guest", "register", "ghost", f"unix:{lab.path}/nobody.sock")
    try:
        assert "ghost is on no network" in told(lab, "ghost", "db").summary
        assert "guest ghost is on no network: NXDOMAIN" in told(lab, "web", "ghost").summary
    finally:
        lab.run("guest", "rm", "ghost")


def test_the_helper_restarts(lab: Fabric) -> None:
    """Nothing of it is remembered anywhere: what is told is what is."""
    db = lab.address("db", "app")
    for victim in ("helper", "ovsdb-server"):
        pid = lab.processes()["helper"]["pid"] if victim == "helper" else lab.daemons()[victim][0]
        os.kill(pid, signal.SIGKILL)
        found = told(lab, "web", db, "tcp", 7001)
        assert found.summary, "an answer at any time"
        lab.until_converged()

        def passes() -> bool:
            return told(lab, "web", db, "tcp", 7001).verdict == TraceVerdict.PASSES

        until(passes, f"it passes again after {victim} was killed")


def test_containers_and_published_ports(lab: Fabric) -> None:
    docker = Docker(lab)
    serve = ("python3", "-m", "http.server", "80")
    docker("run", "-d", "--name", "shop", "--network", "app", "-p", "127.0.0.1::80", "host", *serve)
    try:
        port = int(docker("port", "shop", "80").splitlines()[0].rpartition(":")[2])

        def http() -> bool:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=3):
                    return True
            except OSError:
                return False

        until(http, "the published port")
        for target, number in (("shop", 80), ("localhost", port), ("127.0.0.1", port)):
            found = told(lab, "host", target, "tcp", number)
            assert found.verdict == TraceVerdict.PASSES, found.summary
            assert (
                f"127.0.0.1:{port} of the host is published: it leads to port 80 of shop"
                in found.paths[0].steps[0].text
            )
        assert "(it has published 80/tcp)" in told(lab, "host", "shop", "tcp", 81).summary
        assert "the host has not published tcp 1 there" in told(lab, "host", "localhost", "tcp", 1).summary
        assert "it has published nothing" in told(lab, "host", "db", "tcp", 7001).summary
        apply(lab, {"groups": {"shops": {"members": [{"guest": "shop"}], "in": []}}})
        assert http(), "as published ports do"
        assert told(lab, "host", "shop", "tcp", 80).verdict == TraceVerdict.PASSES
        rule = {"name": "no-host", "from": "host", "action": "reject"}
        apply(lab, {"groups": {"shops": {"members": [{"guest": "shop"}], "in": [rule]}}})
        assert "into shop: rule no-host of group shops rejects it" in told(lab, "host", "shop", "tcp", 80).summary
        assert not http()
        lab.run("policy", "rm", "shops")
        # The other way: what listens on the host.
        with socket.create_server(("127.0.0.1", 0)) as server:
            number = server.getsockname()[1]
            script = f"import socket; socket.create_connection(('{gateway(lab)}', {number}), 5)"
            lab.in_guest("web", sys.executable, "-c", script)
            assert told(lab, "web", "host", "tcp", number).verdict == TraceVerdict.PASSES
            assert told(lab, "web", gateway(lab), "tcp", number).verdict == TraceVerdict.PASSES
        docker("stop", "-t", "1", "shop")
        assert "container shop does not run" in told(lab, "shop", "db").summary
        assert "container shop does not run" in told(lab, "web", "shop").summary
        assert "container shop does not run" in told(lab, "host", "shop", "tcp", 80).summary
    finally:
        lab.command("policy", "rm", "shops")
        docker("rm", "-f", "shop")


def gateway(lab: Fabric) -> str:
    found: Any = lab.json("network", "inspect", "app")["gateways"][0]
    return str(found)


def test_load_balancers(lab: Fabric, probers: dict[str, Prober]) -> None:
    """By name, by address, published, and as the policy says of the backend; and when there is no backend."""
    lab.run(
        *("lb", "create", "shop", "--network", "app", "--port", "80:7001", "--port", "81:7002"),
        *("--backend", "guest=db", "--publish", "127.0.0.1::80"),
    )
    try:
        shown = lab.json("lb", "show", "shop")["balancer"]
        addresses = [one["address"] for one in shown["addresses"]]
        assert len(addresses) == 2
        published = shown["published"][0]["host_port"]
        found = told(lab, "web", "shop", "tcp", 80)
        assert found.steps[0].text.endswith("network app knows it as the name of a load balancer")
        assert {path.destination_address for path in found.paths} == set(addresses)
        incoming: list[dict[str, Any]] = [
            {"name": "some", "protocol": "tcp", "ports": [7001]},
            {"name": "not-this", "protocol": "tcp", "ports": [7002], "action": "drop"},
        ]
        apply(lab, {"groups": {"db": {"members": [{"guest": "db"}], "in": incoming}}})
        for address in addresses:
            assert "+" in agrees(lab, probers, "web", address, "tcp", 80)
            closed = agrees(lab, probers, "web", address, "tcp", 81)
            assert "into db: rule not-this of group db drops it" in closed
            hands = [one.text for path in told(lab, "web", address, "tcp", 80).paths for one in path.steps]
            assert any(text.startswith("the load balancer at ") and ":7001" in text for text in hands)
        for target, port in (("shop", 80), ("localhost", published)):
            outside = told(lab, "host", target, "tcp", port)
            with socket.create_connection(("127.0.0.1", published), 5) as connection:
                reached = connection.recv(1) == b""  # the probers close what they accept
            assert (outside.verdict == TraceVerdict.PASSES) is reached, outside.summary
        lab.run("lb", "rm", "shop")
        lab.run("lb", "create", "shop", "--network", "app", "--port", "80:7001", "--backend", "guest=nobody")
        for one in lab.json("lb", "show", "shop")["balancer"]["addresses"]:
            refused = agrees(lab, probers, "db", one["address"], "tcp", 80)
            assert "the load balancer at " in refused
            assert "has no backend" in refused
    finally:
        lab.command("lb", "rm", "shop")
        apply(lab, {"networks": {"back": "allow"}, "groups": {}})
