"""Makes a helper agent do all that it can, so that a tracer beside it sees every module that it imports.

    python3 exercise.py DIRECTORY COMMAND…

Runs in network, mount and PID namespaces of its own, as the builder starts it. COMMAND starts the agent with its
sockets in DIRECTORY. Ends with 0 when the agent did everything and ended by SIGTERM.
"""

from __future__ import annotations

import contextlib
import secrets
import signal
import subprocess
import sys
from pathlib import Path

from taploom.lean import without_unused

without_unused()  # before the imports below: the root has no OpenSSL

import trio

from taploom.address import Address, connect, parse_address
from taploom.contracts.taploom.helper.v1 import (
    ApplyEndpointRequest,
    ApplyNetworkRequest,
    ApplyUplinkRequest,
    AuthorizeLinkRequest,
    AuthorizeStreamsRequest,
    CaptureInterface,
    CaptureRequest,
    DeleteEndpointRequest,
    DeleteNetworkRequest,
    Endpoint,
    GetHealthRequest,
    GetInfoRequest,
    ListEndpointsRequest,
    ListNetworksRequest,
    Network,
    SyncRequest,
    Uplink,
    WatchEventsRequest,
)
from taploom.contracts.taploom.helper.v1.rpc import CaptureServiceClient, HelperServiceClient
from taploom.contracts.taploom.link.v1 import LinkFeature
from taploom.link.dial import dial_link
from taploom.link.handshake import RefusedError
from taploom.rpc import RpcError, open_channel

SECONDS = 300.0
UPLINK = Uplink(
    addresses=["169.254.128.1/18", "fd00:0:0:ffff::1/64"],
    mac_address="02:42:00:00:00:01",
    host_addresses=["192.0.2.1"],
)
APP = Network(
    network_id="app",
    name="app",
    subnets=["172.18.0.0/16", "fd00:18::/64"],
    gateways=["172.18.0.1", "fd00:18::1"],
    gateway_mac="02:42:ac:12:00:01",
    mtu=1500,
    dns_servers=["169.254.64.1"],
    dns_mac="02:42:ac:12:ff:fe",
    uplink_addresses=["169.254.128.2/18", "fd00:0:0:ffff::2/64"],
    uplink_mac="02:42:00:00:00:02",
)
WEB = Endpoint(
    endpoint_id="web",
    network_id="app",
    mac_address="02:42:ac:12:00:02",
    addresses=["172.18.0.2", "fd00:18::2"],
    names=["web", "www"],
)


async def main(directory: Path, command: list[str]) -> None:
    """The whole exercise."""
    control, data = (parse_address(f"unix:{directory}/{name}.sock") for name in ("control", "data"))
    process = subprocess.Popen(command)
    try:
        while True:
            try:
                stream = await connect(control)
                break
            except OSError:
                if process.poll() is not None:
                    raise SystemExit(f"the agent ended with {process.returncode}") from None
                await trio.sleep(0.05)
        async with open_channel(stream) as channel:
            client = HelperServiceClient(channel)
            while not (await client.get_health(GetHealthRequest())).ready:
                await trio.sleep(0.05)
            await _calls(client, CaptureServiceClient(channel), data)
        await _garbage(control, data)
    finally:
        process.send_signal(signal.SIGTERM)
    if await trio.to_thread.run_sync(process.wait):
        raise SystemExit(f"the agent ended with {process.returncode}")


async def _calls(client: HelperServiceClient, captures: CaptureServiceClient, data: Address) -> None:
    await client.get_info(GetInfoRequest())
    async with client.watch_events(WatchEventsRequest()) as events:
        await events.receive()
        await client.sync(SyncRequest(networks=[], endpoints=[], uplink=UPLINK))
        await client.apply_uplink(ApplyUplinkRequest(uplink=UPLINK))
        await client.apply_network(ApplyNetworkRequest(network=APP))
        await client.apply_endpoint(ApplyEndpointRequest(endpoint=WEB))
        secret = secrets.token_bytes(32)
        await client.authorize_link(AuthorizeLinkRequest(endpoint_id="web", secret=secret))
        features = frozenset({LinkFeature.VNET_HDR, LinkFeature.TSO, LinkFeature.USO})
        link, _ = await dial_link(data, endpoint_id="web", secret=secret, features=features)
        await events.receive()
        await client.authorize_streams(AuthorizeStreamsRequest(secret=secrets.token_bytes(32)))
        await client.list_endpoints(ListEndpointsRequest())
        await client.list_networks(ListNetworksRequest())
        for wrong in (Network(network_id="?" * 99), Network(network_id="x", subnets=["nonsense"])):
            with contextlib.suppress(RpcError):
                await client.apply_network(ApplyNetworkRequest(network=wrong))
        async with captures.capture() as capture:
            one = CaptureInterface(endpoint_id="web", name="web")
            await capture.send(CaptureRequest(interfaces=[one], max_duration_ms=100))
            while (received := await capture.receive()) is not None and not received.end:
                pass
            if received is None:
                raise SystemExit("a capture did not end")
        await link.aclose()
        for daemon in (await client.get_health(GetHealthRequest())).daemons:
            subprocess.run(["/usr/bin/busybox", "kill", "-9", str(daemon.pid)], check=True)
        await events.receive()
        while not (await client.get_health(GetHealthRequest())).ready:
            await trio.sleep(0.05)
        with contextlib.suppress(RpcError):  # the daemons may be restarting
            await client.sync(SyncRequest(networks=[APP], endpoints=[WEB], uplink=UPLINK))
        await client.delete_endpoint(DeleteEndpointRequest(endpoint_id="web"))
        await client.delete_network(DeleteNetworkRequest(network_id="app"))


async def _garbage(control: Address, data: Address) -> None:
    """Bytes that are no HTTP/2, no handshake and a wrong secret: the agent's own error messages."""
    for address in (control, data):
        stream = await connect(address)
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(b"\xff" * 64)
            await stream.receive_some()
        await stream.aclose()
    with contextlib.suppress(RefusedError):
        await dial_link(data, endpoint_id="nobody", secret=b"x" * 32, features=())


async def _bounded(directory: Path, command: list[str]) -> None:
    with trio.fail_after(SECONDS):
        await main(directory, command)


if __name__ == "__main__":
    trio.run(_bounded, Path(sys.argv[1]), sys.argv[2:])
