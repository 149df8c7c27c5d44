"""One virtual machine: what it is, the commands that run it, and a way to have it run in a block.

A machine is QEMU and, for its vsock, vhost-device-vsock: the host's kernel is not involved, so that it runs anywhere,
and the host side is a Unix socket (a `hybrid:` address). Files in a machine's directory:

    console.log         what its serial console printed since it was started
    vsock.sock          the vsock's host side: `CONNECT PORT`; there while the VM's driver serves the device
    device.sock         what it leads to
    vhost.sock          between QEMU and vhost-device-vsock
    qmp.sock            QEMU's machine protocol
    qemu.log vsock.log  what the two processes said
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from lab.runtime import kernel as system
from lab.vm import device, tools
from lab.vm.accelerator import accelerator, console_device, machine_type
from lab.vm.errors import MachineError
from lab.vm.qmp import Qmp, QmpError, open_qmp
from lab.vm.timestamp import timestamp_khz
from taploom.address import HybridAddress, connect

# Between the host's CID 2 and the first that the lab's VMs use nothing else is. Each VM has a device of its own, so the
# CIDs of different VMs may be equal; what a VM reads as its own is this.
GUEST_CID = 3
_POLL = 0.02
_UNPLUG_TIMEOUT = 30.0
# What a VM may have sent on a connection before the host takes it; the device reads it at 64 KiB unless told otherwise,
# which is two of taploom's writes, and the VM then waits for leave to send after each of them.
_TX_BUFFER = 1 << 20
_ACCEPTS = 1 << 16  # __SO_ACCEPTCON in /proc/net/unix


@dataclass(frozen=True)
class Share:
    """A directory of the host in the VM, by virtio-9p; the VM mounts it by its tag."""

    tag: str
    path: Path
    read_only: bool = False


@dataclass(frozen=True)
class Drive:
    """A file of the host as a disk in the VM, by virtio-blk."""

    path: Path
    read_only: bool = True


@dataclass(frozen=True)
class Machine:
    """A virtual machine.

    Args:
        name: what it is called, for people.
        directory: where its sockets and logs are; made 0700 when it runs.
        kernel: the kernel's image.
        initrd: the initramfs; several archives can be concatenated in one file.
        append: added to the kernel's command line.
        arch: x86_64 or arm64.
        memory_mib: memory in MiB.
        cpus: virtual processors.
        vsock: whether it has one.
        shares: directories of the host.
        drives: disks.
        tap: the name of a TAP interface, in QEMU's network namespace, for a virtio-net NIC; none without it.
        accelerator: kvm, hvf or tcg; chosen when empty.
    """

    name: str
    directory: Path
    kernel: Path
    initrd: Path | None = None
    append: str = ""
    arch: str = "x86_64"
    memory_mib: int = 512
    cpus: int = 1
    vsock: bool = True
    shares: tuple[Share, ...] = ()
    drives: tuple[Drive, ...] = ()
    tap: str = ""
    accelerator: str = ""

    @property
    def console(self) -> Path:
        return self.directory / "console.log"

    @property
    def vsock_socket(self) -> Path:
        return self.directory / "vsock.sock"

    @property
    def device_socket(self) -> Path:
        return self.directory / "device.sock"

    @property
    def vhost_socket(self) -> Path:
        return self.directory / "vhost.sock"

    @property
    def qmp_socket(self) -> Path:
        return self.directory / "qmp.sock"

    def address(self, port: int) -> str:
        """Where a port of its vsock is, as the host's bridge dials it."""
        return f"hybrid:{self.vsock_socket}:{port}"

    def vsock_command(self) -> list[str]:
        """vhost-device-vsock. MachineError when it is not there."""
        return [
            *(tools.vhost_device_vsock(), "--guest-cid", str(GUEST_CID)),
            *("--socket", str(self.vhost_socket), "--uds-path", str(self.device_socket)),
            *("--tx-buffer-size", str(_TX_BUFFER)),
        ]

    def qemu_command(self) -> list[str]:
        """QEMU; with a vsock, vhost-device-vsock is to listen before. MachineError when it is not there."""
        accel = self._accelerator()
        command = [
            *(tools.qemu(self.arch), "-name", f"{self.name},process=taploom-vm"),
            *("-nodefaults", "-no-user-config", "-nic", "none", "-display", "none", "-no-reboot"),
            *("-accel", f"tcg,thread={self._threads()}" if accel == "tcg" else accel, "-cpu", _cpu(self.arch, accel)),
            # The vsock's process reads and writes the VM's memory.
            *("-machine", f"{machine_type(self.arch)},memory-backend=mem0", "-m", f"{self.memory_mib}M"),
            *("-object", f"memory-backend-memfd,id=mem0,size={self.memory_mib}M,share=on"),
            *("-smp", str(self.cpus)),
            *("-chardev", f"file,id=console0,path={_escaped(self.console)}", "-serial", "chardev:console0"),
            *("-qmp", f"unix:{_escaped(self.qmp_socket)},server=on,wait=off"),
            *("-kernel", str(self.kernel), "-append", self.kernel_command_line()),
        ]
        if self.initrd is not None:
            command += ["-initrd", str(self.initrd)]
        if self.vsock:
            command += [
                *("-device", "pcie-root-port,id=vsockport,chassis=1"),  # where devices can be replaced
                *("-chardev", f"socket,id=vsock0,path={_escaped(self.vhost_socket)}"),
                *("-device", "vhost-user-vsock-pci,id=vsockdev0,chardev=vsock0,bus=vsockport"),
            ]
        for number, share in enumerate(self.shares):
            access = ",readonly=on" if share.read_only else ""
            path = _escaped(share.path)
            command += [
                *("-fsdev", f"local,id=fs{number},path={path},security_model=passthrough,multidevs=remap{access}"),
                *("-device", f"virtio-9p-pci,fsdev=fs{number},mount_tag={share.tag}"),
            ]
        for number, drive in enumerate(self.drives):
            access = "on" if drive.read_only else "off"
            command += [
                *("-drive", f"if=none,id=drive{number},format=raw,readonly={access},file={_escaped(drive.path)}"),
                *("-device", f"virtio-blk-pci,drive=drive{number}"),
            ]
        if self.tap:
            command += [
                *("-netdev", f"tap,id=net0,ifname={self.tap},script=no,downscript=no"),
                *("-device", "virtio-net-pci,netdev=net0,romfile="),
            ]
        return command

    def kernel_command_line(self) -> str:
        """What the kernel is told: a panic ends the VM, as -no-reboot makes QEMU's end of it."""
        words = [f"console={console_device(self.arch)}", "panic=-1"]
        if self.arch == "x86_64":
            # Whether the timer ticks is asked with a time limit that an emulated processor does not always keep.
            words.append("no_timer_check")
            if self._accelerator() == "tcg":
                words.append(_clock())
                # Code that is patched has to be translated anew, and nobody needs the jitter of an emulated clock.
                words += ["noreplace-smp", "initcall_blacklist=jent_mod_init"]
                # An emulated processor does not speculate; guarding against it costs at each indirect call.
                words.append("mitigations=off")
                # TCP makes its segments smaller the longer the round trip is, from half a millisecond on. Here that is
                # the emulation's time, not a distance: up to 16 ms count as near.
                words.append("sysctl.net.ipv4.tcp_tso_rtt_log=14")
        return " ".join([*words, *self.append.split()])

    def _threads(self) -> str:
        """How emulated processors run: each in a thread of its own, or in turn in one.

        Linux patches its own code on x86_64 by way of a breakpoint that the other processors may run into until all
        have been told. Of two that are emulated at the same time, one can still have it translated afterwards: the
        kernel knows of no breakpoint there then, and panics ("Oops: int3"; QEMU 7.2, one run of kernel/verify in six).
        """
        return "single" if self.arch == "x86_64" and self.cpus > 1 else "multi"

    def _accelerator(self) -> str:
        return self.accelerator or accelerator(self.arch, self.kernel)

    def prepare_vsock(self) -> None:
        """Before vhost-device-vsock is started: its directory, without the sockets of the last one."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in (self.vhost_socket, self.device_socket, self.vsock_socket):
            path.unlink(missing_ok=True)

    def prepare_qemu(self) -> None:
        """Before QEMU is started: its directory, without the last one's sockets; console.log.1 is its console."""
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in (self.qmp_socket, self.vsock_socket):
            path.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self.console.rename(self.console.with_name("console.log.1"))
        self.console.touch(mode=0o600)

    async def wait_vsock_listens(self, pid: int) -> None:
        """Returns once vhost-device-vsock takes QEMU's connection; nobody is to try, for it takes one only.

        The thread that serves the queues may begin a moment after that: it is waited for too, as one that is not there
        counts as lost later.

        Args:
            pid: its process.
        """
        while not (_listens(self.vhost_socket) and device.serves(pid)):
            await trio.sleep(_POLL)

    async def open_vsock(self, pid: int) -> None:
        """Makes the vsock's host side appear once the VM's driver serves the device (`lab.vm.device` says why then).

        Args:
            pid: vhost-device-vsock's.

        Raises:
            MachineError: QEMU has ended.
        """
        async with open_qmp(self.qmp_socket) as qmp:
            while not (await _vsock_is_served(qmp) and device.has_taken_all(pid)):
                if not device.serves(pid):
                    raise MachineError(f"the vsock device of VM {self.name} has ended")
                await trio.sleep(_POLL)
        new = self.vsock_socket.with_name(".vsock.sock.new")
        new.unlink(missing_ok=True)
        new.symlink_to(self.device_socket.name)
        new.replace(self.vsock_socket)

    async def wait_qmp(self) -> None:
        """Returns once QEMU takes commands."""
        while True:  # its socket is not in our /proc/net/unix where it has a network namespace of its own
            try:
                async with open_qmp(self.qmp_socket):
                    return
            except QmpError:
                await trio.sleep(_POLL)

    async def replace_vsock(self) -> None:
        """Gives a running VM a new vsock device after its vhost-device-vsock was started again.

        QEMU keeps a vhost-user device whose process has ended, and does not take it back. So the dead one is unplugged,
        as a card would be, and a new one plugged; what listens on vsock in the VM goes on listening on it.

        Raises:
            MachineError: QEMU has ended, or the VM does not let the old device go.
        """
        async with open_qmp(self.qmp_socket) as qmp:
            old = await _vsock_generation(qmp)
            if old is not None:
                await qmp.execute("device_del", id=f"vsockdev{old}")
                with trio.move_on_after(_UNPLUG_TIMEOUT) as scope:
                    while (await qmp.event("DEVICE_DELETED")).get("device") != f"vsockdev{old}":
                        pass
                if scope.cancelled_caught:
                    raise MachineError(f"VM {self.name} keeps its vsock device whose process has ended")
            new = 0 if old is None else old + 1
            if old is not None:
                with contextlib.suppress(QmpError):
                    await qmp.execute("chardev-remove", id=f"vsock{old}")
            address = {"type": "unix", "data": {"path": str(self.vhost_socket)}}
            backend = {"type": "socket", "data": {"addr": address, "server": False}}
            await qmp.execute("chardev-add", id=f"vsock{new}", backend=backend)
            await qmp.execute(
                "device_add",
                driver="vhost-user-vsock-pci",
                id=f"vsockdev{new}",
                chardev=f"vsock{new}",
                bus="vsockport",
            )


