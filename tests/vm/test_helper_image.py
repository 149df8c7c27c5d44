"""The helper's image in a virtual machine: its start, the kernel's data path, and networks over vsock."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from conftest import ROOT
from helper_vm import BOOT, HelperVm, helper_vm
from portal import Portal
from system import test_helper_rig as rig

from images.common.cache import file_sha256
from lab.vm.machine import Drive, Machine, running
from taploom.contracts.taploom.helper.v1 import (
    ApplyMirrorsRequest,
    ApplyUplinkRequest,
    GetInfoRequest,
    HelperFeature,
    ListEndpointsRequest,
    Mirror,
    Mirrors,
)

MEMORY = 1024  # MiB
PATIENCE = 60.0  # s
SO_RCVBUFFORCE = 33  # asm-generic/socket.h
TAP, GATEWAY, LEASED, INSIDE = "card", "192.0.2.1", "192.0.2.77", "198.51.100.1"


@dataclass(frozen=True)
class Outside:
    """A namespace behind the helper's card: it has a DHCP server, is the gateway, and is INSIDE itself."""

    netns: str
    leases: Path


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    outside = Outside(f"tlto{secrets.token_hex(4)}", tmp_path_factory.mktemp("dhcp") / "leases")
    rig.sh("ip", "netns", "add", outside.netns)
    try:
        for command in (
            f"tuntap add dev {TAP} mode tap vnet_hdr",
            f"address add {GATEWAY}/24 dev {TAP}",
            f"address add {INSIDE}/32 dev lo",
            "link set lo up",
            f"link set {TAP} up",
        ):
            rig.sh("ip", "-n", outside.netns, *command.split())
        server = [
            *("ip", "netns", "exec", outside.netns, "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null"),
            *("--pid-file=", "--user=root", "--port=0", f"--interface={TAP}", f"--dhcp-leasefile={outside.leases}"),
            *("--dhcp-authoritative", "--no-ping", f"--dhcp-range={LEASED},{LEASED},255.255.255.0,1h"),
            *(f"--dhcp-option=option:router,{GATEWAY}", "--dhcp-option=option:mtu,1400"),
        ]
        with subprocess.Popen(server, stdin=subprocess.DEVNULL) as process:
            try:
                yield outside
                assert process.poll() is None, "the DHCP server has ended"
            finally:
                process.kill()
    finally:
        rig.sh("ip", "netns", "del", outside.netns)


@pytest.fixture(scope="module")
def machine(kernel: Path, helper_initfs: Path, machine_directory: Callable[[str], Path]) -> Machine:
    directory = machine_directory("helper")
    append = "taploom.net=dhcp"
    return Machine("helper", directory, kernel, helper_initfs, append, memory_mib=MEMORY, cpus=2, tap=TAP)


@pytest.fixture(scope="module")
def helper(machine: Machine, outside: Outside, portal: Portal) -> Iterator[HelperVm]:
    with portal.opened(helper_vm(machine, outside.netns)) as helper:
        yield helper


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


def test_mirrors_copy_what_passes(helper: HelperVm, portal: Portal) -> None:
    """By the image's kernel and nft, beside the kernel's data path: what the receiver has is what the source has."""

    async def body() -> None:
        await helper.apply(rig.network(7), rig.network(8))
        web = await helper.guest(rig.endpoint(7, 2, "web"))
        db = await helper.guest(rig.endpoint(7, 3, "db"))
        ids = await helper.guest(rig.endpoint(8, 2, "ids"))
        mirror = Mirror(source_endpoint_id="e7-2", target_endpoint_id="e8-2")
        await helper.mirrors.apply_mirrors(ApplyMirrorsRequest(mirrors=Mirrors(mirrors=[mirror])), timeout=PATIENCE)

        def traffic() -> None:
            with web.raw() as own, ids.raw() as copied:
                for one in (own, copied):
                    one.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
                assert web.ping("10.77.7.3", count=3)
                # What nobody copies comes last, and large frames are among the copies.
                assert send_and_receive(web, db, "10.77.7.3", LITTLE) == "same"
                assert ids.ping("10.77.8.1")
                here, there = frames(own, "10.77.7.3"), frames(copied, "10.77.7.3")
            assert len([frame for frame in here if frame[23] == socket.IPPROTO_ICMP]) == 6
            assert max(map(len, here)) > 1514
            assert sorted(there) == sorted(here)

        await trio.to_thread.run_sync(traffic)
        await helper.mirrors.apply_mirrors(ApplyMirrorsRequest(mirrors=Mirrors()), timeout=PATIENCE)
        with ids.raw() as copied:
            await trio.to_thread.run_sync(lambda: web.ping("10.77.7.3") and ids.ping("10.77.8.1"))
            assert frames(copied, "10.77.7.3") == []
        for guest in (web, db, ids):
            await helper.drop(guest)

    portal.call(body)


