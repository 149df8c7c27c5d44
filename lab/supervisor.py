"""The lab's supervisor: it keeps the agents and the bridge running, as init, launchd or systemd would.

It converges to lab.json, which it reads again on SIGHUP; it ends on SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import trio

from lab import internet
from lab.cleanup import NETNS, remove_netns
from lab.state import Lab, enter_guest, replace_json
from taploom.address import connect, parse_address
from taploom.contracts.taploom.bridge.v1 import ListGuestsRequest, RegisterGuestRequest, RemoveGuestRequest
from taploom.contracts.taploom.bridge.v1.rpc import GuestServiceClient
from taploom.log import setup_logging
from taploom.rpc import RpcError, StatusCode, open_channel
from taploom.supervise import SupervisedProcess

logger = logging.getLogger("taploom.lab")

# What a guest's namespaces are held by, in place of a container's first process. The resolver's configuration, the
# host name and /sys are the guest's own.
_HOLDER = """
set -e
mount --bind "$1/resolv.conf" /etc/resolv.conf
mount --bind "$1/hosts" /etc/hosts
mount -t sysfs -o ro sysfs /sys
echo "$2" > /proc/sys/kernel/hostname
echo $$ > "$1/.holder.new"
mv "$1/.holder.new" "$1/holder"
exec sleep infinity
"""


class Supervisor:
    """The processes of one lab."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._processes: dict[str, SupervisedProcess] = {}
        self._guests: dict[str, trio.CancelScope] = {}
        self._wanted: list[str] = []
        self._changed = trio.Event()

    async def run(self) -> None:
        """Runs the lab until cancelled."""
        async with trio.open_nursery() as nursery:
            await self._start_helper(nursery)
            nursery.start_soon(self._process("runtime", self._runtime()).run)
            nursery.start_soon(self._process("bridge", self._bridge()).run)
            with trio.open_signal_receiver(signal.SIGHUP) as hangups:
                self._converge(nursery)
                nursery.start_soon(self._register)
                async for _ in hangups:
                    self._converge(nursery)

    async def _start_helper(self, nursery: trio.Nursery) -> None:
        add_netns(self._lab.helper_netns)
        add_netns(self._lab.internet_netns)
        internet.connect(self._lab.helper_netns, self._lab.internet_netns)
        nursery.start_soon(self._process("helper", self._helper()).run)

    def _helper(self) -> SupervisedProcess:
        directory = self._lab.helper_directory
        return SupervisedProcess(
            "helper",
            [
                *_python("agent_helper"),
                *("--control", f"unix:{directory}/control.sock", "--data", f"unix:{directory}/data.sock"),
                *("--state-dir", f"{directory}/state"),
            ],
            netns=self._lab.helper_netns,
            env=self._lab.environment(),
            log=self._lab.logs / "helper.log",
            on_change=self._write_status,
        )

    def _bridge(self) -> SupervisedProcess:
        return SupervisedProcess(
            "bridge",
            [
                *_python("host_bridge"),
                *("--socket", self._lab.bridge_address, "--state-dir", str(self._lab.path / "bridge")),
                *("--helper", self._lab.helper_address),
                *("--docker-socket", self._lab.docker_socket),
                *("--runtime", self._lab.runtime_address),
            ],
            env=self._lab.environment(),
            log=self._lab.logs / "bridge.log",
            on_change=self._write_status,
        )

    def _runtime(self) -> SupervisedProcess:
        return SupervisedProcess(
            "runtime",
            [*_python("lab.runtime"), self._lab.name],
            env=self._lab.environment(),
            log=self._lab.logs / "runtime.log",
            ready=lambda: _answers(self._lab.runtime_address),
            on_change=self._write_status,
        )

    def _process(self, name: str, process: SupervisedProcess) -> SupervisedProcess:
        self._processes[name] = process
        return process

    def _converge(self, nursery: trio.Nursery) -> None:
        self._wanted = self._lab.guests()
        for name in self._wanted:
            if name not in self._guests:
                self._guests[name] = trio.CancelScope()
                nursery.start_soon(self._guest, name, self._guests[name], nursery)
        for name in set(self._guests) - set(self._wanted):
            self._guests[name].cancel()
        self._changed.set()
        self._write_status()

    async def _guest(self, name: str, scope: trio.CancelScope, guests: trio.Nursery) -> None:
        directory = self._lab.guest_directory(name)
        directory.mkdir(mode=0o700, exist_ok=True)
        try:
            with scope:
                await self._run_guest(name)
        finally:
            self._guests.pop(name, None)
            self._remove_guest(name)
            shutil.rmtree(directory, ignore_errors=True)
            self._write_status()
        self._converge(guests)  # it may have been asked for again meanwhile

    def _remove_guest(self, name: str) -> None:
        for process in (f"guest/{name}", f"guest/{name}/holder"):
            self._processes.pop(process, None)
        remove_netns(self._lab.guest_netns(name))

    async def _run_guest(self, name: str) -> None:
        lab, directory, netns = self._lab, self._lab.guest_directory(name), self._lab.guest_netns(name)
        (directory / "resolv.conf").touch()
        (directory / "hosts").write_text("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n")
        add_netns(netns)
        holder = self._process(
            f"guest/{name}/holder",
            SupervisedProcess(
                f"guest/{name}/holder",
                # Slave: a namespace that is removed outside is not kept alive by a copy of its mount in here.
                [
                    *("unshare", "--mount", "--uts", "--propagation", "slave"),
                    *("sh", "-c", _HOLDER, "sh", str(directory), name),
                ],
                netns=netns,
                env=lab.environment(),
                log=lab.logs / f"guest-{name}.log",
                prepare=lambda: (directory / "holder").unlink(missing_ok=True),
                ready=lambda: _appears(directory / "holder"),
                on_change=lambda process: self._holder_changed(name, process),
            ),
        )
        agent = self._process(
            f"guest/{name}",
            SupervisedProcess(
                f"guest/{name}",
                [
                    *enter_guest(lab, name),
                    *_python("agent_guest"),
                    *("--control", f"unix:{directory}/control.sock", "--data", f"unix:{directory}/data.sock"),
                ],
                env=lab.environment(),
                log=lab.logs / f"guest-{name}.log",
                backoff_max=0.5,
                on_change=self._write_status,
            ),
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(holder.run)
            nursery.start_soon(agent.run)

    def _holder_changed(self, name: str, process: SupervisedProcess) -> None:
        # A guest whose first process ended has rebooted: its agent starts again in the new namespaces.
        agent = self._processes.get(f"guest/{name}")
        if process.state == "down" and agent is not None:
            agent.kill(signal.SIGKILL)
        self._write_status()

    async def _register(self) -> None:
        """Keeps the bridge's guests in step with the lab's."""
        while True:
            self._changed = trio.Event()
            done = False
            while not done:
                try:
                    await self._register_all()
                    done = True
                except (OSError, RpcError) as error:
                    logger.debug("bridge: %s", error)
                    await trio.sleep(0.05)  # a redial's back-off: the bridge is starting
            await self._changed.wait()

    async def _register_all(self) -> None:
        # A lab's guests are told from others in the bridge's state by their address.
        addresses = {name: self._lab.guest_address(name) for name in self._wanted}
        stream = await connect(parse_address(self._lab.bridge_address))
        async with open_channel(stream) as channel:
            client = GuestServiceClient(channel)
            listed = (await client.list_guests(ListGuestsRequest(), timeout=10)).guests
            ours = f":{self._lab.path}/guests/"
            known = {guest.name for guest in listed if ours in guest.address}
            for name in sorted(known - set(addresses)):
                with _ignoring(StatusCode.NOT_FOUND):
                    await client.remove_guest(RemoveGuestRequest(guest=name), timeout=10)
            for name in sorted(set(addresses) - known):
                with _ignoring(StatusCode.ALREADY_EXISTS):
                    await client.register_guest(RegisterGuestRequest(name=name, address=addresses[name]), timeout=10)

    def _write_status(self, _process: SupervisedProcess | None = None) -> None:
        rows: list[dict[str, Any]] = [
            {
                "name": process.name,
                "pid": process.pid,
                "state": process.state,
                "restarts": process.restarts,
                "last_exit": process.last_exit,
                "started_at": process.started_at.isoformat() if process.started_at else None,
            }
            for process in self._processes.values()
        ]
        with contextlib.suppress(FileNotFoundError):  # the lab is being taken down
            replace_json(self._lab.path / "status.json", {"processes": rows})


def _python(module: str) -> list[str]:
    return [sys.executable, "-m", module]


def add_netns(name: str) -> None:
    """Makes a named network namespace where there is none of that name."""
    if not (NETNS / name).exists():
        subprocess.run(["ip", "netns", "add", name], check=True)


async def _appears(path: Path) -> None:
    while not path.exists():
        await trio.sleep(0.002)


async def _answers(address: str) -> None:
    """Returns once somebody takes connections there."""
    while True:
        try:
            await trio.aclose_forcefully(await connect(parse_address(address)))
            return
        except OSError:
            await trio.sleep(0.005)


@contextlib.contextmanager
def _ignoring(code: StatusCode) -> Any:
    try:
        yield
    except RpcError as error:
        if error.code != code:
            raise


def _supervisor(lab: Lab) -> Supervisor:
    if lab.on_vms():
        from lab.vm.supervisor import VmSupervisor

        return VmSupervisor(lab)
    return Supervisor(lab)


async def _run(lab: Lab) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as stops:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_supervisor(lab).run)
            async for _ in stops:
                nursery.cancel_scope.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs the processes of a lab; 'taploom lab up' starts it.")
    parser.add_argument("lab")
    lab = Lab(parser.parse_args().lab)
    setup_logging("lab", os.environ.get("TAPLOOM_LOG_LEVEL", "info"))
    with (lab.path / "supervisor.lock").open("a+b") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"lab {lab.name} has a supervisor already")
        lock.truncate(0)
        lock.write(str(os.getpid()).encode())
        lock.flush()
        trio.run(_run, lab)


if __name__ == "__main__":
    main()
