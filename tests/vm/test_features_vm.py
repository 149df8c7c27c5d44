"""What users run: policies, trace, limits, captures, mirrors, load balancers, IPv6 and DHCP between virtual machines,
over the helper's image with its kernel's data path. tests/system has all cases of each, in namespaces; here each is
shown to hold with traffic.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from plain import plain_initfs, switched_on
from system.fabric import TAPLOOM, camel
from test_balancer_lab import CLIENT, Balanced
from test_capture_lab import blocks, tcpdump
from test_mirror_lab import transfer
from test_policy_lab import Connection
from test_policy_property import Prober, apply
from test_qos_lab import outgoing, udp
from test_trace_lab import check, told
from vmlab import VmFabric, compile_tool, until, vm_fabric

from taploom.contracts.taploom.bridge.v1 import TraceVerdict
from taploom.pcapng import INBOUND, OUTBOUND, Interface, Packet, Statistics

pytestmark = pytest.mark.system

GUESTS = ("web", "db", "mal")
OUTSIDE = {4: "198.51.100.1", 6: "2001:db8:1::1"}  # see lab/internet.py
# Tables that a feature has rows in, or changes rows of.
TABLES = (
    *("ACL", "Address_Set", "DHCP_Options", "Load_Balancer", "Load_Balancer_Health_Check", "Logical_Router"),
    *("Logical_Router_Port", "Logical_Router_Static_Route", "Logical_Switch", "Logical_Switch_Port", "Meter", "NAT"),
    *("Port_Group", "QoS"),
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, watch_consoles: Callable[[Path], None]) -> Iterator[VmFabric]:
    """All guests are on app, and db is postgres there; web and db are on six, which has no IPv4."""
    with vm_fabric(compile_tool(tmp_path_factory.mktemp("tool") / "vmtool"), *GUESTS) as lab:
        watch_consoles(lab.path)
        lab.run("network", "create", "app", "--ipv6")
        lab.run("network", "create", "six", "--no-ipv4", "--ipv6")
        for network, guest, *options in (
            *(("app", "web"), ("app", "mal"), ("app", "db", "--alias", "postgres")),
            *(("six", "web"), ("six", "db", "--alias", "postgres")),
        ):
            lab.run("network", "connect", network, guest, *options)
        lab.until_whole()
        yield lab


class Patient(Prober):
    """Asks twice for what is not answered: emulated processors take their time."""

    def ask(self, probes: list[tuple[str, str, int]]) -> None:
        self._probes = probes
        super().ask(probes)

    def answers(self) -> list[bool]:
        found = super().answers()
        again = [number for number, answer in enumerate(found) if not answer]
        if again:
            super().ask([self._probes[number] for number in again])
            for number, answer in zip(again, super().answers(), strict=True):
                found[number] = answer
        return found


@pytest.fixture(scope="module")
def probers(lab: VmFabric) -> Iterator[dict[str, Prober]]:
    with ThreadPoolExecutor() as pool:
        found = dict(zip(GUESTS, pool.map(lambda guest: Patient(lab, guest), GUESTS), strict=True))
    yield found
    for prober in found.values():
        prober.close()


@pytest.fixture(scope="module")
def balanced(lab: VmFabric) -> Iterator[Balanced]:
    """db and mal serve."""
    found = Balanced(lab)
    with ThreadPoolExecutor() as pool:
        list(pool.map(found.serve, ("db", "mal")))
    yield found
    for guest in list(found.servers):
        found.stop(guest)


def rows(lab: VmFabric) -> list[str]:
    """The rows of OVN's northbound database that a feature may have changed."""
    lists = " -- ".join(f"list {table}" for table in TABLES)
    command = f"ovn-nbctl --db=unix:/run/taploom-helper/run/db.sock --format=csv --data=json {lists}"
    return sorted(lab.in_helper("sh", "-c", command).splitlines())


@pytest.fixture(scope="module")
def empty(lab: VmFabric) -> list[str]:
    """The rows without any feature."""
    return rows(lab)


@pytest.fixture(autouse=True)
def nothing_left(lab: VmFabric, empty: list[str]) -> Iterator[None]:
    """Each test leaves OVN as it was, row for row."""
    yield
    assert rows(lab) == empty


@pytest.fixture
def no_policy(lab: VmFabric) -> Iterator[None]:
    yield
    apply(lab, {"networks": dict.fromkeys(("app", "six"), "allow")})


