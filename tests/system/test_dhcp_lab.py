"""Guests that configure themselves: a card with QEMU's framing, plugged into the bridge, and Debian's DHCP client."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from dhcp_clients import Clients
from fabric import Fabric, camel, fabric, until

pytestmark = pytest.mark.system

CARD = str(Path(__file__).with_name("qemu_card.py"))


@pytest.fixture(scope="module")
def lab() -> Iterator[Fabric]:
    with fabric("web") as lab:
        lab.run("network", "create", "app", "--ipv6")
        lab.run("network", "create", "back")
        lab.run("network", "connect", "app", "web")
        yield lab


class Machine:
    """A namespace that stands for a VM."""

    def __init__(self, lab: Fabric, name: str, mac: str, how: str) -> None:
        self.lab, self.name, self.mac, self.how = lab, name, mac, how
        self.netns = f"tltc{secrets.token_hex(4)}"
        self.path = str(lab.path / f"{name}.sock")
        subprocess.run(["ip", "netns", "add", self.netns], check=True)
        self.clients = Clients(self.netns, "eth0", lab.path)
        self.process: subprocess.Popen[str] | None = None

    def plug_in(self) -> None:
        argv = ["ip", "netns", "exec", self.netns, sys.executable, CARD, "eth0", self.mac, self.how, self.path]
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "up\n"
        until(
            lambda: any(not a.get("tentative") for a in self.clients.addresses(6)),
            "the card has its link-local address",
        )

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        argv = ["ip", "netns", "exec", self.netns, *command]
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)

    def answers(self, target: str) -> bool:
        return self.run("ping", "-n", "-c1", "-W1", target).returncode == 0

    def pull_out(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def configure(self) -> tuple[str, str]:
        """Asks DHCPv4 and DHCPv6; the addresses."""
        told, told6 = self.clients.dhclient(4), self.clients.dhclient(6)
        assert "new_ip_address" in told, told
        assert "new_ip6_address" in told6, told6
        return told["new_ip_address"], told6["new_ip6_address"]


@contextmanager
def machine(lab: Fabric, name: str, how: str) -> Iterator[Machine]:
    option = "--qemu" if how == "connect" else "--qemu-server"
    registered = lab.json("guest", "register", name, option, f"unix:{lab.path}/{name}.sock")
    vm = Machine(lab, name, camel(registered, "mac_address"), how)
    try:
        yield vm
    finally:
        vm.pull_out()
        # A client writes its pid down a moment after it has gone into the background.
        left = subprocess.run(["ip", "netns", "pids", vm.netns], capture_output=True, text=True, check=True).stdout
        for pid in left.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", vm.netns], check=False)
        lab.command("guest", "rm", name)


def kill(lab: Fabric, name: str) -> None:
    before = lab.processes()[name]
    os.kill(before["pid"], signal.SIGKILL)
    until(lambda: lab.processes()[name]["pid"] not in (0, None, before["pid"]), f"{name} is started again")


@pytest.mark.parametrize("how", ["connect", "listen"])
def test_a_card_is_plugged_in_and_configures_itself(lab: Fabric, how: str) -> None:
    with machine(lab, "vm1", how) as vm:
        if how == "connect":
            # As a cable that is in the switch before the machine is switched on.
            lab.run("network", "connect", "app", "vm1", "--alias", "plain")
            assert not camel(lab.endpoint("vm1", "app"), "link_up")
            vm.plug_in()
        else:
            vm.plug_in()
            until(lambda: lab.json("guest", "inspect", "vm1").get("connected"), "the bridge finds the card")
            lab.run("network", "connect", "app", "vm1", "--alias", "plain")
        until(lambda: camel(lab.endpoint("vm1", "app"), "link_up"), "frames pass")
        endpoint = lab.endpoint("vm1", "app")
        assert camel(endpoint, "mac_address") == vm.mac
        v4, v6 = vm.configure()
        assert [v4, v6] == [lab.address("vm1", "app", family) for family in (4, 6)]
        web4, web6 = (lab.address("web", "app", family) for family in (4, 6))
        assert vm.answers(web4)
        # Its route comes with a router's advertisement, for which its kernel asks every few seconds.
        until(lambda: vm.answers(web6), f"{web6} answers")
        for name in ("vm1", "plain", "vm1.app"):
            assert lab.answers("web", name, "-4")
            assert lab.answers("web", name, "-6")
        # The network's server, as DHCP names it, over the route that DHCP gives.
        server = vm.clients.dhclient(4)["new_domain_name_servers"].split()[0]
        assert vm.run("dig", f"@{server}", "+short", "web.app").stdout.strip() == web4
        # Another's address does not pass, were it to take one.
        spare = web4.rpartition(".")[0] + ".77"
        subprocess.run(["ip", "-n", vm.netns, "address", "add", f"{spare}/16", "dev", "eth0"], check=True)
        assert vm.run("ping", "-n", "-c2", "-i0.2", "-W1", "-I", spare, web4).returncode != 0
        subprocess.run(["ip", "-n", vm.netns, "address", "del", f"{spare}/16", "dev", "eth0"], check=True)

        error = lab.fails("network", "connect", "back", "vm1")
        assert "one network card, which is on app" in error

        # Off one network, onto another: the card stays plugged in, the machine asks anew.
        lab.run("network", "disconnect", "app", "vm1")
        assert not vm.answers(web4)
        lab.run("network", "connect", "back", "vm1")
        told = vm.clients.dhclient(4)
        assert told.get("new_ip_address") == lab.address("vm1", "back"), told
        assert lab.json("guest", "inspect", "vm1").get("connected")


def test_everything_may_be_killed(lab: Fabric) -> None:
    with machine(lab, "vm2", "connect") as vm, machine(lab, "vm3", "listen") as other:
        for one in (vm, other):
            lab.run("network", "connect", "app", one.name)
            one.plug_in()
            until(lambda one=one: camel(lab.endpoint(one.name, "app"), "link_up"), "frames pass")
            one.configure()
        assert vm.answers(lab.address("vm3", "app"))
        there = [(name, lab.address(name, "app")) for name in ("vm2", "vm3", "web")]
        for victim in ("bridge", "helper"):
            if victim == "helper":
                # It comes back to an empty disk.
                shutil.rmtree(lab.path / "helper" / "state", ignore_errors=True)
            kill(lab, victim)
            until(
                lambda: vm.answers(there[1][1]) and other.answers(there[0][1]),
                f"{victim} was killed: frames pass again",
            )
            until(lambda: lab.answers("web", "vm2", "-4"), f"{victim} was killed: web finds vm2")
            told = vm.clients.dhclient(4)
            assert told.get("new_ip_address") == there[0][1], told
        # The machine itself: its next run is plugged in at the same place.
        other.pull_out()
        until(lambda: not lab.json("guest", "inspect", "vm3").get("connected"), "the bridge sees that it is off")
        other.plug_in()
        until(lambda: camel(lab.endpoint("vm3", "app"), "link_up"), "frames pass")
        other.configure()
        assert other.answers(there[2][1])


def test_whom_dhcp_answers(lab: Fabric) -> None:
    lab.run("network", "create", "all", "--dhcp", "on", "--mtu", "1400", "-o", "taploom.dhcp.lease=120")
    lab.run("network", "create", "nobody", "--dhcp", "off")
    lab.run("network", "connect", "all", "web")
    lab.run("network", "connect", "nobody", "web")
    try:
        names = {
            camel(e, "network_name"): e["interface_name" if "interface_name" in e else "interfaceName"]
            for e in lab.json("guest", "inspect", "web")["endpoints"]
        }
        asked = {
            name: lab.guest(
                "web", "busybox", "udhcpc", "-f", "-n", "-q", "-t3", "-T1", "-s", "/bin/true", "-i", interface
            )
            for name, interface in names.items()
        }
        assert f"lease of {lab.address('web', 'all')} obtained" in asked["all"].stdout + asked["all"].stderr
        assert "lease time 120" in asked["all"].stdout + asked["all"].stderr
        for name in ("app", "nobody"):
            assert asked[name].returncode != 0, asked[name]
    finally:
        for name in ("all", "nobody"):
            lab.run("network", "disconnect", name, "web")
            lab.run("network", "rm", name)


def test_what_cannot_be_is_refused(lab: Fabric) -> None:
    before = lab.json("guest", "ls")
    for arguments, why in (
        (("--qemu", "relative.sock"), "malformed"),
        (("--qemu", f"/{'x' * 120}"), "malformed"),
        (("--qemu", "/run/a.sock", "--mac", "01:00:00:00:00:01"), "MAC"),
        (("vsock:9", "--mac", "02:00:00:00:00:01"), "MAC"),
        (("--qemu", "/run/a.sock", "--data", "vsock:9:1"), "data address"),
        (("--qemu", "/run/a.sock", "--qemu-server", "/run/a.sock"), "one of"),
        ((), "one of"),
    ):
        assert why in lab.fails("guest", "register", "bad", *arguments), arguments
    for arguments, why in (
        (("--dhcp", "maybe"), "maybe"),
        (("-o", "taploom.dhcp.lease=1"), "60 to"),
        (("-o", "taploom.dhcp.pool=x"), "no such option"),
        (("--ra", "slaac"), "no IPv6"),
        (("--ipv6", "--gateway-mode-ipv6", "isolated"), "internal"),
    ):
        assert why in lab.fails("network", "create", "bad", *arguments), arguments
    assert lab.json("guest", "ls") == before
