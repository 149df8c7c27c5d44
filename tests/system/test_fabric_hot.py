"""What holds the moment a connect returns: frames pass and names resolve, at the first try, however often."""

from __future__ import annotations

import itertools
import subprocess

import pytest
import trio
from fabric import Fabric, fabric

from taploom.address import connect, parse_address
from taploom.contracts.taploom.bridge.v1 import ConnectGuestRequest, DisconnectGuestRequest
from taploom.contracts.taploom.bridge.v1.rpc import NetworkServiceClient
from taploom.rpc import open_channel

pytestmark = pytest.mark.system

TIMES = 100


async def at_once(lab: Fabric, guest: int, *command: str) -> None:
    """Runs a command in a guest's namespaces, given by its first process, with nothing in between that takes time."""
    argv = ["nsenter", f"--target={guest}", "--net", "--mount", "--", *command]
    done = await trio.run_process(argv, capture_stdout=True, capture_stderr=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout.decode()}{done.stderr.decode()}{lab.logs()}"


async def test_the_first_packet_passes_and_the_first_lookup_finds() -> None:
    with fabric("client", "server") as lab:
        lab.run("network", "create", "hot", "--ipv6")
        lab.run("network", "create", "other")
        lab.run("network", "connect", "hot", "server")
        lab.run("network", "connect", "other", "client")
        four, six = lab.address("server", "hot"), lab.address("server", "hot", 6)
        processes = lab.processes()
        client, server = (processes[f"guest/{name}/holder"]["pid"] for name in ("client", "server"))
        checks = [
            [(client, "ping", "-n", "-c1", "-W1", four), (client, "getent", "hosts", "server")],
            [(client, "getent", "ahostsv4", "server.hot"), (client, "ping", "-n", "-c1", "-W1", six)],
            [(server, "getent", "hosts", "client"), (server, "ping", "-n", "-c1", "-W1", "client")],
        ]
        async with open_channel(await connect(parse_address(lab.json("lab", "status")["bridge"]))) as channel:
            bridge = NetworkServiceClient(channel)
            for _, commands in zip(range(TIMES), itertools.cycle(checks), strict=False):
                await bridge.connect_guest(ConnectGuestRequest(network="hot", guest="client"), timeout=30)
                for guest, *command in commands:
                    await at_once(lab, guest, *command)
                await bridge.disconnect_guest(DisconnectGuestRequest(network="hot", guest="client"), timeout=30)
                links = subprocess.run(
                    ["nsenter", f"--target={client}", "--net", "ip", "-br", "link"], capture_output=True, check=True
                )
                assert b"eth1" not in links.stdout
