"""taploom: guest to guest through the whole lab, and `taploom network connect`.

The guests are the lab's: namespaces, each with its own agent; frames pass the guest's agent, the host bridge, the
helper's agent and Open vSwitch, and back out the same way.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import trio

from bench.paths import How, Link, Path, Process, Published
from bench.paths import docker as docker_engine
from bench.processes import program, with_descendants
from bench.run import BenchError, Netns, Run
from taploom import __version__
from taploom.address import connect, parse_address
from taploom.contracts.taploom.bridge.v1 import (
    ConnectGuestRequest,
    DisconnectGuestRequest,
    GetNetworkRequest,
)
from taploom.contracts.taploom.bridge.v1.rpc import NetworkServiceClient
from taploom.rpc import RpcError, open_channel

PROGRAM = str(FilePath(sys.executable).with_name("taploom"))
_LABS = FilePath("/run/taploom")
_PREFIX = "bench"


@dataclass
class Lab:
    """A lab, by its commands; `programs` is where its helper finds Open vSwitch and OVN before it looks elsewhere."""

    run: Run
    name: str
    programs: FilePath | None = None

    def command(self, *argv: str) -> str:
        found = {} if self.programs is None else {"PATH": f"{self.programs}:{os.environ['PATH']}"}
        return self.run.check(PROGRAM, "--lab", self.name, *argv, env=found)

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(self.command("lab", "status", "--json"))
        return status


@dataclass
class HotGuest:
    lab: Lab
    bridge: str
    client: Netns
    server: Netns
    address: str
    network: str
    guest: str

    def connect(self, how: How) -> tuple[int, int]:
        if how == "CLI":
            start = time.monotonic_ns()
            self.lab.command("network", "connect", self.network, self.guest)
            return start, time.monotonic_ns()
        return trio.run(self._connect)

    async def _connect(self) -> tuple[int, int]:
        async with open_channel(await connect(parse_address(self.bridge))) as channel:
            client = NetworkServiceClient(channel)
            # The connection is open, as a runtime's is. (GetStatus would have the bridge ask all agents.)
            await client.get_network(GetNetworkRequest(network=self.network), timeout=5)
            request = ConnectGuestRequest(network=self.network, guest=self.guest)
            start = time.monotonic_ns()
            try:
                await client.connect_guest(request, timeout=30)
            except RpcError as error:
                raise BenchError(f"ConnectGuest: {error}") from error
            return start, time.monotonic_ns()

    def disconnect(self) -> None:
        trio.run(self._disconnect)

    async def _disconnect(self) -> None:
        async with open_channel(await connect(parse_address(self.bridge))) as channel:
            client = NetworkServiceClient(channel)
            try:
                await client.disconnect_guest(
                    DisconnectGuestRequest(network=self.network, guest=self.guest), timeout=30
                )
            except RpcError as error:
                raise BenchError(f"DisconnectGuest: {error}") from error


def build(run: Run, mtus: list[int]) -> Path:
    """Brings up a lab with two guests on a network per MTU, and a network to connect to.

    Raises:
        BenchError: a `taploom` command failed.
    """
    _sweep(run)
    lab = Lab(run, f"{_PREFIX}{os.getpid()}")
    # The lab is not our child: a guard takes it down should the benchmark be killed.
    run.guard(PROGRAM, "--lab", lab.name, "lab", "down")
    run.stack.callback(lab.command, "lab", "down")
    lab.command("lab", "up", "--guest", "client", "--guest", "server")
    addresses = {}
    for name, mtu in [*((f"mtu{mtu}", mtu) for mtu in mtus), ("hot", 1500)]:
        lab.command("network", "create", name, "--mtu", str(mtu))
        for guest in ("client", "server") if name != "hot" else ("server",):
            lab.command("network", "connect", name, guest)
        network = json.loads(lab.command("network", "inspect", name, "--json"))
        addresses[name] = address_of(network, "server")
    published = _publish(run, lab, f"mtu{mtus[0]}")
    status = lab.status()
    client, server = (
        Netns(f"/run/netns/{guest['netns']}")
        for name in ("client", "server")
        for guest in status["guests"]
        if guest["name"] == name
    )
    return Path(
        "taploom",
        [Link("taploom", mtu, client, server, addresses[f"mtu{mtu}"]) for mtu in mtus],
        {"taploom": __version__},
        HotGuest(lab, status["bridge"], client, server, addresses["hot"], "hot", "client"),
        published,
        lambda: _processes(lab),
    )


def _publish(run: Run, lab: Lab, network: str) -> Published:
    """Runs a container as with Docker, over the lab's socket of Docker's API."""
    directory = run.directory / "lab"
    directory.mkdir()

    def cli(*argv: str) -> str:
        host = f"unix://{_LABS / lab.name / 'docker.sock'}"
        environment = {"DOCKER_CONFIG": str(directory), "DOCKER_CONTEXT": ""}
        return run.check(docker_engine.CLIENT, "--host", host, *argv, env=environment).strip()

    image = f"{run.name}:latest"
    cli("import", docker_engine.image_archive(run, directory), image)
    ports = docker_engine.publish(cli, network, image)
    pid = cli("inspect", "--format", "{{.State.Pid}}", "published")
    # The host's side is this process's own namespace.
    return Published(Netns("/proc/self/ns/net"), Netns(f"/proc/{pid}/ns/net"), ports)


def address_of(network: dict[str, Any], guest: str) -> str:
    """The guest's IPv4 address on a network as `taploom network inspect --json` prints it."""
    for endpoint in network["endpoints"]:
        if guest in (endpoint.get("guestName"), endpoint.get("guest_name")):
            return str(endpoint["addresses"][0]).partition("/")[0]
    raise BenchError(f"{guest} is not on {network['name']}: {network}")


def _processes(lab: Lab) -> list[Process]:
    """The lab's processes with the names that `taploom lab status` gives them, or their programs' names."""
    status = lab.status()
    names = {row["pid"]: row["name"] for row in status["processes"] if row["pid"]}
    names[status["supervisor_pid"]] = "lab supervisor"
    found = [
        Process(names.get(pid, program(pid)), pid)
        for pid in with_descendants(names)
        if not names.get(pid, "").endswith("/holder")  # stands for the container's own first process
    ]
    return sorted(
        (process for process in found if process.label not in ("", "sleep")), key=lambda process: process.label
    )


def _sweep(run: Run) -> None:
    """Takes down the labs of benchmarks that were killed together with their guards."""
    for path in _LABS.glob(f"{_PREFIX}[0-9]*"):
        pid = path.name.removeprefix(_PREFIX)
        if pid.isdigit() and not FilePath(f"/proc/{pid}").exists():
            Lab(run, path.name).command("lab", "down")
