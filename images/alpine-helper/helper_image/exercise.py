"""Makes a helper agent do all that it can, so that a tracer beside it sees every module that it imports.

Runs as images/common/exercise.py starts it; see images/common/exercised.py.
"""

from __future__ import annotations

import contextlib
import secrets
import subprocess

from exercised import FEATURES, exercise  # first: it knows what the root has not

import trio

from taploom.address import Address
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
from taploom.link.dial import dial_link
from taploom.rpc import Channel, RpcError

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


async def calls(channel: Channel, data: Address) -> None:
    """The whole exercise."""
    client, captures = HelperServiceClient(channel), CaptureServiceClient(channel)
    while not (await client.get_health(GetHealthRequest())).ready:
        await trio.sleep(0.05)
    await client.get_info(GetInfoRequest())
    async with client.watch_events(WatchEventsRequest()) as events:
        await events.receive()
        await client.sync(SyncRequest(networks=[], endpoints=[], uplink=UPLINK))
        await client.apply_uplink(ApplyUplinkRequest(uplink=UPLINK))
        await client.apply_network(ApplyNetworkRequest(network=APP))
        await client.apply_endpoint(ApplyEndpointRequest(endpoint=WEB))
        secret = secrets.token_bytes(32)
        await client.authorize_link(AuthorizeLinkRequest(endpoint_id="web", secret=secret))
        link, _ = await dial_link(data, endpoint_id="web", secret=secret, features=FEATURES)
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


if __name__ == "__main__":
    exercise(calls, seconds=SECONDS)
