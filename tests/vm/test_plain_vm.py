"""Virtual machines without an agent in a fabric: addresses, names, another network while they run, and kills."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from plain import plain_initfs, switched_on
from system.fabric import Fabric, camel, fabric
from vmlab import RECOVERY, until

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def initfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_initfs(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def lab() -> Iterator[Fabric]:
    with fabric("web") as lab:
        lab.run("network", "create", "app", "--ipv6")
        lab.run("network", "create", "back")
        for network in ("app", "back"):
            lab.run("network", "connect", network, "web")
        yield lab


@pytest.mark.parametrize("option", ["--qemu", "--qemu-server"])
def test_a_plain_vm_gets_its_address_and_reaches_others(
    lab: Fabric, kernel: Path, initfs: Path, option: str, tmp_path: Path, watch_consoles: Callable[[Path], None]
) -> None:
    watch_consoles(tmp_path)
    result = lab.command("guest", "register", "vm1", option, f"unix:{lab.path}/vm1.sock")
    assert result.returncode == 0, result.stderr
    arguments = result.stderr.strip().removeprefix("qemu: ").split()
    assert "-netdev" in arguments
    try:
        lab.run("network", "connect", "app", "vm1")
        with switched_on(kernel, initfs, tmp_path, arguments, lab.address("web", "app")) as vm:
            own = lab.address("vm1", "app")
            vm.until_says(lab, f"PING {own}", f"NAME {lab.address('web', 'app')}")
            assert camel(lab.endpoint("vm1", "app"), "link_up")
            lab.until_answers("web", "vm1", "-4")
            # To another network while it runs, and back.
            lab.run("network", "disconnect", "app", "vm1")
            lab.run("network", "connect", "back", "vm1")
            after = len(vm.lines())
            other = lab.address("vm1", "back")
            until(
                lambda: any(line.startswith(f"TOLD {other} ") for line in vm.lines()[after:]), "a new lease", RECOVERY
            )
            lab.until_answers("web", "vm1.back", "-4")
    finally:
        lab.run("guest", "rm", "vm1")


def test_the_bridge_is_killed_under_a_plain_vm(
    lab: Fabric, kernel: Path, initfs: Path, tmp_path: Path, watch_consoles: Callable[[Path], None]
) -> None:
    watch_consoles(tmp_path)
    qmp = ("--qmp", f"unix:{lab.path}/vm2.qmp")
    result = lab.command("guest", "register", "vm2", "--qemu-server", f"{lab.path}/vm2.sock", *qmp)
    arguments = result.stderr.strip().removeprefix("qemu: ").split()
    try:
        lab.run("network", "connect", "app", "vm2")
        with switched_on(kernel, initfs, tmp_path, arguments, lab.address("web", "app")) as vm:
            vm.until_says(lab, f"PING {lab.address('vm2', 'app')}")
            os.kill(lab.processes()["bridge"]["pid"], 9)
            lab.until_converged()
            vm.until_says(lab, f"PING {lab.address('vm2', 'app')}", after=len(vm.lines()))
            lab.until_answers("web", "vm2", "-4")
            # Off its network, the machine sees the cable pulled.
            lab.run("network", "disconnect", "app", "vm2")
            vm.until_says(lab, "CARRIER 0", after=len(vm.lines()))
            lab.run("network", "connect", "app", "vm2")
            vm.until_says(lab, "CARRIER 1", f"PING {lab.address('vm2', 'app')}", after=len(vm.lines()))
    finally:
        lab.run("guest", "rm", "vm2")
