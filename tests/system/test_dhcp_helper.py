"""DHCP and router advertisements at the helper: real clients, the kernel's own autoconfiguration, and OVN's rows."""

from __future__ import annotations

import subprocess

import pytest
import trio
from dhcp_clients import Clients
from test_helper_rig import Guest, Rig, endpoint, eventually, helper, network, rpc_status, sh
from test_policy_helper import apply as apply_policy
from test_policy_helper import member, rows

from taploom.contracts.taploom.helper.v1 import (
    Dhcp,
    Endpoint,
    Policy,
    RouterAdvertisementMode,
    RouterAdvertisements,
    RouterPreference,
    SyncRequest,
)

pytestmark = pytest.mark.system

SLAAC = "fd00:77:1::ff:fe00:105"  # of 02:00:00:00:01:05


async def bare(rig: Rig, message: Endpoint) -> tuple[Guest, Clients]:
    """A guest whose interface has nothing but its MAC address."""
    guest = await rig.guest(message)
    sh("ip", "-n", guest.netns, "address", "flush", "dev", "eth0", "scope", "global")
    clients = Clients(guest.netns, "eth0", rig.folder)
    # Before it has checked its link-local address, it cannot ask.
    await eventually(lambda: any(not one.get("tentative") for one in clients.addresses(6)))
    return guest, clients


def asked(clients: Clients, family: int) -> dict[str, str]:
    told = clients.dhclient(family)
    assert "failed" not in told, told
    return told


async def test_clients_get_what_the_endpoint_has() -> None:
    async with helper() as rig:
        plain = network(1, ipv6=True, dns_servers=["169.254.64.1", "fe80::53"])
        await rig.apply(plain, network(2, ipv6=True))
        web = await rig.guest(endpoint(1, 2, "web", ipv6=True), dns="169.254.64.1")
        before = rows(rig)
        vm, clients = await bare(rig, endpoint(1, 5, "vm", ipv6=True, dhcp=True))

        told = asked(clients, 4)
        assert (told["new_ip_address"], told["new_subnet_mask"]) == ("10.77.1.5", "255.255.255.0")
        assert (told["new_routers"], told["new_interface_mtu"]) == ("10.77.1.1", "1500")
        assert (told["new_domain_name_servers"], told["new_domain_name"]) == ("169.254.64.1", "net1")
        assert (told["new_dhcp_lease_time"], told["new_dhcp_server_identifier"]) == ("3600", "10.77.1.1")
        assert web.ping("10.77.1.5")
        assert vm.ping("10.77.1.2")
        assert vm.ping("10.77.1.1")
        assert vm.dig("169.254.64.1", "+short", "web.net1") == "10.77.1.2"
        assert web.dig("169.254.64.1", "+short", "vm.net1") == "10.77.1.5"

        # The gateway says that addresses are DHCPv6's, and is the default router by that.
        await eventually(lambda: "default" in vm.run("ip", "-6", "route"))
        told = asked(clients, 6)
        assert told["new_ip6_address"] == "fd00:77:1::5"
        assert (told["new_dhcp6_name_servers"], told["new_dhcp6_domain_search"]) == ("fe80::53", "net1.")
        assert {one["local"] for one in clients.addresses(6)} >= {"fd00:77:1::5"}
        assert SLAAC not in {one["local"] for one in clients.addresses(6)}
        assert vm.ping("fd00:77:1::2")
        assert web.ping("fd00:77:1::5")
        assert vm.dig("fe80::53%eth0", "+short", "web.net1", "AAAA") == "fd00:77:1::2"

        # The other client, with what is changed while it runs.
        await rig.apply(
            network(1, ipv6=True, mtu=1400, dhcp=Dhcp(lease_seconds=600, dns_servers=["9.9.9.9"], domain="a.b"))
        )
        told = clients.udhcpc()
        assert (told.get("ip"), told["lease"], told["dns"], told["domain"]) == ("10.77.1.5", "600", "9.9.9.9", "a.b"), (
            told
        )
        assert told["staticroutes"].split() == ["0.0.0.0/0", "10.77.1.1"]
        await rig.apply(plain)

        # Who is not to have it gets none; nor does the one who had it, once it is gone.
        _, other = await bare(rig, endpoint(1, 6, "other", ipv6=True))
        assert "failed" in other.udhcpc(timeout=5)
        await rig.delete_endpoint("e1-6")
        await rig.delete_endpoint("e1-5")
        assert rows(rig) == before