@pytest.mark.usefixtures("no_policy")
def test_policy(lab: VmFabric, probers: dict[str, Prober], balanced: Balanced) -> None:
    """What is allowed passes, and nothing else; a change cuts what is no longer allowed, and only that."""
    db, db6, web = lab.address("db", "app"), lab.address("db", "app", 6), lab.address("web", "app")
    incoming = [
        {"name": "from-web", "from": [{"group": "web"}], "protocol": "tcp", "ports": [7001, 9090]},
        {"name": "for-now", "from": [{"guest": "mal"}], "protocol": "tcp", "ports": [9090]},
        {"name": "rest", "action": "reject", "priority": 0, "log": True},
    ]
    groups = {
        "web": {
            "members": [{"guest": "web"}],
            "out": [{"name": "to-db", "to": [{"group": "db"}], "protocol": "tcp", "ports": [7001, 7002, 9090]}],
        },
        "mal": {"members": [{"guest": "mal"}], "out": [{"name": "all"}]},
        "db": {"members": [{"alias": "postgres", "network": "app"}], "in": incoming},
    }
    policy = {"networks": {"app": "deny"}, "groups": groups}
    apply(lab, policy)
    asked = {
        "web": [("tcp", db, 7001), ("tcp", db6, 7001), ("tcp", db, 7002), ("tcp", db, 7003), ("icmp", db, 0)],
        "mal": [("tcp", db, 7001), ("udp", db6, 7001), ("tcp", web, 7001)],
        "db": [("tcp", web, 7001), ("icmp", web, 0)],
    }
    for guest, probes in asked.items():
        probers[guest].ask(probes)
    answers = {guest: probers[guest].answers() for guest in asked}
    assert answers == {"web": [True, True, False, False, False], "mal": [False] * 3, "db": [False] * 2}
    kept, going = Connection(lab, "web", db6, 9090), Connection(lab, "mal", db, 9090)
    try:
        assert (kept.outcome, going.outcome) == ("connected", "connected")
        assert kept.lives()
        assert going.lives()
        del incoming[1]
        apply(lab, policy)
        assert not going.lives(3.0)
        assert kept.lives(20.0)
        allowed, rest = (rule["packets"] for rule in lab.json("policy", "show", "db")["incoming"])
        assert allowed >= 1
        assert rest >= 1
        logged = until(lambda: lab.run("policy", "log"), "a line of the log").splitlines()
        assert any(re.search(rf"reject web {re.escape(web)}:\d+ > db {re.escape(db)}:7002 tcp", at) for at in logged)
    finally:
        kept.close()
        going.close()


@pytest.mark.usefixtures("no_policy")
def test_trace(lab: VmFabric, probers: dict[str, Prober]) -> None:
    """Its verdict is what packets find, of both kinds: direct, out by the router, to the machine, and balanced."""
    lab.run(
        "lb", "create", "shop", "--network", "app", *("--port", "80:7001", "--port", "81:7002", "--backend", "guest=db")
    )
    try:
        shop = next(one["address"] for one in lab.json("lb", "show", "shop")["balancer"]["addresses"])
        db, db6, mal = lab.address("db", "app"), lab.address("db", "app", 6), lab.address("mal", "app")
        gateway = next(one for one in lab.json("network", "inspect", "app")["gateways"] if "." in one)
        out = [
            {"name": "to-db", "to": [{"guest": "db"}], "protocol": "tcp"},
            {"name": "ping", "to": [{"cidr": "198.51.100.0/24"}], "protocol": "icmp"},
            {"name": "host", "to": "host", "protocol": "tcp"},
        ]
        incoming = [
            {"name": "some", "protocol": "tcp", "ports": [7001]},
            {"name": "not-this", "protocol": "tcp", "ports": [7002], "action": "drop"},
            {"name": "nor-this", "protocol": "tcp", "ports": [7003], "action": "reject"},
        ]
        groups = {
            "web": {"members": [{"guest": "web", "network": "app"}], "out": out},
            "db": {"members": [{"guest": "db", "network": "app"}], "in": incoming},
        }
        apply(lab, {"networks": {}, "groups": groups})
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            check(
                lab,
                probers,
                [
                    ("web", db, "tcp", 7001, "+ "),
                    ("web", db6, "tcp", 7001, "+ "),
                    ("web", db, "tcp", 7002, "into db: rule not-this of group db drops it"),
                    ("web", db6, "tcp", 7003, "into db: rule nor-this of group db rejects it"),
                    ("web", mal, "tcp", 7001, "out of web: no rule allows it, and group web says what may go out"),
                    ("web", OUTSIDE[4], "icmp", 0, "+ "),
                    ("mal", OUTSIDE[6], "icmp", 0, "+ "),
                    ("web", gateway, "tcp", port, "+ "),
                    ("web", shop, "tcp", 80, "+ "),
                    ("web", shop, "tcp", 81, "into db: rule not-this of group db drops it"),
                ],
            )
        found = told(lab, "web", "shop", "tcp", 80)
        hands = [step.text for path in found.paths for step in path.steps]
        assert any(text.startswith("the load balancer at ") and ":7001" in text for text in hands), hands
        left = [step.text for path in told(lab, "web", OUTSIDE[4]).paths for step in path.steps]
        assert any(text.startswith("its source becomes ") for text in left), left
        assert told(lab, "web", "nosuch").verdict == TraceVerdict.STOPS
    finally:
        lab.run("lb", "rm", "shop")


