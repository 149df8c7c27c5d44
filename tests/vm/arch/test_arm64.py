"""The arm64 kernel and images in qemu-system-aarch64, with a vsock as on x86_64: both agents answer and do their work.

They stand apart from tests/vm, as only `make test-vm ARCH=arm64` builds for an architecture that is not this machine's.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
from conftest import built
from helper_vm import HelperVm, helper_vm
from portal import Portal
from system import test_helper_rig as rig

from images.common import oci
from images.common.cache import file_sha256
from lab.vm.machine import Machine, running
from taploom.address import connect, parse_address
from taploom.contracts.taploom.guest.v1 import GetInfoRequest as GuestInfoRequest
from taploom.contracts.taploom.guest.v1 import GuestFeature
from taploom.contracts.taploom.guest.v1.rpc import GuestServiceClient
from taploom.contracts.taploom.helper.v1 import Endpoint, GetInfoRequest, HelperFeature, Network
from taploom.rpc import RpcError, StatusCode, open_channel

ARCH = "arm64"
BOOT = 900.0  # s that a boot may take on a machine that has much else to do
_IMAGE_MAGIC = b"ARM\x64"  # Documentation/arch/arm64/booting.rst: at 56 in an Image's header


@pytest.fixture(scope="module")
def kernel() -> Path:
    return built("kernel", ARCH, "vmlinuz", command=f"kernel/build --arch {ARCH}")


@pytest.fixture(scope="module")
def guest_initfs() -> Path:
    name = "guest-initfs.cpio.zst"
    return built("images", "guest-initfs", ARCH, name, command=f"images/guest-initfs/build --arch {ARCH}")


@pytest.fixture(scope="module")
def helper_initfs() -> Path:
    name = "helper.cpio.zst"
    return built("images", "alpine-helper", ARCH, name, command=f"images/alpine-helper/build --arch {ARCH}")


@pytest.fixture(scope="module")
def helper(
    kernel: Path, helper_initfs: Path, machine_directory: Callable[[str], Path], portal: Portal
) -> Iterator[HelperVm]:
    directory = machine_directory("helper-arm64")
    machine = Machine("helper-arm64", directory, kernel, helper_initfs, arch=ARCH, memory_mib=1024, cpus=2)
    with portal.opened(helper_vm(machine)) as helper:
        yield helper


def test_the_kernel_is_a_plain_image(kernel: Path) -> None:
    """Virtualization.framework, Cloud Hypervisor and Firecracker boot nothing else on arm64."""
    with kernel.open("rb") as file:
        header = file.read(64)
    assert header[56:60] == _IMAGE_MAGIC
    (flags,) = struct.unpack_from("<Q", header, 24)
    assert flags & 1 == 0, "it is for a big-endian processor"
    manifest = json.loads((kernel.parent / "manifest.json").read_text())
    assert manifest["arch"] == ARCH
    assert manifest["outputs"]["vmlinuz"]["sha256"] == file_sha256(kernel)


def test_the_oci_layouts_say_which_processor_they_are_for(guest_initfs: Path, helper_initfs: Path) -> None:
    for image in (guest_initfs.parent, helper_initfs.parent):
        assert [config["architecture"] for config in oci.check_layout(image / "oci")] == ["arm64"]


async def test_the_guest_image_boots_to_its_agent_answering_over_vsock(
    kernel: Path, guest_initfs: Path, machine_directory: Callable[[str], Path]
) -> None:
    machine = Machine(
        name="guest-arm64",
        directory=machine_directory("guest-arm64"),
        kernel=kernel,
        initrd=guest_initfs,
        append="taploom.hostname=booted",
        arch=ARCH,
    )
    with trio.fail_after(BOOT):
        async with running(machine) as vm:
            await (await vm.wait_connect(5555)).aclose()  # something listens there
            async with open_channel(await connect(parse_address(machine.address(5555)))) as channel:
                info = await GuestServiceClient(channel).get_info(GuestInfoRequest(), timeout=120.0)
            console = await vm.wait_console("agent answers after")
    assert info.hostname == "booted"
    assert GuestFeature.LINK_TSO in info.features
    assert "Booting Linux on physical CPU" in console  # arm64's first message


def test_the_helper_switches_with_the_kernels_data_path(helper: HelperVm, portal: Portal) -> None:
    info = portal.call(helper.client.get_info, GetInfoRequest())
    assert {HelperFeature.KERNEL_DATAPATH, HelperFeature.LINK_TSO} <= set(info.features)


async def apply_patiently(helper: HelperVm, *messages: Network | Endpoint) -> None:
    """As the bridge does: what the helper cannot do in its time, it is told again."""
    with trio.fail_after(BOOT):
        for message in messages:
            while True:
                try:
                    await helper.apply(message)
                    break
                except RpcError as error:
                    if error.code is not StatusCode.UNAVAILABLE:
                        raise
                await trio.sleep(0.1)


def test_guests_of_the_helper_reach_each_other_by_name(helper: HelperVm, portal: Portal) -> None:
    """They are namespaces of this machine; names, addresses, switching and routing are the arm64 helper's."""

    endpoints = rig.endpoint(1, 2, "web", ipv6=True), rig.endpoint(1, 3, "db", "postgres", ipv6=True)
    elsewhere = rig.endpoint(2, 2, "web")

    async def body() -> None:
        await apply_patiently(helper, rig.network(1, ipv6=True), rig.network(2), *endpoints, elsewhere)
        web = await helper.guest(endpoints[0], dns="169.254.64.1", gateway="10.77.1.1")
        db = await helper.guest(endpoints[1])
        other = await helper.guest(elsewhere, gateway="10.77.2.1")

        def traffic() -> None:
            assert web.ping("10.77.1.3", count=3)
            assert web.ping("fd00:77:1::3")
            assert web.dig("169.254.64.1", "+short", "postgres.net1") == "10.77.1.3"
            assert not other.ping("10.77.1.2", wait=2)

        await trio.to_thread.run_sync(traffic)
        for guest in (web, db, other):
            await helper.drop(guest)

    portal.call(body)
