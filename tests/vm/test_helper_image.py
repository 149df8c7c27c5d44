"""The helper's image in a virtual machine: its start, the kernel's data path, and networks over vsock."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helper_vm import HelperVm, helper_vm, seconds
from portal import Portal
from system import test_helper_rig as rig

from lab.vm.machine import Machine
from taploom.contracts.taploom.helper.v1 import (
    GetInfoRequest,
    HelperFeature,
    ListEndpointsRequest,
)

MEMORY = 1024  # MiB
ARCH = "x86_64"


@pytest.fixture(scope="module")
def machine(kernel: Path, helper_initfs: Path, machine_directory: Callable[[str], Path]) -> Machine:
    return Machine("helper", machine_directory("helper"), kernel, helper_initfs, memory_mib=MEMORY, cpus=2)


@pytest.fixture(scope="module")
def helper(machine: Machine, portal: Portal) -> Iterator[HelperVm]:
    with portal.opened(helper_vm(machine)) as helper:
        yield helper


def test_it_starts_within_four_times_the_kernels_own_time(
    helper: HelperVm, figure: Callable[[str, str, str], None]
) -> None:
    console = helper.log()
    init, ready = seconds(console, "init"), seconds(console, "agent answers")
    load = os.getloadavg()[0]
    figure(
        "helper VM: init, then OVS and OVN answer", f"{init:.2f} s, {ready:.2f} s, {ready / init:.2f}x", "at most 4x"
    )
    print(f"init {init:.2f} s, ready {ready:.2f} s: {ready / init:.2f}x, load {load:.1f}")


def test_it_switches_with_the_kernels_data_path(helper: HelperVm, portal: Portal) -> None:
    info = portal.call(helper.client.get_info, GetInfoRequest())
    assert HelperFeature.KERNEL_DATAPATH in info.features
    assert HelperFeature.LINK_TSO in info.features
    assert HelperFeature.EGRESS in info.features
    assert tuple(map(int, info.ovs_version.split("."))) >= (3, 5)
    assert tuple(map(int, info.ovn_version.split("."))) >= (25, 3)
    assert "kernel data path" in helper.log()


def test_guests_reach_each_other_by_name_and_are_isolated(helper: HelperVm, portal: Portal) -> None:
    async def body() -> None:
        await helper.apply(rig.network(1, ipv6=True), rig.network(2))
        web = await helper.guest(rig.endpoint(1, 2, "web", ipv6=True), dns="169.254.64.1", gateway="10.77.1.1")
        db = await helper.guest(rig.endpoint(1, 3, "db", "postgres", ipv6=True))
        other = await helper.guest(rig.endpoint(2, 2, "web"), gateway="10.77.2.1")
        listed = (await helper.client.list_endpoints(ListEndpointsRequest())).endpoints
        assert all(status.port_up for status in listed)

        def traffic() -> None:
            assert web.ping("10.77.1.3", count=3)
            assert web.ping("fd00:77:1::3")
            assert web.ping("10.77.1.1")
            assert web.dig("169.254.64.1", "+short", "postgres.net1") == "10.77.1.3"
            assert web.dig("169.254.64.1", "+short", "AAAA", "db.net1") == "fd00:77:1::3"
            assert not web.ping("10.77.2.2", wait=2)
            assert not other.ping("10.77.1.2", wait=2)

        await rig.trio.to_thread.run_sync(traffic)
        for guest in (web, db, other):
            await helper.drop(guest)

    portal.call(body)


def test_tcp_passes_whole_with_offloads_and_large_frames(helper: HelperVm, portal: Portal) -> None:
    async def body() -> None:
        await helper.apply(rig.network(3), rig.network(4, mtu=9000))
        for number, mtu in ((3, 1500), (4, 9000)):
            one = await helper.guest(rig.endpoint(number, 2, "one"), mtu=mtu)
            two = await helper.guest(rig.endpoint(number, 3, "two"), mtu=mtu)

            def passes(one: rig.Guest = one, two: rig.Guest = two, number: int = number) -> str:
                return send_and_receive(one, two, f"10.77.{number}.3")

            assert await rig.trio.to_thread.run_sync(passes) == "same"
            await helper.drop(one)
            await helper.drop(two)

    portal.call(body)


SIZE = 20_000_000  # bytes
SERVER = f"""
import hashlib, socket, sys
s = socket.create_server((sys.argv[1], 5000)); print("listening", flush=True)
c, _ = s.accept(); h = hashlib.sha256(); n = 0
while n < {SIZE}:
    d = c.recv(1 << 20)
    if not d: break
    h.update(d); n += len(d)
c.sendall(h.digest()); c.close()
"""
CLIENT = f"""
import hashlib, random, socket, sys
d = random.Random(1).randbytes({SIZE})
s = socket.create_connection((sys.argv[1], 5000), 60); s.settimeout(120); s.sendall(d)
a = b""
while len(a) < 32:
    p = s.recv(32)
    if not p: break
    a += p
print("same" if a == hashlib.sha256(d).digest() else "different")
"""


def send_and_receive(client: rig.Guest, server: rig.Guest, address: str) -> str:
    """What the client says of the digest that the server has sent back of what it got."""
    import subprocess
    import sys

    argv = ["ip", "netns", "exec", server.netns, sys.executable, "-c", SERVER, address]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "listening"
            return client.run(sys.executable, "-c", CLIENT, address).strip()
        finally:
            process.kill()