async def _vsock_generation(qmp: Qmp) -> int | None:
    """The number of the vsock device that QEMU has; None: it has none."""
    names = [entry["name"] for entry in await qmp.execute("qom-list", path="/machine/peripheral")]
    numbers = [int(name.removeprefix("vsockdev")) for name in names if name.startswith("vsockdev")]
    return max(numbers, default=None)


async def _vsock_is_served(qmp: Qmp) -> bool:
    generation = await _vsock_generation(qmp)
    if generation is None:
        return False
    path = f"/machine/peripheral/vsockdev{generation}/virtio-backend"
    status = (await qmp.execute("x-query-virtio-status", path=path))["status"]
    return any("DRIVER_OK" in text for text in status["statuses"])


def _cpu(arch: str, accel: str) -> str:
    if accel != "tcg":
        return "host"
    if arch == "x86_64":
        # QEMU 7.2 restores wrong flags when an interrupt comes right after cmpxchg16b: kernels then panic in SLUB.
        # With erms, kernel and C library copy and clear with 'rep movsb', which is emulated byte by byte; without it,
        # eight bytes at a time. With la57, the page tables that are walked in software have a fifth level. Guarding the
        # kernel from programs' memory costs with each copy between them, and is not what these VMs are for.
        return "max,-cx16,-erms,-la57,-smap,-smep,-umip,-pku"
    # Emulating pointer authentication, as 'max' does on arm64, costs more than everything else.
    return "cortex-a72"


