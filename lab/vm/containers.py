"""Containers of a lab on virtual machines: a VM each.

Images and what containers write stay on the host, as with namespaces; the root file system is an overlay that the VM
gets by virtio-9p. In the VM crun runs the processes, started by the lab's process server, beside the guest agent.

A container's directory has, besides what every container has:

    bundle/        read by the VM: config.json, process-N.json, hostname
    mounts/N/      its bind mounts
    vm/            its VM's files (lab/vm/machine.py)
"""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import trio

from lab.runtime import children, kernel, roots
from lab.runtime.bundle import ProcessSpec
from lab.runtime.containers import Container, Process
from lab.runtime.crun import failure
from lab.runtime.engine import Child, Guest, Layout
from lab.state import GUEST_PORT, Lab
from lab.vm import processes
from lab.vm.accelerator import accelerator
from lab.vm.artefacts import FILE, Artefacts
from lab.vm.errors import MachineError
from lab.vm.keeper import until_wedged
from lab.vm.machine import Machine, Share
from lab.vm.processes import Command, ProcessError, Runtime, Terminal
from taploom.address import connect, parse_address

logger = logging.getLogger("taploom.runtime")

_MEMORY = 512
_POLL = 0.05
_BOOT_TIMEOUT = 280.0  # the bridge waits a little longer
_PLACE = Path("/run/container")  # in the VM
_STATE = "/run/taploom-lab"
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