RATE, OFFERED = 4, "12M"


def test_limits(lab: VmFabric) -> None:
    """UDP arrives at the rate, in both directions; the status says what passes and what is dropped; marks arrive."""
    server = lab.start_in_guest("db", "iperf3", "-s", "--forceflush")
    try:
        assert server.stdout is not None
        until(lambda: "listening" in (server.stdout.readline() if server.stdout else ""), "iperf3 listens")
        limit = ("--network", "app", "--rate", f"{RATE}mbit", "--burst", "80k")
        lab.run("qos", "set", "web", *limit, "--dscp", "46")
        for options in ((), ("-R",)):
            until(
                lambda o=options: abs(udp(lab, *o, offered=OFFERED) / RATE - 1) < 0.1,
                f"the rate is the limit {options}",
            )  # type: ignore[misc]
        with capture(
            lab, "db", "--network", "app", "--filter", "udp port 5201 and ip[1] == 0xb8", "--count", "5"
        ) as found:
            sending = lab.start_in_guest(
                "web", "iperf3", "-u", "-b", OFFERED, "-t", "600", "-c", lab.address("db", "app")
            )
            try:

                def measured() -> bool:
                    passed, dropped = outgoing(lab, "web", "app")
                    return passed is not None and abs(passed / 1e6 - RATE) < RATE / 10 and dropped > 2e6

                until(measured, "rates in the status")
            finally:
                sending.kill()
                sending.wait()
        assert len(found.packets) == 5
        lab.run("qos", "rm", "web", "--network", "app")
        until(lambda: udp(lab, offered=OFFERED, seconds=1) > 2 * RATE, "there is no limit any more")
    finally:
        server.kill()
        server.wait()


class Captured:
    """What a capture has written, once it is over."""

    def __init__(self) -> None:
        self.data = b""
        self.said = ""

    @property
    def packets(self) -> list[Packet]:
        return [block for block in blocks(self.data) if isinstance(block, Packet)]


