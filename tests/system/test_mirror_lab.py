"""Mirrors in a lab, by the commands that people type: exact copies, what comes back, and nothing that stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fabric import Fabric, fabric, until
from test_policy_lab import rows

pytestmark = pytest.mark.system

WEB, DB, IDS, GATEWAY = "10.77.0.2", "10.77.0.3", "10.77.1.2", "10.77.1.1"  # the gateway is that of watch
PORT, END = "5001", "5002"
SNIFFER = str(Path(__file__).with_name("sniff_frames.py"))
# Sends what it is sent back, for one connection.
ECHO = """
import socket, sys
with socket.create_server(("::", int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=True) as server:
    print("ready", flush=True)
    with server.accept()[0] as peer:
        while data := peer.recv(65536):
            peer.sendall(data)
"""
# Has so many bytes echoed, checks them, and then tells the sniffers that this was all.
CLIENT = """
import os, socket, sys, threading
address, port, end, size = sys.argv[1], *map(int, sys.argv[2:])
data, got = os.urandom(size), bytearray()
with socket.create_connection((address, port), timeout=30) as sock:
    def send():
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
    threading.Thread(target=send).start()
    while part := sock.recv(65536):
        got += part
assert got == data
with socket.socket(sock.family, socket.SOCK_DGRAM) as marker:
    marker.sendto(b"end", (address, end))
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Fabric]:
    with fabric("web", "db", "ids") as lab:
        for number, (network, *guests) in enumerate((("app", "web", "db"), ("watch", "ids"))):
            lab.run("network", "create", network, "--subnet", f"10.77.{number}.0/24", "--ipv6")
            for guest in guests:
                lab.run("network", "connect", network, guest)
        assert (lab.address("web", "app"), lab.address("db", "app"), lab.address("ids", "watch")) == (WEB, DB, IDS)
        yield lab