async def test_policy_lets_it_pass_and_daemons_may_die() -> None:
    async with helper() as rig:
        await rig.apply(network(1, ipv6=True), network(2))
        web = await rig.guest(endpoint(1, 2, "web", ipv6=True))
        vm, clients = await bare(rig, endpoint(1, 5, "vm", ipv6=True, dhcp=True))
        await apply_policy(rig, Policy(), e1_5=member(deny_in=True, deny_out=True))
        assert asked(clients, 4)["new_ip_address"] == "10.77.1.5"
        assert asked(clients, 6)["new_ip6_address"] == "fd00:77:1::5"
        assert not web.ping("10.77.1.5", wait=1)
        assert not vm.ping("fd00:77:1::2", wait=1)
        await apply_policy(rig, Policy(), e1_5=member())
        assert web.ping("10.77.1.5")

        for name in ("ovn-controller", "ovn-northd", "ovsdb-server", "ovs-vswitchd"):
            before = (await rig.daemons())[name]
            subprocess.run(["kill", "-9", str(before.pid)], check=True)
            with trio.fail_after(30):
                while (await rig.daemons())[name].restarts == before.restarts:
                    await trio.sleep(0.02)
        with trio.fail_after(60):
            while "failed" in (told := await trio.to_thread.run_sync(clients.udhcpc)):
                pass
        assert told["ip"] == "10.77.1.5"
        assert web.ping("10.77.1.5")


async def test_the_kernel_makes_the_endpoints_address() -> None:
    async with helper() as rig:
        slaac = RouterAdvertisements(
            mode=RouterAdvertisementMode.SLAAC,
            interval_seconds=4,
            preference=RouterPreference.HIGH,
            dns_server="fe80::53",
            domain="net1",
        )
        before = rows(rig)
        await rig.apply(network(1, ipv6=True, dns_servers=["169.254.64.1", "fe80::53"], router_advertisements=slaac))
        own = endpoint(1, 5, "vm")
        own.addresses.append(SLAAC)
        web = await rig.guest(endpoint(1, 2, "web", ipv6=True))
        vm, clients = await bare(rig, own)
        await eventually(lambda: SLAAC in {one["local"] for one in clients.addresses(6) if not one.get("tentative")})
        route = vm.run("ip", "-6", "route", "show", "default")
        assert "pref high" in route
        assert "fe80::" in route
        assert vm.ping("fd00:77:1::2")
        # From the address that is web's: its kernel may have made another of the advertisement, which does not pass.
        assert " 0% packet loss" in web.run("ping", "-n", "-c1", "-W10", "-I", "fd00:77:1::2", SLAAC)
        assert "mtu 1500" in vm.run("ip", "-6", "route", "show", "default") or "1500" in vm.run("ip", "link")
        # Another address of the prefix does not pass.
        sh("ip", "-n", vm.netns, "address", "add", "fd00:77:1::66/64", "dev", "eth0", "nodad")
        spoofed = vm.run("ping", "-n", "-c2", "-i0.2", "-W1", "-I", "fd00:77:1::66", "fd00:77:1::2", check=False)
        assert " 100% packet loss" in spoofed

        await rig.client.sync(SyncRequest(), timeout=30)
        assert rows(rig) == before


async def test_only_in_ipv6() -> None:
    async with helper() as rig:
        only = network(1, ipv6=True)
        only.subnets, only.gateways, only.dns_servers = only.subnets[1:], only.gateways[1:], ["fe80::53"]
        await rig.apply(only)
        one, other = endpoint(1, 2, "one", ipv6=True), endpoint(1, 3, "other", ipv6=True)
        for message in (one, other):
            message.addresses = message.addresses[1:]
        first, second = await rig.guest(one), await rig.guest(other)
        assert first.ping("fd00:77:1::3")
        assert second.ping("fd00:77:1::1")
        assert first.dig("fe80::53%eth0", "+short", "other.net1", "AAAA") == "fd00:77:1::3"
        assert first.dig("fe80::53%eth0", "+short", "-x", "fd00:77:1::3") == "other.net1."
        assert first.dig("fe80::53%eth0", "+tcp", "+short", "one.net1", "AAAA") == "fd00:77:1::2"


async def test_what_cannot_be_is_refused() -> None:
    async with helper() as rig:
        before = rows(rig)
        wide = network(1, ipv6=True)
        wide.subnets[1] = "fd00:77:1::/80"
        wide.router_advertisements = RouterAdvertisements(mode=RouterAdvertisementMode.SLAAC)
        for wrong in (
            wide,
            network(1, dhcp=Dhcp(lease_seconds=10)),
            network(1, dhcp=Dhcp(domain='a" b')),
            network(1, dhcp=Dhcp(dns_servers=["224.0.0.1"])),
            network(1, router_advertisements=RouterAdvertisements(interval_seconds=2)),
            network(1, router_advertisements=RouterAdvertisements(dns_server="9.9.9.9")),
            network(1, gateway_mode_ipv4=4),
        ):
            assert await rpc_status(lambda wrong=wrong: rig.apply(wrong)) == "INVALID_ARGUMENT"
        assert rows(rig) == before