class _Vm:
    """A container's VM."""

    def __init__(self, container: Container, machine: Machine) -> None:
        self.container = container
        self.machine = machine
        self.scope = trio.CancelScope()
        self.gone = trio.Event()
        self.serial = itertools.count(1)

    @property
    def server(self) -> str:
        """Where its process server is."""
        return self.machine.address(processes.PORT)

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Runs it until it ends or is cancelled; reports started when QEMU runs."""
        try:
            with self.scope:
                async with trio.open_nursery() as nursery:
                    await nursery.start(self._keep_vsock)
                    self.machine.prepare_qemu()
                    qemu = await self._spawn(self.machine.qemu_command(), "qemu.log")
                    task_status.started()
                    try:
                        code = await qemu.wait()
                    except trio.Cancelled:
                        await _end(qemu)
                        raise
                    logger.warning("the VM of container %s ended (%d)", self.container.id, code)
                    nursery.cancel_scope.cancel()
        finally:
            self.gone.set()

    async def _spawn(self, command: list[str], log: str) -> children.Child:
        output = os.open(self.machine.directory / log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            return children.spawn(command, stdout=output, stderr=output)
        finally:
            os.close(output)

    async def _keep_vsock(self, *, task_status: trio.TaskStatus[None]) -> None:
        first = True
        while True:
            self.machine.prepare_vsock()
            (self.machine.directory / "vsock.log").unlink(missing_ok=True)
            child = await self._spawn(self.machine.vsock_command(), "vsock.log")
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._offer_vsock, child.pid, first, task_status)
                    nursery.start_soon(self._end_wedged, child)
                    code = await child.wait()
                    nursery.cancel_scope.cancel()
            except BaseException:
                await _end(child)
                raise
            logger.warning("the vsock of container %s ended (%d)", self.container.id, code)
            first = False
            await trio.sleep(_POLL)

    async def _offer_vsock(self, pid: int, first: bool, task_status: trio.TaskStatus[None]) -> None:
        await self.machine.wait_vsock_listens(pid)
        try:
            if first:
                task_status.started()
                await self.machine.wait_qmp()
            else:
                await self.machine.replace_vsock()
            await self.machine.open_vsock(pid)
        except MachineError as error:
            logger.warning("container %s: %s", self.container.id, error)

    async def _end_wedged(self, child: children.Child) -> None:
        await self.machine.wait_vsock_listens(child.pid)
        await until_wedged(child.pid, self.machine.directory / "vsock.log")
        child.kill()

    async def wait_answers(self, port: int) -> None:
        """Returns once something listens on a port of its vsock. OSError when it ends before."""
        while True:
            try:
                await trio.aclose_forcefully(await connect(parse_address(self.machine.address(port))))
                return
            except OSError:
                if self.gone.is_set():
                    raise OSError(f"its VM ended while it booted; see {self.machine.console}") from None
            await trio.sleep(_POLL)


class VmEngine:
    """Runs containers in VMs.

    Args:
        root_of: where the root file system of a layer is.
        nursery: where VMs run.
    """

    host_network = False

    def __init__(self, lab: Lab, *, root_of: Callable[[str], Path], nursery: trio.Nursery) -> None:
        self._artefacts = Artefacts.load(lab.path / FILE)
        self._root_of = root_of
        self._nursery = nursery
        self._vms: dict[str, _Vm] = {}
        # Booting keeps a processor busy: what boots beside others is not ready sooner.
        self._booting = trio.CapacityLimiter(max(2, os.cpu_count() or 1))

    async def boot(self, container: Container, *, own_network: bool) -> Guest | None:
        """As `Engine.boot`."""
        if not own_network:
            raise OSError("a container that is a VM cannot have the host's network")
        shares = await trio.to_thread.run_sync(self._prepare, container)
        vm = self._vms[container.id] = _Vm(container, self._machine(container, shares))
        with trio.move_on_after(_BOOT_TIMEOUT) as scope:
            async with self._booting:
                await self._nursery.start(vm.run)
                await vm.wait_answers(processes.PORT)
                await self._mount(vm)
                await vm.wait_answers(GUEST_PORT)
        if scope.cancelled_caught:
            raise OSError(f"its VM was not ready after {_BOOT_TIMEOUT:.0f} s; see {vm.machine.console}")
        return Guest(vm.machine.address(GUEST_PORT), vm.machine.address(GUEST_PORT + 1))

    def _machine(self, container: Container, shares: tuple[Share, ...]) -> Machine:
        hostname = "".join(c if c.isascii() and (c.isalnum() or c == "-") else "-" for c in container.hostname)
        return Machine(
            name=container.name,
            directory=container.directory / "vm",
            kernel=self._artefacts.kernel,
            initrd=self._artefacts.guest,
            append=f"quiet taploom.hostname={hostname.strip('-') or 'container'}",
            arch=self._artefacts.arch,
            memory_mib=_MEMORY,
            shares=shares,
            accelerator=accelerator(self._artefacts.arch, self._artefacts.kernel),
        )

    def _prepare(self, container: Container) -> tuple[Share, ...]:
        """Mounts on the host what the VM gets."""
        directory = container.directory
        roots.mount(container, self._root_of(container.record.layer))
        bundle = directory / "bundle"
        bundle.mkdir(mode=0o700, exist_ok=True)
        (bundle / "hostname").write_text(f"{container.hostname}\n")
        shares = [Share("bundle", bundle, read_only=True), Share("root", directory / "root")]
        for number, mount in enumerate(container.record.mounts):
            if not mount.source:
                continue
            # A share is a directory: a file is bound into one of its own.
            place = directory / "mounts" / str(number)
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            target = place / "it"
            if Path(mount.source).is_dir():
                target.mkdir(exist_ok=True)
            else:
                target.touch()
            kernel.mount(mount.source, target, "", kernel.MS_BIND | kernel.MS_REC)
            shares.append(Share(f"mount{number}", place, mount.read_only))
        return tuple(shares)

    async def _mount(self, vm: _Vm) -> None:
        """Mounts in the VM what it gets."""
        own = ":own"  # nobody else writes there while the VM runs
        wanted = [
            f"{share.tag}{own if share.tag == 'root' else ''}={_PLACE / share.tag}" for share in vm.machine.shares
        ]
        command = Command(["/usr/libexec/taploom-lab/container", _STATE, *wanted], _ENVIRONMENT)
        try:
            code, said = await processes.run(vm.server, command)
        except ProcessError as error:
            raise OSError(f"its VM cannot mount its root file system: {error}") from error
        if code:
            raise OSError(f"its VM cannot mount its root file system: {said.decode(errors='replace').strip()}")

    def layout(self, container: Container) -> Layout:
        """As `Engine.layout`."""
        # The agent writes these two in the VM.
        files = {name: Path(name) for name in ("/etc/resolv.conf", "/etc/hosts")}
        return Layout(
            root=_PLACE / "root",
            files={**files, "/etc/hostname": _PLACE / "bundle/hostname"},
            mounts=[
                replace(mount, source=str(_PLACE / f"mount{number}/it")) if mount.source else mount
                for number, mount in enumerate(container.record.mounts)
            ],
            netns=None,
        )

    async def start(self, container: Container, process: Process, config: dict[str, Any], spec: ProcessSpec) -> Child:
        """As `Engine.start`."""
        vm = self._vms[container.id]
        serial = next(vm.serial)
        bundle = container.directory / "bundle"
        runtime = Runtime(
            f"{_STATE}/pid-{serial}", f"{_STATE}/log-{serial}", f"{_STATE}/console-{serial}" if spec.terminal else ""
        )
        options = ["--detach", "--pid-file", runtime.pid_file]
        if runtime.console_socket:
            options += ["--console-socket", runtime.console_socket]
        if process.id:
            name = f"process-{serial}.json"
            command = ["exec", *options, "--process", str(_PLACE / "bundle" / name), container.name]
        else:
            name = "config.json"
            # The VM's root is an initramfs, and that cannot be pivoted (pivot_root(2)).
            command = ["run", "--no-pivot", *options, "--bundle", str(_PLACE / "bundle"), container.name]
        (bundle / name).write_text(json.dumps(config))
        crun = ["crun", "--log", runtime.log, "--cgroup-manager=disabled", "--root", f"{_STATE}/crun", *command]
        # Shielded: half a start would leave a process that nobody knows.
        with trio.CancelScope(shield=True):
            try:
                remote = await processes.start(
                    vm.server,
                    Command(
                        crun,
                        _ENVIRONMENT,
                        stdin=spec.stdin,
                        terminal=Terminal(spec.rows or 24, spec.columns or 80) if spec.terminal else None,
                        runtime=runtime,
                    ),
                )
            except ProcessError as error:
                raise failure(str(error), list(spec.arguments)) from error
        process.streams.open_streams(
            remote.stdin if spec.stdin else None,
            remote.stdout,
            None if spec.terminal else remote.stderr,
            remote.resize if spec.terminal else None,
        )
        process.start(remote)
        self._nursery.start_soon(remote.run)
        return remote

    async def end(self, container: Container) -> None:
        """As `Engine.end`: the VM ends in `halt`, with all that is in it."""

    async def halt(self, container: Container) -> None:
        """As `Engine.halt`."""
        vm = self._vms.pop(container.id, None)
        if vm is not None:
            vm.scope.cancel()
            await vm.gone.wait()
        await trio.to_thread.run_sync(_unmount, container)

    def pid(self, child: Child) -> int:
        """As `Engine.pid`: the machine sees none of the VM's."""
        return 0


def _unmount(container: Container) -> None:
    for number, mount in enumerate(container.record.mounts):
        if mount.source:
            kernel.unmount(container.directory / "mounts" / str(number) / "it")
    roots.unmount(container)


async def _end(child: children.Child) -> None:
    with trio.CancelScope(shield=True):
        child.kill()
        await child.wait()