@contextlib.contextmanager
def capture(lab: VmFabric, *arguments: str) -> Iterator[Captured]:
    """Captures while the block runs, from its beginning on."""
    argv = [TAPLOOM, "capture", *arguments, "-w", "-"]
    found = Captured()
    with subprocess.Popen(argv, env=lab.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            # The first that comes says what the interfaces are; then its sockets are there.
            found.data = os.read(process.stdout.fileno(), 1 << 16)
            yield found
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            rest, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, said
    found.data += rest
    found.said = said.decode()


def test_capture(lab: VmFabric) -> None:
    """Each packet once, in the right direction, and nothing of others; nothing is left of it in the helper."""
    web, db = lab.address("web", "app"), lab.address("db", "app")
    before = packet_sockets(lab)
    with capture(lab, "web", "--network", "app", "--filter", "icmp or icmp6") as found:
        lab.in_guest("web", "ping", "-n", "-c3", "-i0.2", "-W20", db)
        lab.in_guest("db", "ping", "-n", "-c1", "-W20", lab.address("web", "app", 6))
        lab.in_guest("mal", "ping", "-n", "-c1", "-W20", db)
    assert [block.name for block in blocks(found.data) if isinstance(block, Interface)] == ["web@app"]
    echoes = [one for one in found.packets if one.data[12:14] == b"\x08\x00"]
    # An answer may take longer than the next request waits.
    assert sorted(one.direction for one in echoes) == sorted([OUTBOUND, INBOUND] * 3)
    assert echoes[0].direction == OUTBOUND
    (statistics,) = [block for block in blocks(found.data) if isinstance(block, Statistics)]
    assert (statistics.accepted, statistics.dropped) == (len(found.packets), 0)
    assert found.said == f"{len(found.packets)} packets captured\n"
    lines = tcpdump(found.data, "icmp")
    assert f"IP {web} > {db}: ICMP echo request" in lines[0]
    assert len(tcpdump(found.data, "icmp6 and (ip6[40] == 128 or ip6[40] == 129)")) == 2

    until(lambda: packet_sockets(lab) == before and not workers(lab), "nothing is left of it")


def packet_sockets(lab: VmFabric) -> int:
    """How many there are in the helper."""
    return lab.in_helper("cat", "/proc/net/packet").count("\n") - 1


def workers(lab: VmFabric) -> list[str]:
    """The processes of captures in the helper."""
    return lab.in_helper("sh", "-c", "grep -la '[c]apture_worker' /proc/[0-9]*/cmdline; true").split()


def test_mirror(lab: VmFabric) -> None:
    """What another guest has is what web has, frame by frame, large segments whole."""
    mirror = ("web", "--network", "app", "--to", "mal")
    try:
        lab.run("mirror", "add", *mirror)
        own, copied = transfer(lab, lab.address("db", "app"), "web", "mal", size=200_000)
        assert copied == own
        assert sum(size for size, _ in copied) > 400_000
        assert max(size for size, _ in copied) > 1514
    finally:
        lab.run("mirror", "rm", *mirror)


def test_load_balancer(lab: VmFabric, balanced: Balanced) -> None:
    """TCP and UDP, both families, by its name, published, and to oneself; a backend that is dead gets nothing."""
    create = ("lb", "create", "shop", "--network", "app", "--port", "80:8080", "--port", "80:8080/udp")
    backends = ("--backend", "guest=db", "--backend", "guest=mal", "--publish", "127.0.0.1::80")
    both = {"db", "mal"}
    try:
        lab.run(*create, *backends, "--health-check", "interval=1s,timeout=10s,failures=2")
        for target in (*balanced.addresses("shop").values(), "shop"):
            balanced.until_names(both, "web", target)
            balanced.until_names(both, "web", target, "udp")
        balanced.until_names(both, "db", "shop")  # one that is its own client
        published = lab.json("lb", "show", "shop")["balancer"]["published"][0]["host_port"]
        asked = [sys.executable, CLIENT, "127.0.0.1", str(published), "tcp", "12"]
        answers = json.loads(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)
        assert {answer.split()[0] for answer in answers} == both
        until(lambda: balanced.health("shop") == {"db": {"up"}, "mal": {"up"}}, "both are up")
        balanced.stop("mal")
        until(lambda: balanced.health("shop")["mal"] == {"down"}, "mal is down")
        balanced.until_names({"db"}, "web", "shop")
        balanced.serve("mal")
        until(lambda: balanced.health("shop")["mal"] == {"up"}, "mal is up again")
        balanced.until_names(both, "web", "shop")
    finally:
        lab.run("lb", "rm", "shop")


def test_a_network_of_ipv6_alone(lab: VmFabric) -> None:
    address = lab.address("db", "six", 6)
    for name in ("db.six", "postgres.six"):
        assert lab.in_guest("web", "getent", "ahostsv6", name).split()[0] == address
        assert lab.answers("web", name)
    assert lab.guest("web", "getent", "ahostsv4", "db.six").returncode == 2
    own = next(e for e in lab.json("guest", "inspect", "web")["endpoints"] if camel(e, "network_name") == "six")
    interface = camel(own, "interface_name")
    assert lab.in_guest("web", "ip", "-4", "address", "show", "dev", interface) == ""
    # Out by this network, with the helper's address.
    (gateway,) = lab.json("network", "inspect", "six")["gateways"]
    lab.in_guest("web", "ip", "route", "add", OUTSIDE[6], "via", gateway, "dev", interface)
    try:
        lab.in_guest("web", "ping", "-n", "-c1", "-W20", OUTSIDE[6])
    finally:
        lab.in_guest("web", "ip", "route", "del", OUTSIDE[6])


def test_a_machine_that_asks_dhcp(
    lab: VmFabric, kernel: Path, tmp_path: Path, watch_consoles: Callable[[Path], None]
) -> None:
    watch_consoles(tmp_path)
    result = lab.command("guest", "register", "vm1", "--qemu-server", f"unix:{lab.path}/vm1.sock")
    assert result.returncode == 0, result.stderr
    arguments = result.stderr.strip().removeprefix("qemu: ").split()
    try:
        lab.run("network", "connect", "app", "vm1", "--alias", "plain")
        web, own = lab.address("web", "app"), lab.address("vm1", "app")
        with switched_on(kernel, plain_initfs(tmp_path), tmp_path, arguments, web) as vm:
            vm.until_says(lab, f"PING {own}", f"NAME {web}")
            lab.until_answers("web", "plain", "-4")
    finally:
        lab.run("guest", "rm", "vm1")
