"""Guests on different networks cannot reach each other, whatever a root process in one of them sends."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fabric import Fabric, camel, fabric, until

pytestmark = pytest.mark.system

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def lab() -> Iterator[Fabric]:
    with fabric("mallory", "peer", "victim", "friend") as lab:
        lab.run("network", "create", "red", "--ipv6")
        lab.run("network", "create", "blue", "--ipv6")
        for guest in ("mallory", "peer"):
            lab.run("network", "connect", "red", guest)
        for guest in ("victim", "friend"):
            lab.run("network", "connect", "blue", guest)
        yield lab


class Sniffer:
    """The marks that arrive in a guest."""

    def __init__(self, lab: Fabric, guest: str) -> None:
        self._process = lab.start_in_guest(guest, sys.executable, str(HERE / "sniff_marks.py"), "eth0")
        assert self._process.stdout is not None
        self._lines = self._process.stdout
        assert self._lines.readline() == "ready\n"

    def until_end(self) -> list[str]:
        marks: list[str] = []
        for line in self._lines:
            if line == "end\n":
                return marks
            marks.append(line.strip())
        raise AssertionError("the sniffer ended")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def gateway_mac(lab: Fabric, guest: str, gateway: str) -> str:
    lab.until_answers(guest, gateway)
    return lab.in_guest(guest, "ip", "neigh", "show", gateway).split("lladdr ")[1].split()[0]


def test_raw_frames(lab: Fabric) -> None:
    gateways = {n: lab.json("network", "inspect", n)["gateways"][0] for n in ("red", "blue")}

    def facts(guest: str, network: str) -> tuple[str, str, str]:
        endpoint = lab.endpoint(guest, network)
        return camel(endpoint, "mac_address"), lab.address(guest, network), lab.address(guest, network, 6)

    mac, ip, ip6 = facts("mallory", "red")
    peer_mac, peer_ip, _ = facts("peer", "red")
    victim_mac, victim_ip, victim_ip6 = facts("victim", "blue")
    friend_mac, friend_ip, friend_ip6 = facts("friend", "blue")
    attack = {
        "interface": "eth0",
        "mac": mac,
        "ip": ip,
        "ip6": ip6,
        "gateway_mac": gateway_mac(lab, "mallory", gateways["red"]),
        "peer_mac": peer_mac,
        "peer_ip": peer_ip,
        "victim_mac": victim_mac,
        "victim_ip": victim_ip,
        "victim_ip6": victim_ip6,
        "victim_gateway": gateways["blue"],
        "victim_gateway_mac": gateway_mac(lab, "victim", gateways["blue"]),
        "spoof_mac": "02:00:00:00:be:ef",
        "spoof_ip": ip.rpartition(".")[0] + ".200",
    }
    peer, victim = Sniffer(lab, "peer"), Sniffer(lab, "victim")
    try:
        lab.in_guest("mallory", sys.executable, str(HERE / "send_attacks.py"), json.dumps(attack))
        from_mallory = peer.until_end()
        # The friend's frame comes after mallory's: what the victim has seen until then is all that it will see.
        friendly = {**attack, "mac": friend_mac, "ip": friend_ip, "ip6": friend_ip6}
        friendly |= {"peer_mac": victim_mac, "peer_ip": victim_ip}
        end = (
            "import sys, json; from scapy.all import *; a = json.loads(sys.argv[1]); "
            "conf.L2socket(iface='eth0').send(Ether(dst=a['peer_mac'], src=a['mac'])"
            " / IP(src=a['ip'], dst=a['peer_ip']) / UDP(sport=1, dport=1) / Raw(b'MARK<end>' + bytes(20)))"
        )
        lab.in_guest("friend", sys.executable, "-c", end, json.dumps(friendly))
        assert victim.until_end() == []
    finally:
        peer.close()
        victim.close()
    # On its own network mallory may broadcast; it may not pretend to be another or use VLANs.
    assert {mark for mark in from_mallory if mark.startswith(("peer", "vlan"))} == set()


def test_routes_and_addresses(lab: Fabric) -> None:
    victim, victim6 = lab.address("victim", "blue"), lab.address("victim", "blue", 6)
    red, blue = (lab.json("network", "inspect", n) for n in ("red", "blue"))
    red_gateway = next(g for g in red["gateways"] if ":" not in g)
    blue_gateway = next(g for g in blue["gateways"] if ":" not in g)
    blue_subnet = next(s for s in blue["subnets"] if ":" not in s)
    lab.until_answers("friend", victim)
    for target in (victim, victim6):
        assert not lab.answers("mallory", target)
    lab.in_guest("mallory", "ip", "route", "add", victim, "via", red_gateway, "dev", "eth0")
    assert not lab.answers("mallory", victim)
    lab.in_guest("mallory", "ip", "route", "replace", blue_gateway, "dev", "eth0", "scope", "link")
    lab.in_guest("mallory", "ip", "route", "replace", victim, "via", blue_gateway, "dev", "eth0")
    assert not lab.answers("mallory", victim)
    lab.in_guest("mallory", "ip", "route", "replace", victim, "dev", "eth0", "scope", "link")
    assert not lab.answers("mallory", victim)
    # An address of the other network, also as the source.
    spare = blue_subnet.partition("/")[0].rpartition(".")[0] + ".77"
    lab.in_guest("mallory", "ip", "address", "add", f"{spare}/16", "dev", "eth0")
    assert not lab.answers("mallory", victim, "-I", spare)
    lab.in_guest(
        "mallory",
        "ip",
        "neigh",
        "replace",
        victim,
        "lladdr",
        camel(lab.endpoint("victim", "blue"), "mac_address"),
        "dev",
        "eth0",
    )
    assert not lab.answers("mallory", victim)
    # Another MAC on its own interface cuts it off, and gains nothing.
    mac = camel(lab.endpoint("mallory", "red"), "mac_address")
    lab.in_guest("mallory", "ip", "address", "del", f"{spare}/16", "dev", "eth0")
    lab.in_guest("mallory", "ip", "link", "set", "eth0", "address", camel(lab.endpoint("peer", "red"), "mac_address"))
    assert not lab.answers("mallory", victim)
    lab.in_guest("mallory", "ip", "link", "set", "eth0", "address", mac)
    lab.in_guest("mallory", "ip", "route", "del", victim)
    until(lambda: lab.answers("mallory", "peer"), f"mallory reaches its own network again\n{lab.logs()}")


def test_the_other_networks_dns(lab: Fabric) -> None:
    """The other network's names are not to be had, neither from the resolver nor from that network's own server."""
    assert lab.guest("mallory", "getent", "hosts", "victim.blue").returncode == 2
    routes = lab.in_guest("victim", "ip", "-4", "route", "show", "table", "84").splitlines()
    servers = [line.split()[0] for line in routes if line.startswith("169.254.")]
    assert servers
    for server in servers:
        query = ["dig", "+tries=1", "+time=1", f"@{server}", "victim.blue"]
        assert lab.guest("victim", *query).returncode == 0
        lab.in_guest("mallory", "ip", "route", "replace", server, "dev", "eth0", "scope", "link")
        assert lab.guest("mallory", *query).returncode != 0
        lab.in_guest("mallory", "ip", "route", "del", server)