def ruleset(lab: Fabric) -> str:
    """The tables of the helper's netdev family."""
    pid = lab.processes()["helper"]["pid"]
    command = ["nsenter", f"--net=/proc/{pid}/ns/net", "nft", "list", "ruleset", "netdev"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def echoes(lab: Fabric, count: int, pings: int = 3) -> list[str]:
    """What ids sees while web pings db so often, which must be so many packets."""
    arguments = ("tcpdump", "-n", "-l", "-i", "eth0", "--immediate-mode", "icmp")
    sniffing = lab.start_in_guest("ids", *arguments)
    assert sniffing.stdout is not None
    try:
        until(lambda: "listening" in (sniffing.stdout.readline() if sniffing.stdout else ""), "tcpdump listens")
        lab.in_guest("web", "ping", "-n", f"-c{pings}", "-i0.1", DB)
        # One that nobody copies: when its answer is there, which comes by the same way as copies, all before it are.
        lab.in_guest("ids", "ping", "-n", "-c1", GATEWAY)
        found: list[str] = []
        while (line := sniffing.stdout.readline()) and f"IP {GATEWAY} > {IDS}:" not in line:
            if f"IP {IDS} > {GATEWAY}:" not in line:
                found.append(line)
    finally:
        sniffing.kill()
        sniffing.wait()
    assert len(found) == count, found
    return found


def transfer(lab: Fabric, address: str, *sniffers: str, size: int = 1_000_000) -> list[Any]:
    """Has db echo web's bytes over TCP; returns the frames that these guests have seen of it, as [size, digest],
    sorted."""
    waiting = [lab.start_in_guest("db", sys.executable, "-c", ECHO, PORT)]
    waiting += [lab.start_in_guest(one, sys.executable, SNIFFER, "eth0", PORT, END) for one in sniffers]
    try:
        for one in waiting:
            assert one.stdout is not None
            assert one.stdout.readline() == "ready\n"
        lab.in_guest("web", sys.executable, "-c", CLIENT, address, PORT, END, str(size))
        return [json.loads(one.communicate(timeout=60)[0]) for one in waiting[1:]]
    finally:
        for one in waiting:
            one.kill()
            one.wait()


def test_exact_copies(lab: Fabric) -> None:
    before = rows(lab)
    assert "taploom_mirrors" not in ruleset(lab)
    echoes(lab, 0)
    lab.run("mirror", "add", "web", "--to", "ids")
    lines = echoes(lab, 6)
    requests = [line for line in lines if f"IP {WEB} > {DB}: ICMP echo request" in line]
    assert len(requests) == 3
    assert rows(lab) == before, "OVN knows of nothing"
    assert lab.json("mirror", "ls")["mirrors"] == [
        {
            "source": {"guest": "web", "network": "app"},
            "target": {"guest": "ids", "network": "watch"},
            "direction": "both",
        }
    ]
    # One direction, and again the other.
    lab.run("mirror", "add", "web", "--to", "ids", "--direction", "out")
    assert all("echo request" in line for line in echoes(lab, 3))
    lab.run("mirror", "add", "web", "--network", "app", "--to", "ids", "--to-network", "watch", "--direction", "in")
    assert all("echo reply" in line for line in echoes(lab, 3))
    assert "web@app   in          ids@watch" in lab.run("mirror", "ls")
    lab.run("mirror", "rm", "web", "--to", "ids")
    assert "taploom_mirrors" not in ruleset(lab)
    echoes(lab, 0)


@pytest.mark.parametrize("family", [4, 6])
def test_tcp_with_large_segments(lab: Fabric, family: int) -> None:
    """What ids has is what web has, frame by frame: as large, with the same bytes, and as often."""
    lab.run("mirror", "add", "web", "--to", "ids")
    own, copied = transfer(lab, lab.address("db", "app", family), "web", "ids")
    assert copied == own
    assert sum(size for size, _ in copied) > 2_000_000
    assert max(size for size, _ in copied) > 1514, "large segments stay whole"
    lab.run("mirror", "rm", "web", "--to", "ids")


def test_comings_and_goings(lab: Fabric) -> None:
    lab.run("mirror", "add", "web", "--to", "ids")
    lab.run("mirror", "add", "db", "--to", "ids", "--direction", "in")
    echoes(lab, 9)
    # A mirror goes with either connection, and with it alone.
    lab.run("network", "disconnect", "app", "db")
    assert [one["source"]["guest"] for one in lab.json("mirror", "ls")["mirrors"]] == ["web"]
    lab.run("network", "connect", "app", "db")
    echoes(lab, 6)
    lab.run("network", "disconnect", "watch", "ids")
    assert lab.json("mirror", "ls")["mirrors"] == []
    until(lambda: "taploom_mirrors" not in ruleset(lab), "nothing is copied")
    lab.run("network", "connect", "watch", "ids")
    echoes(lab, 0)
    # Others that come and go do not disturb it.
    lab.run("mirror", "add", "web", "--to", "ids")
    lab.run("network", "connect", "watch", "db")
    echoes(lab, 6)
    lab.run("network", "disconnect", "watch", "db")
    echoes(lab, 6)
    lab.run("mirror", "rm", "web", "--to", "ids")


def test_refusals(lab: Fabric) -> None:
    lab.run("mirror", "add", "web", "--to", "ids")
    before = lab.json("mirror", "ls"), ruleset(lab)
    for arguments, reason in (
        (("web", "--to", "web"), "web on app cannot be mirrored to itself"),
        (("ids", "--to", "db"), "ids on watch receives copies, which would be copied again"),
        (("db", "--to", "web"), "web on app is mirrored itself"),
        (("nobody", "--to", "ids"), "guest nobody not found"),
        (("web", "--to", "ids", "--to-network", "app"), "guest ids is not connected to network app"),
    ):
        assert reason in lab.fails("mirror", "add", *arguments)
    assert "there is no mirror of db on app to ids on watch" in lab.fails("mirror", "rm", "db", "--to", "ids")
    assert (lab.json("mirror", "ls"), ruleset(lab)) == before
    lab.run("mirror", "rm", "web", "--to", "ids")


def test_kill_everything(lab: Fabric) -> None:
    lab.run("mirror", "add", "web", "--to", "ids")
    for victim in ("bridge", "ovs-vswitchd", "ovsdb-server", "ovn-controller", "disk"):
        lab.kill_and_wait(victim)
        lab.until_answers("web", DB)
        echoes(lab, 4, pings=2)
    # A helper that nobody tells anything copies nothing: what a run before has left is not there any more.
    bridge, helper = (lab.processes()[name]["pid"] for name in ("bridge", "helper"))
    os.kill(bridge, signal.SIGSTOP)
    try:
        assert "taploom_mirrors" in ruleset(lab)
        os.kill(helper, signal.SIGKILL)
        until(lambda: lab.processes()["helper"]["pid"] not in (0, None, helper), "the helper is there again")
        until(lambda: "taploom_mirrors" not in ruleset(lab), "nothing of the run before is there")
    finally:
        os.kill(bridge, signal.SIGCONT)
    lab.until_converged()
    lab.until_answers("web", DB)
    echoes(lab, 4, pings=2)
    lab.run("mirror", "rm", "web", "--to", "ids")
    assert "taploom_mirrors" not in ruleset(lab)
