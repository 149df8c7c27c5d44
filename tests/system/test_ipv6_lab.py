"""Networks with nothing but IPv6: names, published ports, policies, autoconfiguration, and what survives."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator

import pytest
from fabric import Fabric, camel, fabric, until
from runtime_client import busybox_tar
from test_dhcp_lab import Machine, kill
from test_lab_docker import Docker

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def lab() -> Iterator[Fabric]:
    with fabric("web", "db") as lab:
        lab.run("network", "create", "six", "--no-ipv4", "--ipv6")
        lab.run("network", "connect", "six", "web")
        lab.run("network", "connect", "six", "db", "--alias", "postgres")
        yield lab


@pytest.fixture(scope="module")
def docker(lab: Fabric) -> Docker:
    docker = Docker(lab)
    docker("import", "-", "box", stdin=busybox_tar())
    return docker


def free_port() -> int:
    with socket.socket(socket.AF_INET6) as sock:
        sock.bind(("::", 0))
        return int(sock.getsockname()[1])


def answer(host: str, port: int) -> str:
    try:
        with urllib.request.urlopen(f"http://{host}:{port}/", timeout=3) as response:
            return str(response.read().decode())
    except OSError as error:
        return f"no answer: {error}"


def names_work(lab: Fabric) -> bool:
    return all(lab.answers("web", name) for name in ("db", "postgres", "db.six"))


def test_names_and_nothing_of_ipv4(lab: Fabric) -> None:
    address = lab.address("db", "six", 6)
    assert names_work(lab)
    assert lab.in_guest("web", "dig", "+short", "AAAA", "db").split() == [address]
    assert lab.in_guest("web", "dig", "+short", "-x", address).split() == ["db.six."]
    empty = lab.in_guest("web", "dig", "A", "db")
    assert "NOERROR" in empty
    assert "ANSWER: 0" in empty
    assert lab.in_guest("web", "ip", "-4", "address", "show", "dev", "eth0") == ""
    gateway = next(iter(lab.json("network", "inspect", "six")["gateways"]))
    assert lab.answers("web", gateway)
    assert f"default via {gateway}" in lab.in_guest("web", "ip", "-6", "route")
    assert lab.in_guest("web", "cat", "/proc/sys/net/ipv6/conf/eth0/accept_ra").strip() == "0"


def test_published_ports_lead_to_ipv6(lab: Fabric, docker: Docker) -> None:
    port = free_port()
    serve = "mkdir -p /srv && echo six >/srv/index.html && exec httpd -f -p [::]:80 -h /srv"
    docker("run", "-d", "--name", "srv", "--network", "six", "-p", f"{port}:80", "box", "sh", "-c", serve)
    try:
        for host in ("[::1]", "127.0.0.1"):
            until(lambda host=host: answer(host, port) == "six\n", f"{host} answers: {answer(host, port)}")
        assert lab.answers("web", "srv")
        for victim in ("bridge", "helper"):
            kill(lab, victim)
            until(lambda: answer("[::1]", port) == "six\n", f"{victim} was killed: the port answers")
            until(lambda: names_work(lab), f"{victim} was killed: names")
        daemons = lab.daemons()
        for name in ("dnsmasq", "ovn-controller", "ovs-vswitchd"):
            for pid in daemons[name]:
                os.kill(pid, signal.SIGKILL)
        until(lambda: names_work(lab) and answer("[::1]", port) == "six\n", "daemons were killed")
    finally:
        docker("rm", "-f", "srv")


def test_a_routed_network_publishes_nothing_on_the_host(docker: Docker) -> None:
    port = free_port()
    mode = "com.docker.network.bridge.gateway_mode_ipv6=routed"
    docker("network", "create", "--ipv6", "-o", mode, "edge")
    docker("run", "-d", "--name", "edgy", "--network", "edge", "-p", f"{port}:80", "box", "sleep", "1000")
    try:
        bound = json.loads(docker("inspect", "edgy"))[0]["NetworkSettings"]["Ports"]["80/tcp"]
        assert [one["HostIp"] for one in bound] == ["0.0.0.0"]
        with socket.socket(socket.AF_INET6) as sock:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(("::", port))
        refused = docker.command("network", "create", "-o", mode.replace("routed", "routes"), "bad")
        assert b"unknown gateway mode routes" in refused.stderr
    finally:
        docker("rm", "-f", "edgy")
        docker("network", "rm", "edge")


def test_policies(lab: Fabric) -> None:
    policy = lab.path / "policy.yaml"
    policy.write_text(
        "networks: {six: deny}\ngroups: {db: {members: [{guest: db}], in: [{protocol: icmpv6, from: any}]}}\n"
    )
    before = [lab.answers("web", "db"), lab.answers("db", "web")]
    assert before == [True, True]
    lab.run("policy", "apply", "-f", str(policy))
    try:
        # web may not open what db would take; its own server's answers, and its gateway's, pass.
        assert not lab.answers("web", "db")
        assert lab.in_guest("web", "dig", "+short", "AAAA", "db").split() == [lab.address("db", "six", 6)]
        policy.write_text(policy.read_text().replace("six: deny", "six: deny-in"))
        lab.run("policy", "apply", "-f", str(policy))
        assert lab.answers("web", "db")
        assert not lab.answers("db", "web")
    finally:
        policy.write_text("networks: {six: allow}\n")
        lab.run("policy", "apply", "--prune", "-f", str(policy))
    assert [lab.answers("web", "db"), lab.answers("db", "web")] == before


def test_a_machine_makes_its_address_itself(lab: Fabric) -> None:
    lab.run("network", "create", "slaac", "--no-ipv4", "--ipv6", "--ra", "slaac", "-o", "taploom.ipv6.ra.interval=4")
    registered = lab.json("guest", "register", "vm", "--qemu", f"{lab.path}/vm.sock")
    vm = Machine(lab, "vm", camel(registered, "mac_address"), "connect")
    try:
        lab.run("network", "connect", "slaac", "vm")
        lab.run("network", "connect", "slaac", "web")
        own = lab.address("vm", "slaac", 6)
        vm.plug_in()
        until(lambda: own in {a["local"] for a in vm.clients.addresses(6) if not a.get("tentative")}, "SLAAC")
        until(lambda: "default" in vm.run("ip", "-6", "route").stdout, "the gateway advertises itself")
        assert vm.answers(lab.address("web", "slaac", 6))
        assert lab.answers("web", "vm")
        # A guest with an agent has the same kind of address, and learns nothing of advertisements.
        routes = lab.in_guest("web", "ip", "-6", "route")
        assert "ra" not in routes.split()
        assert routes.count("default") == 1
    finally:
        vm.pull_out()
        subprocess.run(["ip", "netns", "del", vm.netns], check=False)
        lab.command("network", "disconnect", "slaac", "web")
        lab.command("guest", "rm", "vm")
        lab.command("network", "rm", "slaac")