def frames(sock: socket.socket, address: str) -> list[bytes]:
    """The IPv4 frames that wait in a packet socket and are from or to an address."""
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            frame = sock.recv(1 << 17)
            if frame[12:14] == b"\x08\x00" and socket.inet_aton(address) in (frame[26:30], frame[30:34]):
                found.append(frame)
    return found


def test_the_way_out_is_asked_for_by_dhcp(helper: HelperVm, portal: Portal, outside: Outside) -> None:
    """What leaves the networks has the address that the DHCP server gave the helper."""

    async def body() -> None:
        await rig.eventually(lambda: outside.leases.exists() and LEASED in outside.leases.read_text(), BOOT)
        await helper.client.apply_uplink(ApplyUplinkRequest(uplink=rig.UPLINK), timeout=PATIENCE)
        await helper.apply(rig.outgoing(5), rig.outgoing(6, uplink_addresses=[], uplink_mac=""))
        web = await helper.guest(rig.endpoint(5, 2, "web", ipv6=True), gateway="10.77.5.1")
        shut = await helper.guest(rig.endpoint(6, 2, "shut", ipv6=True), gateway="10.77.6.1")

        def traffic() -> None:
            assert web.ping(INSIDE)
            with rig.listen(outside.netns, INSIDE, 80) as listener, rig.dial(web.netns, INSIDE, 80, PATIENCE) as client:
                server, (peer, _) = listener.accept()
                with server:
                    assert peer == LEASED
                    client.sendall(b"out")
                    assert server.recv(10) == b"out"
                    server.sendall(b"and in")
                    assert client.recv(10) == b"and in"
            assert not shut.ping(INSIDE, wait=2), "a network without a way out"

        await trio.to_thread.run_sync(traffic)
        for guest in (web, shut):
            await helper.drop(guest)

    portal.call(body)


SIZE, LITTLE = 20_000_000, 100_000  # bytes
SERVER = """
import hashlib, socket, sys; size = int(sys.argv[2])
s = socket.create_server((sys.argv[1], 5000)); print("listening", flush=True)
c, _ = s.accept(); h = hashlib.sha256(); n = 0
while n < size:
    d = c.recv(1 << 20)
    if not d: break
    h.update(d); n += len(d)
c.sendall(h.digest()); c.close()
"""
CLIENT = """
import hashlib, random, socket, sys
d = random.Random(1).randbytes(int(sys.argv[2]))
s = socket.create_connection((sys.argv[1], 5000), 60); s.settimeout(120); s.sendall(d)
a = b""
while len(a) < 32:
    p = s.recv(32)
    if not p: break
    a += p
print("same" if a == hashlib.sha256(d).digest() else "different")
"""


def send_and_receive(client: rig.Guest, server: rig.Guest, address: str, size: int = SIZE) -> str:
    """What the client says of the digest that the server has sent back of what it got."""
    argv = ["ip", "netns", "exec", server.netns, sys.executable, "-c", SERVER, address, str(size)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "listening"
            return client.run(sys.executable, "-c", CLIENT, address, str(size)).strip()
        finally:
            process.kill()


def test_the_read_only_root_starts_too(
    kernel: Path, helper_initfs: Path, machine_directory: Callable[[str], Path], portal: Portal
) -> None:
    async def body() -> None:
        drive = Drive(helper_initfs.with_name("helper.squashfs"), True)
        machine = Machine(
            "helper-root",
            machine_directory("helper-root"),
            kernel,
            append="root=/dev/vda ro",
            memory_mib=MEMORY,
            cpus=2,
            drives=(drive,),
        )
        with trio.fail_after(BOOT):
            async with running(machine) as vm:
                await vm.wait_console("agent answers after")
                await vm.wait_console("kernel data path")

    portal.call(body)


def test_two_builds_are_the_same_and_list_all_packages(helper_initfs: Path, tmp_path: Path) -> None:
    build = ROOT / "images/alpine-helper/build"
    subprocess.run([sys.executable, build, "--json"], check=True, capture_output=True)
    subprocess.run([sys.executable, build, "--json", "--force", "--output", tmp_path], check=True, capture_output=True)
    place = helper_initfs.parent
    names = sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())
    again = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert names == again
    assert [name for name in names if file_sha256(place / name) != file_sha256(tmp_path / name)] == []
    manifest = json.loads((place / "manifest.json").read_text())
    listed = {package["name"]: package for package in manifest["packages"]}
    assert {"openvswitch-switch", "ovn-central", "ovn-host", "dnsmasq-base", "nftables", "musl-dev"} <= set(listed)
    assert all(package["version"] and len(package["sha256"]) == 64 for package in listed.values())
    assert helper_initfs.stat().st_size <= 60_000_000
