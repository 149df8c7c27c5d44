"""Load balancers in a lab, by the commands that people type: who answers, what ends, what comes back; nothing stays."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fabric import Fabric, at_once, fabric, until
from test_policy_lab import Connection, rows

pytestmark = pytest.mark.system

SERVER = str(Path(__file__).with_name("balancer_server.py"))
CLIENT = str(Path(__file__).with_name("balancer_client.py"))
WEBS = ("w1", "w2", "w3")
ALL_UP = {name: {"up"} for name in WEBS}


class Balanced:
    """A lab with three servers and their clients."""

    def __init__(self, lab: Fabric) -> None:
        self.lab = lab
        self.servers: dict[str, subprocess.Popen[str]] = {}

    def serve(self, guest: str) -> None:
        server = self.lab.start_in_guest(guest, sys.executable, SERVER, guest, "8080", "9090")
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        self.servers[guest] = server

    def stop(self, guest: str) -> None:
        server = self.servers.pop(guest)
        server.kill()
        server.wait()

    def ask(self, guest: str, target: str, port: int = 80, protocol: str = "tcp", count: int = 12) -> dict[str, int]:
        """Who answered how often: `NAME SOURCE`."""
        text = self.lab.in_guest(guest, sys.executable, CLIENT, target, str(port), protocol, str(count))
        found: dict[str, int] = json.loads(text)
        return found

    def names(self, guest: str, target: str, port: int = 80, protocol: str = "tcp", count: int = 12) -> set[str]:
        """Who answered: names of guests, or of errors."""
        return {answer.split()[0] for answer in self.ask(guest, target, port, protocol, count)}

    def ignored(self, *asked: tuple[str, str, int, str], pings: Sequence[tuple[str, str]] = ()) -> bool:
        """Whether nothing at all comes of requests (guest, target, port, protocol) and pings, all sent at once."""
        requests = [lambda one=one: self.names(*one, 1) == {"TimeoutError"} for one in asked]
        return all(at_once(*requests, *(lambda ping=ping: not self.lab.answers(*ping) for ping in pings)))

    def until_names(self, wanted: set[str], guest: str, target: str, protocol: str = "tcp") -> None:
        until(lambda: self.names(guest, target, 80, protocol, 20) == wanted, f"{wanted} answer {guest} at {target}")

    def written(self, text: str) -> str:
        path = self.lab.path / "lb.yaml"
        path.write_text(text)
        return str(path)

    def addresses(self, name: str) -> dict[str, str]:
        """A load balancer's addresses by network and family, such as `app4`."""
        shown = self.lab.json("lb", "show", name)["balancer"]["addresses"]
        return {one["network"] + ("6" if ":" in one["address"] else "4"): one["address"] for one in shown}

    def health(self, name: str) -> dict[str, set[str]]:
        """What `show` says of the guests' health, over all ports and families."""
        found: dict[str, set[str]] = {}
        for one in self.lab.json("lb", "show", name)["balancer"]["backends"]:
            found.setdefault(one["guest_name"], set()).add(one["health"])
        return found


@pytest.fixture(scope="module")
def balanced() -> Iterator[Balanced]:
    with fabric("client", "outer", *WEBS) as lab:
        lab.run("network", "create", "app", "--ipv6")
        lab.run("network", "create", "front", "--ipv6")
        lab.run("network", "connect", "app", "client")
        lab.run("network", "connect", "front", "outer")
        found = Balanced(lab)
        for guest in WEBS:
            lab.run("network", "connect", "app", guest, "--alias", "web")
            found.serve(guest)
        yield found
        for guest in list(found.servers):
            found.stop(guest)


@pytest.fixture
def nothing_left(balanced: Balanced) -> Iterator[None]:
    before = rows(balanced.lab)
    yield
    for one in balanced.lab.json("lb", "ls")["balancers"]:
        balanced.lab.run("lb", "rm", one["balancer"]["name"])
    assert rows(balanced.lab) == before


