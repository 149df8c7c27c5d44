"""Limits and marks in a lab, by the commands that people type: rates and marks on the wire; all comes back, or goes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fabric import Fabric, fabric, until
from test_lab_docker import Docker
from test_policy_lab import rows

pytestmark = pytest.mark.system

PAYLOAD = 1400  # bytes of a datagram


@pytest.fixture(scope="module")
def lab() -> Iterator[Fabric]:
    with fabric("web", "db") as lab:
        lab.run("network", "create", "app", "--ipv6")
        for guest in ("web", "db"):
            lab.run("network", "connect", "app", guest)
        server = lab.start_in_guest("db", "iperf3", "-s", "--forceflush")
        assert server.stdout is not None
        until(lambda: "listening" in (server.stdout.readline() if server.stdout else ""), "iperf3 listens")
        yield lab
        server.kill()


def udp(lab: Fabric, *options: str, seconds: int = 3, offered: str = "40M", family: int = 4) -> float:
    """Mbit/s of UDP that arrive from web at db or, with -R, the other way round; headers of all layers counted.

    A sender that gets no processor for some of the time sends less than its limit: it is measured until it did.
    """
    command = ("iperf3", "-J", "-u", "-b", offered, "-t", str(seconds), "-l", str(PAYLOAD), *options)
    received = iperf3(lab, *command, "-c", lab.address("db", "app", family))
    packets = received["bytes"] / PAYLOAD
    return float(packets * (PAYLOAD + (42 if family == 4 else 62)) * 8 / received["seconds"] / 1e6)


def outgoing(lab: Fabric, guest: str, network: str) -> tuple[Any, Any]:
    """What the limit of what a guest sends on a network lets through and drops, in bits per second, as `status` has it;
    None before it was measured.
    """
    (link,) = [
        one
        for one in lab.status()["links"]
        if (one["endpoint"]["guest_name"], one["endpoint"]["network_name"]) == (guest, network)
    ]
    (way,) = [one for one in link["qos"] if one["rule"]["direction"] == "out"]
    return way["passed_bits_per_second"], way["dropped_bits_per_second"]


def tcp(lab: Fabric, *options: str, seconds: int = 5) -> float:
    """Mbit/s of TCP, after the first second."""
    command = ("iperf3", "-J", "-t", str(seconds), "-O", "1", *options, "-c", lab.address("db", "app"))
    return float(iperf3(lab, *command)["bits_per_second"] / 1e6)


def iperf3(lab: Fabric, *command: str) -> dict[str, float]:
    """What has been received in a measurement that web makes; again while db is busy with one that somebody killed."""

    def received() -> dict[str, float] | None:
        result = lab.guest("web", *command)
        found = json.loads(result.stdout)
        if "busy" in found.get("error", ""):  # which iperf3 may say with exit code 0
            return None
        assert result.returncode == 0, result.stdout
        # Which side's `sum` is of, differs between releases of iperf3.
        return dict(found["end"]["sum_received"])

    return dict(until(received, "iperf3 measures"))


def test_rates(lab: Fabric) -> None:
    before = rows(lab)
    lab.run("qos", "set", "web", "--network", "app", "--rate", "10mbit", "--burst", "150k", "--direction", "out")
    lab.run("qos", "set", "web", "--rate", "20mbit", "--burst", "150k", "--direction", "in")
    until(lambda: 9 < udp(lab) < 11, "the rate is the limit")
    until(lambda: 18 < udp(lab, "-R", offered="80M") < 22, "the rate is the limit")
    until(lambda: 9 < udp(lab, "-6", family=6, seconds=2) < 11, "the rate is the limit")
    # Each guest has its own limits, also where they are the same.
    lab.run("qos", "set", "--network", "app", "--rate", "10mbit", "--burst", "150k")
    until(lambda: 9 < udp(lab) < 11, "the rate is the limit")
    until(lambda: 9 < udp(lab, "-R") < 11, "the network's default is db's limit")
    lab.run("qos", "rm", "--network", "app")
    # The measured rate is what passes, whatever is offered.
    sending = lab.start_in_guest("web", "iperf3", "-u", "-b", "30M", "-t", "60", "-c", lab.address("db", "app"))
    try:

        def measured() -> bool:
            passed, dropped = outgoing(lab, "web", "app")
            return passed is not None and 9e6 < passed < 11e6 and bool(15e6 < dropped < 28e6)

        until(measured, "rates in the status")
        shown = lab.run("status")
        assert "web on app  out" in shown
        assert "10mbit" in shown
    finally:
        sending.kill()
        sending.wait()
    # With the burst that it has by default, TCP comes near the rate.
    lab.run("qos", "set", "web", "--network", "app", "--rate", "20mbit")
    until(lambda: 14 < tcp(lab) < 24, "the rate is the limit")
    lab.run("qos", "rm", "web")
    assert rows(lab) == before
    until(lambda: udp(lab, seconds=1) > 25, "there is no limit any more")


def test_marks(lab: Fabric) -> None:
    before = rows(lab)
    lab.run("qos", "set", "web", "--network", "app", "--dscp", "46")
    for family in (4, 6):
        field = "ip[1] == 0xb8" if family == 4 else "ip6[0:2] & 0x0ff0 == 0x0b80"
        protocol = "icmp" if family == 4 else "icmp6 and ip6[40] == 128"
        sniffing = lab.start_in_guest("db", "tcpdump", "-n", "-l", "-c3", "-i", "eth0", f"{protocol} and {field}")
        assert sniffing.stdout is not None
        until(lambda s=sniffing: "listening" in s.stdout.readline(), "tcpdump listens")  # type: ignore[misc]
        lab.in_guest("web", "ping", "-n", "-c3", "-i0.2", lab.address("db", "app", family))
        out, _ = sniffing.communicate(timeout=20)
        assert "3 packets captured" in out
    # A mark and a rate, together and apart.
    lab.run("qos", "set", "web", "--rate", "10mbit", "--burst", "150k")
    (entry,) = lab.json("qos", "ls")["entries"]
    assert [(rule["direction"], rule["dscp"]) for rule in entry["rules"]] == [("out", 46), ("in", None)]
    until(lambda: 9 < udp(lab) < 11, "the rate is the limit")
    lab.run("qos", "rm", "web", "--direction", "out")
    until(lambda: udp(lab, seconds=1) > 25, "there is no limit any more")
    lab.run("qos", "rm", "web", "--network", "app")
    assert rows(lab) == before


def test_refusals(lab: Fabric) -> None:
    before = rows(lab)
    place = ("web", "--network", "app")
    for arguments, reason in (
        ((*place, "--rate", "0"), "rate 0 would let nothing pass"),
        ((*place, "--rate", "10mib"), "rate '10mib' is malformed: write it as 10mbit, 500kbit or 1gbit"),
        ((*place, "--rate", "5"), "rate 5 bit/s is out of range: use 8kbit to 400gbit"),
        ((*place, "--burst", "200k"), "a burst is of a rate: give the rate too"),
        ((*place, "--rate", "1mbit", "--burst", "1k"), "burst 1000 bytes is out of range: use 66k"),
        ((*place, "--dscp", "64"), "DSCP 64 is out of range: use 0 to 63"),
        ((*place, "--dscp", "ef"), "DSCP 'ef' is malformed"),
        ((*place, "--dscp", "1", "--direction", "in"), "what a guest receives is not marked"),
        (place, "nothing is said: give a rate or a DSCP"),
        (("nobody", "--rate", "1mbit"), "guest nobody not found"),
        (("web", "--network", "nowhere", "--rate", "1mbit"), "network nowhere not found"),
        (("web", "--network", "bridge", "--rate", "1mbit"), "is not connected to network bridge"),
        (("--network", "host", "--rate", "1mbit"), "network host is a name only"),
    ):
        assert reason in lab.fails("qos", "set", *arguments)
    assert "Name a guest, or --network" in lab.fails("qos", "set", "--rate", "1mbit")
    assert "nothing is said of web on app" in lab.fails("qos", "rm", "web")
    assert lab.json("qos", "ls")["entries"] == []
    assert rows(lab) == before


def test_kill_everything(lab: Fabric) -> None:
    before = rows(lab)
    lab.run("qos", "set", "web", "--network", "app", "--rate", "10mbit", "--burst", "150k")

    def limited() -> bool:
        return 8 < udp(lab, seconds=1) < 12

    assert limited()
    until(lambda: 8 < udp(lab, "-R", seconds=1) < 12, "the rate is the limit")
    for victim in ("bridge", "ovsdb-server", "ovs-vswitchd", "ovn-northd", "ovn-controller", "helper", "disk"):
        lab.kill_and_wait(victim)
        lab.until_answers("web", lab.address("db", "app"))
        until(limited, f"limited after {victim} was killed")
    until(lambda: 8 < udp(lab, "-R", seconds=1) < 12, "the rate is the limit")
    lab.run("qos", "rm", "web")
    assert [row for row in rows(lab) if '"QoS' in row] == [row for row in before if '"QoS' in row] == []
    until(lambda: udp(lab, seconds=1) > 25, "there is no limit any more")


def test_docker_users(lab: Fabric) -> None:
    """Options of networks and endpoints, and a container that is stopped and started."""
    docker = Docker(lab)
    for option in ("rate=0", "rate=fast", "burst=100k", "color=1", "in.dscp=1"):
        refused = docker.command("network", "create", "-o", f"taploom.qos.{option}", "odd")
        assert refused.returncode != 0, option
        assert b"taploom.qos." in refused.stderr
    docker("network", "create", "-o", "taploom.qos.rate=20mbit", "-o", "taploom.qos.dscp=10", "slow")
    try:
        docker("run", "-d", "--name", "one", "--network", "slow", "host", "sleep", "1000")
        (each,) = lab.json("qos", "ls")["entries"]
        assert (each["guest_name"], sorted(each["from_options"])) == ("", ["in", "out"])
        link = next(one for one in lab.status()["links"] if one["endpoint"]["guest_name"] == "one")
        found = {one["rule"]["direction"]: one["rule"] for one in link["qos"]}
        assert found["out"]["rate_bits_per_second"] == found["in"]["rate_bits_per_second"] == 20_000_000
        assert (found["out"]["dscp"], found["in"]["dscp"]) == (10, None)
        assert "comes from its driver options" in lab.fails("qos", "rm", "--network", "slow")
        # What was set of a container stays when it is stopped, and goes when it is taken off the network.
        lab.run("qos", "set", "one", "--network", "slow", "--rate", "5mbit", "--direction", "in")
        docker("restart", "-t", "0", "one")
        link = next(one for one in lab.status()["links"] if one["endpoint"]["guest_name"] == "one")
        assert {one["rule"]["rate_bits_per_second"] for one in link["qos"]} == {20_000_000, 5_000_000}
        docker("network", "disconnect", "slow", "one")
        docker("network", "connect", "--driver-opt", "taploom.qos.out.rate=1mbit", "slow", "one")
        link = next(one for one in lab.status()["links"] if one["endpoint"]["guest_name"] == "one")
        assert {one["rule"]["rate_bits_per_second"] for one in link["qos"]} == {20_000_000, 1_000_000}
        refused = docker.command("network", "connect", "--driver-opt", "taploom.qos.rate=1", "app", "one")
        assert b"rate 1 bit/s is out of range" in refused.stderr
    finally:
        docker("rm", "-f", "one")
        docker("network", "rm", "slow")
    assert lab.json("qos", "ls")["entries"] == []
