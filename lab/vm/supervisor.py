"""The supervisor of a lab on virtual machines: helper and guests are VMs, the bridge is on the host between them."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import trio

from lab import internet
from lab.state import GUEST_PORT, HELPER_PORT, Lab
from lab.supervisor import Supervisor, add_netns
from lab.vm.accelerator import accelerator
from lab.vm.artefacts import FILE, Artefacts
from lab.vm.keeper import KeptMachine
from lab.vm.machine import Machine

_GUEST_MEMORY = 512
_HELPER_MEMORY = 1024
_TAP = "eth0"


class VmSupervisor(Supervisor):
    """The processes of a lab on virtual machines."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self._artefacts = Artefacts.load(lab.path / FILE)
        self._accelerator = accelerator(self._artefacts.arch, self._artefacts.kernel)
        # Booting keeps a processor busy: what boots beside others is not ready sooner. The helper, which takes longest
        # and without which nothing is ready, does not wait.
        self._booting = trio.CapacityLimiter(max(2, os.cpu_count() or 1))

    def machine(self, name: str, directory: Any, **more: Any) -> Machine:
        """A machine of the lab."""
        hostname = name.replace("_", "-").strip("-.")
        return Machine(
            name=name,
            directory=directory,
            kernel=self._artefacts.kernel,
            arch=self._artefacts.arch,
            accelerator=self._accelerator,
            append=f"quiet taploom.hostname={hostname} {more.pop('append', '')}".strip(),
            **more,
        )

    async def _start_helper(self, nursery: trio.Nursery) -> None:
        namespace = self._lab.internet_netns
        add_netns(namespace)
        _add_uplink(namespace)
        way_out = ",".join((*internet.HELPER_ADDRESSES, *internet.GATEWAYS))
        machine = self.machine(
            "helper",
            self._lab.helper_directory,
            initrd=self._artefacts.helper,
            memory_mib=_HELPER_MEMORY,
            tap=_TAP,
            append=f"taploom.net={way_out}",
        )
        nursery.start_soon(self._keep("helper", machine, HELPER_PORT, namespace).run)

    async def _run_guest(self, name: str) -> None:
        machine = self.machine(
            name, self._lab.guest_directory(name), initrd=self._artefacts.guest, memory_mib=_GUEST_MEMORY
        )
        kept = self._keep(f"guest/{name}", machine, GUEST_PORT, None)
        async with trio.open_nursery() as nursery, self._booting:
            await nursery.start(kept.run)

    def _remove_guest(self, name: str) -> None:
        for process in (f"guest/{name}", f"guest/{name}/vsock"):
            self._processes.pop(process, None)

    def _keep(self, name: str, machine: Machine, port: int, netns: str | None) -> KeptMachine:
        kept = KeptMachine(
            name,
            machine,
            port,
            logs=self._lab.logs,
            env=self._lab.environment(),
            netns=netns,
            on_change=self._write_status,
        )
        self._process(name, kept.qemu)
        self._process(f"{name}/vsock", kept.vsock)
        self._write_status()
        return kept


def _add_uplink(namespace: str) -> None:
    """The helper VM's network card, seen from the namespace that plays the internet."""
    if subprocess.run(["ip", "-n", namespace, "link", "show", _TAP], capture_output=True, check=False).returncode == 0:
        return
    for command in (
        f"tuntap add dev {_TAP} mode tap vnet_hdr",
        *(f"address add {address}/{64 if ':' in address else 24} dev {_TAP}" for address in internet.GATEWAYS),
        *(f"address add {address} dev lo" for address in internet.SERVERS),
        *(f"link set {device} up" for device in ("lo", _TAP)),
    ):
        nodad = ["nodad"] if command.startswith("address") and "::" in command else []
        subprocess.run(["ip", "-n", namespace, *command.split(), *nodad], check=True)