@pytest.mark.usefixtures("nothing_left")
def test_all_backends_answer(balanced: Balanced) -> None:
    lab = balanced.lab
    create = ("lb", "create", "shop", "--network", "app", "--port", "80:8080", "--port", "80:8080/udp")
    addresses = lab.run(*create, "--backend", "alias=web", "--publish", "127.0.0.1::80").split()
    assert addresses == list(balanced.addresses("shop").values())
    assert lab.address("client", "app") not in addresses
    for target in (*addresses, "shop", "shop.app"):
        assert balanced.names("client", target, count=30) == set(WEBS), target
    for address in addresses:
        assert balanced.names("client", address, protocol="udp", count=30) == set(WEBS)
        family = 6 if ":" in address else 4
        # The backend sees the client; one that is its own client sees the load balancer.
        assert {answer.split()[1] for answer in balanced.ask("client", address)} == {
            lab.address("client", "app", family)
        }
        own = balanced.ask("w1", address, count=40)
        assert {answer.split()[0] for answer in own} == set(WEBS)
        assert {answer.split()[1] for answer in own if answer.startswith("w1 ")} == {address}
    # Both families are known under its name, and nobody else is.
    known = lab.in_guest("client", "getent", "ahosts", "shop").split()
    assert set(addresses) <= set(known)
    published = lab.json("lb", "show", "shop")["balancer"]["published"][0]
    answers = json.loads(
        subprocess.run(
            [sys.executable, CLIENT, "127.0.0.1", str(published["host_port"]), "tcp", "30"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    assert {answer.split()[0] for answer in answers} == set(WEBS)
    # Its address is nobody's: not to be had, and not given out.
    refused = lab.fails("network", "rm", "app")
    assert "in use by" in refused
    assert "shop exists" in lab.fails(*create)


def test_backends_follow(balanced: Balanced) -> None:
    lab = balanced.lab
    before = _without_ids(rows(lab))
    ports = ("--port", "80:8080", "--port", "90:9090")
    lab.run("lb", "create", "shop", "--network", "app", *ports, "--backend", "alias=web")
    address = balanced.addresses("shop")["app4"]
    connections = [Connection(lab, "client", address, 90) for _ in range(8)]
    try:
        assert {connection.outcome for connection in connections} == {"connected"}
        assert all(connection.lives() for connection in connections)
        lab.run("network", "disconnect", "app", "w3")
        assert balanced.names("client", address, count=30) == {"w1", "w2"}
        ended = [connection for connection in connections if not connection.lives(2.0)]
        lab.run("network", "connect", "app", "w3", "--alias", "web")
        assert balanced.names("client", address, count=30) == set(WEBS)
        # Those to the others go on, whoever comes and goes.
        lab.run("network", "disconnect", "app", "w3")
        lab.run("network", "connect", "app", "w3", "--alias", "other")
        assert balanced.names("client", address, count=30) == {"w1", "w2"}
        kept = [connection for connection in connections if connection not in ended]
        assert kept
        assert all(connection.lives() for connection in kept)
        # And those to a backend that is not one any more are cut, though it is still there.
        path = balanced.written(
            "balancers: {shop: {network: app, ports: [80:8080, 90:9090], backends: [{guest: w1}]}}\n"
        )
        assert lab.json("lb", "apply", "-f", path)["updated"] == ["shop"]
        assert balanced.addresses("shop")["app4"] == address
        assert balanced.names("client", address) == {"w1"}
        lab.run("lb", "rm", "shop")
        until(lambda: not any(connection.lives(1.0) for connection in kept), "connections are cut")
    finally:
        for connection in connections:
            connection.close()
        lab.run("network", "disconnect", "app", "w3")
        lab.run("network", "connect", "app", "w3", "--alias", "web")
    assert _without_ids(rows(lab)) == before


@pytest.mark.usefixtures("nothing_left")
def test_health_and_affinity(balanced: Balanced) -> None:
    lab = balanced.lab
    path = balanced.written(
        "balancers:\n  shop:\n    network: app\n    ports: ['80:8080', 80:8080/udp]\n    backends: [{alias: web}]\n"
        "    health: {interval: 1s, timeout: 1s, failures: 2}\n    affinity: true\n"
    )
    lab.run("lb", "apply", "-f", path)
    addresses = balanced.addresses("shop").values()
    until(lambda: balanced.health("shop") == ALL_UP, "all backends are up")
    for address in addresses:
        (chosen,) = balanced.names("client", address, count=20)
        assert balanced.names("client", address, count=20) == {chosen}
    balanced.stop(chosen)
    until(lambda: balanced.health("shop")[chosen] == {"down"}, f"{chosen} is down")
    for address in addresses:
        assert len(answers := balanced.names("client", address, count=20)) == 1
        assert answers < set(WEBS) - {chosen}
        assert len(answers := balanced.names("client", address, protocol="udp", count=20)) == 1
        assert answers < set(WEBS) - {chosen}
    assert "2 of 3" in lab.run("lb", "ls")
    balanced.serve(chosen)
    until(lambda: balanced.health("shop")[chosen] == {"up"}, f"{chosen} is up again")
    # Nobody left: refused at once, not left alone.
    lab.run("lb", "apply", "-f", balanced.written("balancers: {shop: {network: app, ports: ['80:8080']}}\n"))
    assert balanced.names("client", "shop", count=2) == {"ConnectionRefusedError"}


def test_refusals(balanced: Balanced) -> None:
    lab = balanced.lab
    before = rows(lab)

    def refused(body: str) -> str:
        path = balanced.written(f"balancers:\n  good: {{network: app, ports: [1]}}\n  shop:\n{body}")
        return lab.fails("lb", "apply", "-f", path).removeprefix(f"taploom: {path}:")

    gateway = lab.json("network", "inspect", "app")["gateways"][0]
    client = lab.address("client", "app")
    # What is written below network and ports, at line 6, and what is said of it.
    wrong = {
        "address: 10.255.0.1": "6: balancer shop: address 10.255.0.1 is not in",
        f"address: {client}": f"6: balancer shop: address {client} of network app is in use by guest client",
        f"address: {gateway}": f"6: balancer shop: address {gateway} of network app is in use by the gateway",
        f"address: [{client}, 172.18.0.77]": f"6: balancer shop has two IPv4 addresses ({client}, 172.18.0.77)",
        "health: {interval: 0s}": "6: balancer shop: interval 0 s is out of range",
        "health: {timeout: 500ms}": "6: '500ms' is no time",
        "backends: [{alias: web, port: 0}]": "6: port 0 is no port",
        "backends: [{balancer: shop}]": "6: 'balancer' is not a key of a backend",
        "backends: [{}]": "6: this selects nobody",
        "publish: 8080:81": "6: balancer shop has no port 81/tcp to publish",
        "name: good": "3: balancers good and shop are both called good",
        "port: 90": "6: 'port' is not a key of balancer shop",
    }
    for line, reason in wrong.items():
        assert refused(f"    network: app\n    ports: [80]\n    {line}\n").startswith(reason), line
    wrong = {
        "    network: app\n    ports: [80, '80:81']\n": "5: balancer shop: port 80/tcp is given twice",
        "    network: app\n": "3: balancer shop has no port",
        "    ports: [80]\n": "3: balancer shop has no network",
        "    network: nosuch\n    ports: [80]\n": "3: balancer shop: network 'nosuch' not found",
        "    network: host\n    ports: [80]\n": "3: balancer shop: network host has no guests to balance",
    }
    for body, reason in wrong.items():
        assert refused(body).startswith(reason), body
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        try:
            assert server.stdout is not None
            port = server.stdout.readline().split("port ")[1].split()[0]
            told = refused(f"    network: app\n    ports: [80]\n    publish: 127.0.0.1:{port}:80\n")
            assert told.startswith(f"6: balancer shop: Error starting userland proxy: listen tcp4 127.0.0.1:{port}"), (
                told
            )
        finally:
            server.kill()
    assert "not found" in lab.fails("lb", "show", "shop")
    assert lab.json("lb", "ls")["balancers"] == []
    assert rows(lab) == before


POLICY = """
networks: {app: deny}
groups:
  webs:
    members: [{alias: web}]
    in: [{from: {guest: client}, protocol: tcp, ports: 8080}]
  clients:
    members: [{guest: client}]
    out: [{to: {group: webs}, protocol: tcp, ports: 8080}]
"""


def test_policy(balanced: Balanced) -> None:
    """Rules are about backends and their clients, whichever way connections come."""
    lab = balanced.lab
    before = rows(lab)
    ports = ("--port", "80:8080", "--port", "80:8080/udp", "--port", "90:9090")
    check = ("--health-check", "interval=1s,timeout=5s,failures=3")
    lab.run("lb", "create", "shop", "--network", "app", *ports, "--backend", "alias=web", *check)
    targets = list(balanced.addresses("shop").values())
    path = lab.path / "policy.yaml"
    try:
        path.write_text(POLICY)
        lab.run("policy", "apply", "-f", str(path))
        for target in (*targets, "shop"):
            assert balanced.names("client", target, count=30) == set(WEBS), target
        assert balanced.ignored(("client", targets[0], 90, "tcp"), ("client", targets[0], 80, "udp"))
        assert balanced.names("w1", targets[0], count=4) <= {"TimeoutError", "w1"}
        assert lab.json("policy", "show", "clients")["outgoing"][0]["packets"] > 0
        # Checks are not what rules are about.
        until(lambda: balanced.health("shop") == ALL_UP, "all backends are up under a policy")
        path.write_text(POLICY.replace("out: [{to: {group: webs}", "out: [{to: {guest: w1}"))
        lab.run("policy", "apply", "-f", str(path))
        assert balanced.names("client", targets[0], count=4) <= {"w1", "TimeoutError"}
        path.write_text(POLICY.replace("in: [{from: {guest: client}", "in: [{from: {guest: w1}"))
        lab.run("policy", "apply", "-f", str(path))
        assert balanced.names("client", targets[0], count=1) == {"TimeoutError"}
    finally:
        path.write_text("networks: {app: allow}\n")
        lab.run("policy", "apply", "--prune", "-f", str(path))
        lab.run("lb", "rm", "shop")
    assert rows(lab) == before


FRONT = """
balancers:
  shop:
    network: app
    ports: [80:8080, 80:8080/udp, 90:9090]
    backends: [{alias: web}]
    also: [front]
"""
FRONT_POLICY = """
groups:
  webs:
    members: [{alias: web}]
    in: [{from: {guest: outer}, protocol: tcp, ports: 8080}]
"""


def test_another_network(balanced: Balanced) -> None:
    """A network that a balancer is also on reaches its backends through it, and nothing else."""
    lab = balanced.lab
    before = rows(lab)
    path = lab.path / "policy.yaml"
    echo: Any = None
    try:
        lab.run("lb", "apply", "-f", balanced.written(FRONT))
        addresses = balanced.addresses("shop")
        assert set(addresses) == {"app4", "app6", "front4", "front6"}
        for family in (4, 6):
            target = addresses[f"front{family}"]
            answers = balanced.ask("outer", target, count=30)
            assert {answer.split()[0] for answer in answers} == set(WEBS)
            assert {answer.split()[1] for answer in answers} == {lab.address("outer", "front", family)}
            assert balanced.names("outer", target, 80, "udp", 30) == set(WEBS)
            assert balanced.names("client", addresses[f"app{family}"], count=30) == set(WEBS)
            # Not beside it, not further, and not the other way round.
            direct = lab.address("w1", "app", family)
            client, outer = lab.address("client", "app", family), lab.address("outer", "front", family)
            pings = ("outer", direct), ("outer", client), ("w1", outer), ("client", outer)
            assert balanced.ignored(("outer", direct, 8080, "tcp"), ("outer", direct, 8080, "udp"), pings=pings)
        assert balanced.names("outer", "shop", count=20) == set(WEBS)
        # From the port that answers come from, too: what is no answer is dropped.
        echo = lab.start_in_guest("outer", sys.executable, SERVER, "outer", "7070", "7071")
        assert echo.stdout is not None
        assert echo.stdout.readline() == "ready\n"
        bound = (
            "import socket, sys\n"
            "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
            "s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)\n"
            "s.bind((sys.argv[2], 8081)); s.settimeout(2)\n"
            "s.sendto(b'x', (sys.argv[1], 7070))\n"
            "try: print(s.recv(100))\n"
            "except OSError as error: print(type(error).__name__)\n"
        )
        there, own = lab.address("outer", "front"), lab.address("client", "app")
        assert lab.in_guest("client", sys.executable, "-c", bound, there, own).strip() == "TimeoutError"
        path.write_text(FRONT_POLICY)
        lab.run("policy", "apply", "-f", str(path))
        assert balanced.names("outer", addresses["front4"], count=30) == set(WEBS)
        assert balanced.ignored(("outer", addresses["front4"], 90, "tcp"), ("client", addresses["app4"], 80, "tcp"))
        path.write_text(FRONT_POLICY.replace("guest: outer", "guest: client"))
        lab.run("policy", "apply", "-f", str(path))
        assert balanced.names("outer", addresses["front4"], count=1) == {"TimeoutError"}
        assert balanced.names("client", addresses["app4"], count=30) == set(WEBS)
    finally:
        if echo is not None:
            echo.kill()
            echo.wait()
        path.write_text("networks: {app: allow}\n")
        lab.run("policy", "apply", "--prune", "-f", str(path))
        lab.command("lb", "rm", "shop")
    assert rows(lab) == before


def test_kill_everything(balanced: Balanced) -> None:
    lab = balanced.lab
    before = rows(lab)
    create = ("lb", "create", "shop", "--network", "app", "--port", "80:8080", "--backend", "alias=web")
    lab.run(*create, "--publish", "127.0.0.1::80", "--health-check", "interval=1s,timeout=1s,failures=2")
    addresses = balanced.addresses("shop")

    def as_described() -> bool:
        answers = [balanced.names("client", address, count=24) for address in (*addresses.values(), "shop")]
        return answers == [set(WEBS)] * 3 and balanced.health("shop") == ALL_UP

    until(as_described, "the balancer works")
    for victim in ("bridge", "ovsdb-server", "ovs-vswitchd", "ovn-northd", "ovn-controller", "helper", "disk"):
        lab.kill_and_wait(victim)
        until(as_described, f"the balancer works after {victim} was killed", 60)
        assert balanced.addresses("shop") == addresses
    assert len(lab.json("lb", "show", "shop")["balancer"]["published"]) == 1
    lab.run("lb", "rm", "shop")
    until(lambda: _without_ids(rows(lab)) == _without_ids(before), "nothing of it is left")


def _without_ids(found: list[str]) -> list[str]:
    """Rows that were made anew have other uuids: how many of each table there are."""
    return sorted(json.loads(row)[0] for row in found)
