"""Makes a guest agent do all that it can, so that a tracer beside it sees every module that it imports.

Runs as images/common/exercise.py starts it; see images/common/exercised.py.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import subprocess

from exercised import FEATURES, exercise  # first: it knows what the root has not

import dns.message
import dns.query
import dns.rcode
import dns.rdatatype
import trio

from taploom.address import Address
from taploom.contracts.taploom.guest.v1 import (
    ApplyInterfaceRequest,
    ApplyResolverRequest,
    DeleteInterfaceRequest,
    GetInfoRequest,
    HostEntry,
    Interface,
    ListInterfacesRequest,
    NameLink,
    Resolver,
    Route,
    SyncRequest,
    WatchEventsRequest,
)
from taploom.contracts.taploom.guest.v1.rpc import GuestServiceClient
from taploom.link.dial import dial_link
from taploom.rpc import Channel, RpcError

SECONDS = 120.0
WEB = Interface(
    endpoint_id="exercise-web",
    name="eth0",
    mac_address="02:42:ac:12:00:02",
    addresses=["172.18.0.2/16", "fd00:18::2/64"],
    gateways=["172.18.0.1", "fd00:18::1"],
    routes=[Route(destination="10.1.0.0/16", gateway="172.18.0.9")],
    mtu=1500,
    network_name="app",
    dns_servers=["172.18.0.1"],
    name_links=[NameLink(alias="db", target="postgres")],
)
RESOLVER = Resolver(
    enabled=True,
    upstreams=["127.0.0.53"],
    search=["example.test"],
    options=["ndots:1"],
    hostname="web",
    manage_hosts=True,
    hosts=[HostEntry(address="10.0.0.1", names=["outside"])],
)


async def calls(channel: Channel, data: Address) -> None:
    """The whole exercise, with a resolver that the agent's asks."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as upstream:
        upstream.bind(("127.0.0.53", 53))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, _upstream, upstream)
            await _calls(GuestServiceClient(channel), data)
            upstream.sendto(b"", ("127.0.0.53", 53))  # ends the thread


async def _calls(client: GuestServiceClient, data: Address) -> None:
    await client.get_info(GetInfoRequest(), timeout=5.0)
    async with client.watch_events(WatchEventsRequest()) as events:
        await events.receive()
        await client.sync(SyncRequest(interfaces=[], resolver=Resolver()))
        secret = secrets.token_bytes(32)
        await client.apply_interface(ApplyInterfaceRequest(interface=WEB, link_secret=secret))
        link, _ = await dial_link(data, endpoint_id=WEB.endpoint_id, secret=secret, features=FEATURES)
        await events.receive()
        await client.apply_resolver(ApplyResolverRequest(resolver=RESOLVER))
        await trio.to_thread.run_sync(_queries)
        with contextlib.suppress(RpcError):
            await client.apply_interface(ApplyInterfaceRequest(interface=Interface(endpoint_id="x", name="?" * 99)))
        with contextlib.suppress(RpcError):
            await client.apply_resolver(ApplyResolverRequest(resolver=Resolver(enabled=True, upstreams=["nonsense"])))
        await client.list_interfaces(ListInterfacesRequest())
        await link.aclose()
        await events.receive()
        subprocess.run(["/usr/bin/busybox", "ip", "link", "set", "eth0", "down"], check=True)
        await events.receive()  # repaired
        await client.apply_resolver(
            ApplyResolverRequest(resolver=Resolver(enabled=True, direct=True, upstreams=["127.0.0.53"]))
        )
        await client.sync(SyncRequest(interfaces=[WEB], resolver=RESOLVER))
        await client.delete_interface(DeleteInterfaceRequest(endpoint_id=WEB.endpoint_id))


def _queries() -> None:
    for name, kind in (
        ("db", "A"),
        ("outside.example.test.", "AAAA"),
        ("2.0.18.172.in-addr.arpa.", "PTR"),
        ("räksmörgås.test", "TXT"),
    ):
        for ask in (dns.query.udp, dns.query.tcp):
            with contextlib.suppress(dns.exception.Timeout, OSError, EOFError):
                ask(dns.message.make_query(name, kind), "127.0.0.11", timeout=3)


def _upstream(sock: socket.socket) -> None:
    """Answers every question with "no such name" until an empty datagram comes."""
    while True:
        data, source = sock.recvfrom(4096)
        if not data:
            return
        response = dns.message.make_response(dns.message.from_wire(data))
        response.set_rcode(dns.rcode.NXDOMAIN)
        sock.sendto(response.to_wire(), source)


if __name__ == "__main__":
    exercise(calls, seconds=SECONDS)