def _clock() -> str:
    """Which clock a kernel on emulated x86_64 processors is to use.

    It would measure the rate of the processor's own, the TSC, when it boots, and be wrong by any factor on a busy host.
    Told the rate, it has a clock that it and its programs read without a device's being emulated.
    """
    khz = timestamp_khz()
    return "clocksource=hpet" if khz is None else f"clocksource=tsc tsc=reliable tsc_early_khz={khz}"


def _escaped(path: Path) -> str:
    """A path in a QEMU option: commas are doubled."""
    return str(path).replace(",", ",,")


def _listens(path: Path) -> bool:
    """Whether somebody listens on the Unix socket, without connecting to it (proc_net(5))."""
    wanted = str(path)
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[7] == wanted and int(fields[3], 16) & _ACCEPTS:
            return True
    return False


@dataclass
class _Child:
    """A child process with a way to wait for its end; it ends with us."""

    process: subprocess.Popen[bytes]
    pidfd: int

    @classmethod
    def start(cls, command: Sequence[str], log: Path, netns: str | None) -> _Child:
        namespace = None if netns is None else os.open(Path("/run/netns", netns), os.O_RDONLY | os.O_CLOEXEC)

        def in_child() -> None:
            system.die_with_parent(signal.SIGKILL)
            if namespace is not None:
                system.setns(namespace, system.CLONE_NEWNET)

        try:
            with log.open("ab") as output:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    preexec_fn=in_child,  # noqa: PLW1509 -- it makes system calls only; no lock is taken
                    start_new_session=True,
                )
        finally:
            if namespace is not None:
                os.close(namespace)
        return cls(process, os.pidfd_open(process.pid))

    async def wait(self) -> int:
        """Its exit code, negative for a signal; any number of tasks may wait."""
        pidfd = os.dup(self.pidfd)  # trio lets one task wait for a descriptor
        try:
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)
        return self.process.wait()

    async def kill(self) -> None:
        """Returns when it is gone."""
        with trio.CancelScope(shield=True):
            self.process.kill()
            await self.wait()

    async def end(self) -> None:
        await self.kill()
        os.close(self.pidfd)


