"""Networks that are VLANs, by the commands that people type: guests and containers on the wire, and what survives."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from fabric import Fabric, at_once, camel, fabric, until
from runtime_client import busybox_tar
from test_lab_docker import Docker
from test_vlan_trunk import tagged
from vlan_lan import HOST, Lan, lan

from lab.state import Lab
from taploom.contracts.taploom.helper.v1 import Endpoint, TrunkChild

pytestmark = pytest.mark.system

CREATE = ("network", "create", "office", "--vlan", "120", "--uplink", "nic1")
SUBNETS = (
    *("--subnet", "10.77.1.0/24", "--gateway", "10.77.1.1", "--ip-range", "10.77.1.128/25"),
    *("--subnet", "fd00:77:1::/64", "--gateway", "fd00:77:1::1", "--ip-range", "fd00:77:1::8000/113"),
)


@pytest.fixture(scope="module")
def rig() -> Iterator[tuple[Fabric, Lan]]:
    with fabric("web", "db") as running, lan(helper_netns(running), "nic1", {120: 1, 130: 2}) as wire:
        yield running, wire


def helper_netns(running: Fabric) -> str:
    return Lab(running.name).helper_netns


def test_refusals_change_nothing(rig: tuple[Fabric, Lan]) -> None:
    running, _ = rig
    before = running.json("network", "ls")
    for arguments, reason in (
        ((*CREATE[:3], "--vlan", "4095", *SUBNETS), "use 1 to 4094"),
        ((*CREATE[:3], "--vlan", "0", *SUBNETS), "use 1 to 4094"),
        (CREATE, "give its IPv4 subnet"),
        ((*CREATE, *SUBNETS[:2]), "the router there"),
        ((*CREATE[:3], "--uplink", "nic1", *SUBNETS), "give --vlan too"),
        ((*CREATE, "--gateway-mode-ipv4", "routed", *SUBNETS), "a router of its own"),
        ((*CREATE[:5], "--uplink", "nic9", *SUBNETS), "has no network card nic9"),
        # The helper's own way out.
        ((*CREATE[:5], "--uplink", "eth0", *SUBNETS), "give the helper's machine a second one"),
        ((*CREATE, "--mtu", "9000", *SUBNETS), "more than the 1500"),
    ):
        assert reason in running.fails(*arguments), arguments
    assert running.json("network", "ls") == before


def test_guests_on_a_vlan(rig: tuple[Fabric, Lan]) -> None:
    running, wire = rig
    running.run(*CREATE, *SUBNETS)
    try:
        running.run("network", "create", "app")
        running.run("network", "connect", "app", "web")
        running.run("network", "connect", "office", "web", "--priority", "1")
        running.run("network", "connect", "office", "db", "--alias", "postgres", "--ip", "10.77.1.200")
        assert "VLAN 120 on nic1" in running.run("network", "inspect", "office")
        assert "VLAN 120 on nic1" in running.run("topology")
        assert "is network office's" in running.fails(
            "network", "create", "other", *CREATE[3:], "--subnet", "10.9.0.0/24", "--internal"
        )
        assert running.address("web", "office") == "10.77.1.128"
        assert works(running, wire)
        assert "default via 10.77.1.1 " in running.in_guest("web", "ip", "route")
        assert "default via fd00:77:1::1 " in running.in_guest("web", "ip", "-6", "route")
        for target in ("10.77.1.9", "fd00:77:1::9", "203.0.113.9"):
            assert "leaves by VLAN 120 on nic1" in running.run("trace", "web", target)
        assert "db gets it" in running.run("trace", "web", "postgres")
        # By the helper's own card everything else goes on, untagged.
        running.run("network", "disconnect", "office", "web")
        assert running.answers("web", "198.51.100.1")
        running.run("network", "connect", "office", "web", "--priority", "1")

        policy = running.path / "policy.yaml"
        policy.write_text("networks: {office: deny-in}\n")
        running.run("policy", "apply", "-f", str(policy))
        assert not wire.ping(120, "10.77.1.200", wait=1)
        assert running.answers("db", f"10.77.1.{HOST}")
        policy.write_text("networks: {office: allow}\n")
        running.run("policy", "apply", "-f", str(policy))
        until(lambda: wire.ping(120, "10.77.1.200", wait=1), "it is open again")

        for victim in ("disk", "bridge"):  # OVS's and OVN's daemons are killed in test_vlan_helper
            running.kill_and_wait(victim)
            until(lambda: works(running, wire), f"{victim} was killed\n{running.logs()}")
        assert not running.answers("web", f"10.77.2.{HOST}"), "the other VLAN"
    finally:
        for network, guest in (("office", "web"), ("office", "db"), ("app", "web")):
            running.command("network", "disconnect", network, guest)
        running.run("network", "rm", "office")
        running.command("network", "rm", "app")


def works(running: Fabric, wire: Lan) -> bool:
    """Both ways, both families, names."""
    return all(running.answers("web", address) for address in ("fd00:77:1::9", "postgres")) and all(
        wire.ping(120, address, wait=1) for address in ("10.77.1.200", "10.77.1.128")
    )


def test_containers_on_a_vlan(rig: tuple[Fabric, Lan]) -> None:
    running, wire = rig
    docker = Docker(running)
    docker("import", "-", "box", stdin=busybox_tar())
    options = ("-o", "taploom.vlan.tag=130", "-o", "taploom.vlan.uplink=nic1")
    docker("network", "create", *options, "--subnet", "10.77.2.0/24", "--gateway", "10.77.2.1", "lab")
    try:
        refused = docker.command(
            "network", "create", *options, "--subnet", "10.9.0.0/24", "--gateway", "10.9.0.1", "two"
        )
        assert b"tag 130 is network lab's" in refused.stderr
        refused = docker.command("network", "create", "-o", "taploom.vlan.tag=5000", "bad")
        assert b"use 1 to 4094" in refused.stderr
        docker("run", "-d", "--name", "srv", "--network", "lab", "--ip", "10.77.2.50", "box", "sleep", "1000")
        docker("exec", "srv", "ping", "-c1", "-W5", "10.77.2.9")
        assert wire.ping(130, "10.77.2.50")
        assert not wire.ping(120, "10.77.2.50", wait=1)
    finally:
        docker("rm", "-f", "srv")
        docker("network", "rm", "lab")


def test_tagged_children_in_one_guest(rig: tuple[Fabric, Lan]) -> None:
    running, _ = rig
    for name in ("base", "inner"):
        running.run("network", "create", name, "--ipv6")
    try:
        running.run("network", "connect", "inner", "web", "--alias", "front")
        carried = ("network", "connect", "inner", "db", "--parent", "base", "--tag", "20")
        assert "not connected" in running.fails(*carried)
        running.run("network", "connect", "base", "db")
        before = running.json("network", "inspect", "inner")
        for arguments, reason in (
            ((*carried[:6], "--tag", "4095"), "use 1 to 4094"),
            (carried[:6], "give --tag too"),
            ((*carried[:4], "--tag", "20"), "give --parent too"),
            ((*carried[:4], "--driver-opt", "taploom.vlan.tag=20"), "give taploom.vlan.parent too"),
            ((*carried[:5], "inner", "--tag", "20"), "cannot go over itself"),
        ):
            assert reason in running.fails(*arguments)
        assert running.json("network", "inspect", "inner") == before
        running.run(*carried, "--alias", "inside")
        running.run("network", "create", "third")
        taken = running.fails("network", "connect", "third", "db", "--parent", "base", "--tag", "20")
        assert "is inner's" in taken
        nested = running.fails("network", "connect", "third", "db", "--parent", "inner", "--tag", "21")
        assert "not nested" in nested

        endpoint, over = running.endpoint("db", "inner"), running.endpoint("db", "base")
        name = camel(over, "interface_name")
        assert camel(endpoint, "interface_name") == f"{name}.20"
        assert camel(endpoint, "link_up")
        # The agent in the guest makes the interface, or, where the kernel has none such, people are told what to do.
        made = f"{name}.20@" in running.in_guest("db", "ip", "-brief", "link")
        assert made is (
            f"type there: ip link add link {name} name {name}.20" not in running.run("guest", "inspect", "db")
        )
        # What a VLAN interface takes over from the one that it is on.
        assert camel(endpoint, "mac_address") == camel(over, "mac_address")
        message = Endpoint(
            mac_address=camel(endpoint, "mac_address"),
            addresses=[address.partition("/")[0] for address in endpoint["addresses"]],
            trunk_child=TrunkChild(tag=20),
        )
        with tagged(Lab(running.name).guest_netns("db"), message) as (inside,):

            def works() -> bool:
                return all(running.answers("web", name) for name in ("inside", "db.inner")) and all(
                    inside.ping(running.address("web", "inner", family), wait=1) for family in (4, 6)
                )

            assert "web gets it" in running.run("trace", "db", running.address("web", "inner"))
            until(works, f"frames with the tag pass\n{running.logs()}")
            assert running.answers("db", next(iter(running.json("network", "inspect", "base")["gateways"])))
            # What is told of its interface has the tag.
            refused = running.fails("capture", "db", "--network", "inner")
            assert "db is on inner by tag 20 over base: capture it on base" in refused
            captured = threading.Event()

            def capture() -> str:
                try:
                    return running.run("capture", "db", "--count", "1", "--filter", f"host {message.addresses[0]}")
                finally:
                    captured.set()

            shown, _ = at_once(capture, lambda: until(lambda: works() and captured.is_set(), "there is traffic"))
            assert "vlan 20 " in str(shown)
            for victim in ("helper", "bridge"):
                running.kill_and_wait(victim)
                until(works, f"{victim} was killed\n{running.logs()}")
            running.run("network", "disconnect", "base", "db")
            assert not camel(running.endpoint("db", "inner"), "link_up")
            assert not running.answers("web", "inside")
            running.run("network", "connect", "base", "db")
            until(lambda: camel(running.endpoint("db", "inner"), "link_up"), "what carries it is back")
            running.run("network", "disconnect", "inner", "db")
            assert not running.answers("web", running.address("db", "base"))
    finally:
        for network, guest in (("inner", "db"), ("inner", "web"), ("base", "db")):
            running.command("network", "disconnect", network, guest)
        for network in ("base", "inner", "third"):
            running.run("network", "rm", network)