class RunningMachine:
    """A machine that runs; `running` makes one.

    Attributes:
        started_at: when QEMU was started last (time.monotonic()).
    """

    def __init__(self, machine: Machine, netns: str | None, nursery: trio.Nursery) -> None:
        self.machine = machine
        self.started_at = 0.0
        self._nursery = nursery
        self._netns = netns
        self._qemu: _Child | None = None
        self._vsock: _Child | None = None

    @property
    def console(self) -> Path:
        return self.machine.console

    @property
    def exited(self) -> bool:
        """Whether QEMU has ended."""
        return self.exit_code is not None

    @property
    def exit_code(self) -> int | None:
        """QEMU's exit code, negative for a signal; None while it runs."""
        return None if self._qemu is None else self._qemu.process.poll()

    async def wait_exited(self) -> int:
        """QEMU's exit code when it has ended."""
        assert self._qemu is not None
        return await self._qemu.wait()

    @property
    def qemu_pid(self) -> int:
        """0 when it does not run."""
        return self._qemu.process.pid if self._qemu is not None and not self.exited else 0

    @property
    def vsock_pid(self) -> int:
        """0 when it does not run."""
        return self._vsock.process.pid if self._vsock is not None and self._vsock.process.poll() is None else 0

    async def start_vsock(self) -> None:
        """Starts vhost-device-vsock, at first or again; returns when QEMU can connect to it."""
        if self._vsock is not None:
            await self._vsock.end()
        self.machine.prepare_vsock()
        log = self.machine.directory / "vsock.log"
        self._vsock = _Child.start(self.machine.vsock_command(), log, None)
        while not _listens(self.machine.vhost_socket):
            if self._vsock.process.poll() is not None:
                raise MachineError(f"vhost-device-vsock of VM {self.machine.name} ended at once:\n{_tail(log)}")
            await trio.sleep(_POLL)

    async def start_qemu(self) -> None:
        """Starts QEMU, at first or again."""
        if self._qemu is not None:
            await self._qemu.end()
        command = await trio.to_thread.run_sync(self.machine.qemu_command)
        self.machine.prepare_qemu()
        self.started_at = time.monotonic()
        self._qemu = _Child.start(command, self.machine.directory / "qemu.log", self._netns)
        if self.machine.vsock:
            self._nursery.start_soon(self._open_vsock)

    async def _open_vsock(self) -> None:
        async with _while_running(self._qemu):
            await self.machine.wait_qmp()
            # It may also end, or lose the device's process, while it is asked: whoever starts it again opens it again.
            with contextlib.suppress(MachineError):
                await self.machine.open_vsock(self.vsock_pid)

    async def wait_console(self, text: str) -> str:
        """Waits until the console has printed `text`; returns everything up to and including that line.

        Raises:
            MachineError: QEMU ended without; the message has the console's end.
        """
        while True:
            ended = self.exited  # before the console is read
            printed = self.console.read_text(errors="replace") if self.console.exists() else ""
            found = printed.find(text)
            if found >= 0:
                end = printed.find("\n", found)
                if end >= 0:
                    return printed[:end]
            if ended:
                raise MachineError(
                    f"VM {self.machine.name} ended ({self.exit_code}) without saying {text!r}:\n"
                    f"{_tail(self.machine.directory / 'qemu.log')}{_tail(self.console)}"
                )
            await trio.sleep(_POLL)

    async def connect(self, port: int) -> trio.SocketStream:
        """A connection to a port of its vsock. OSError when nothing answers."""
        return await connect(HybridAddress(str(self.machine.vsock_socket), port))

    async def wait_connect(self, port: int) -> trio.SocketStream:
        """As `connect`, once something listens there. MachineError when QEMU ends before."""
        while True:
            try:
                return await self.connect(port)
            except OSError:
                if self.exited:
                    raise MachineError(
                        f"VM {self.machine.name} ended ({self.exit_code}):\n{_tail(self.console)}"
                    ) from None
            await trio.sleep(_POLL)

    def qmp(self) -> contextlib.AbstractAsyncContextManager[Qmp]:
        """A connection to its QEMU."""
        return open_qmp(self.machine.qmp_socket)

    async def kill_qemu(self) -> None:
        """Kills QEMU; returns when it is gone."""
        if self._qemu is not None:
            await self._qemu.kill()

    async def kill_vsock(self) -> None:
        """Kills vhost-device-vsock; returns when it is gone."""
        if self._vsock is not None:
            await self._vsock.kill()
            self.machine.vsock_socket.unlink(missing_ok=True)

    async def restart_vsock(self) -> None:
        """Starts vhost-device-vsock again and gives the VM a new device; MachineError when that cannot be."""
        await self.start_vsock()
        await self.machine.replace_vsock()
        self._nursery.start_soon(self._open_vsock)

    async def end(self) -> None:
        """Kills what runs of it."""
        for child in (self._qemu, self._vsock):
            if child is not None:
                await child.end()
        self._qemu = self._vsock = None


@contextlib.asynccontextmanager
async def _while_running(child: _Child | None) -> AsyncIterator[None]:
    """The block is left when the process ends."""
    assert child is not None
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            await child.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(wait)
        yield
        nursery.cancel_scope.cancel()


def _tail(path: Path, lines: int = 15) -> str:
    try:
        text = path.read_text(errors="replace").splitlines()[-lines:]
    except FileNotFoundError:
        return ""
    return "".join(f"  {line}\n" for line in text)


@contextlib.asynccontextmanager
async def running(machine: Machine, *, netns: str | None = None) -> AsyncIterator[RunningMachine]:
    """The machine runs while the block does.

    Args:
        netns: the name of a network namespace for QEMU, where its TAP is.

    Raises:
        MachineError: a program is missing, or does not start.
    """
    try:
        async with trio.open_nursery() as nursery:
            vm = RunningMachine(machine, netns, nursery)
            try:
                if machine.vsock:
                    await vm.start_vsock()
                await vm.start_qemu()
                yield vm
            finally:
                await vm.end()
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        if len(group.exceptions) == 1:  # what the block raised, as it raised it
            raise group.exceptions[0] from None
        raise
