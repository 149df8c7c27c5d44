"""The agent's parts put together: listeners, interfaces, links, names, and a stop in the right order."""

from __future__ import annotations

import logging
import os
import signal
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import trio

from taploom import __version__
from taploom.address import Address, open_listener
from taploom.contracts.taploom.guest.v1 import GuestFeature, LinkDown, LinkUp
from taploom.contracts.taploom.link.v1 import LinkFeature
from taploom.link import LinkServer, open_dataplane, probe_features
from taploom.notify import notify_ready
from taploom.rpc import Server

from .events import EventHub
from .interfaces import Interfaces
from .kernel import Kernel
from .names import Names
from .resolver.hostsfile import HostsFile
from .resolver.resolvconf import ResolvConf
from .service import GuestService

logger = logging.getLogger("taploom.guest.agent")

OPTIONAL_FEATURES = {
    "vnet-hdr": GuestFeature.LINK_VNET_HDR,
    "tso": GuestFeature.LINK_TSO,
    "uso": GuestFeature.LINK_USO,
    "resolver": GuestFeature.RESOLVER,
    "events": GuestFeature.EVENTS,
    "hosts": GuestFeature.HOSTS,
    "direct-dns": GuestFeature.DIRECT_DNS,
}
"""The features by the names that --without knows."""
_LINK_FEATURES = {
    GuestFeature.LINK_VNET_HDR: LinkFeature.VNET_HDR,
    GuestFeature.LINK_TSO: LinkFeature.TSO,
    GuestFeature.LINK_USO: LinkFeature.USO,
}
DRAIN_TIMEOUT = 1.0


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    control: Address
    data: Address
    resolv_conf: Path
    hosts: Path
    state_dir: Path
    without: frozenset[str] = frozenset()


def features(link_features: frozenset[LinkFeature], without: frozenset[str]) -> frozenset[GuestFeature]:
    """What the agent offers: what the kernel can and ``without`` does not hide. Offloads need vnet-hdr."""
    found = {GuestFeature.RESOLVER, GuestFeature.EVENTS, GuestFeature.HOSTS, GuestFeature.DIRECT_DNS}
    found |= {guest for guest, link in _LINK_FEATURES.items() if link in link_features}
    found -= {OPTIONAL_FEATURES[name] for name in without}
    if GuestFeature.LINK_VNET_HDR not in found:
        found -= set(_LINK_FEATURES)
    return frozenset(found)


async def run_agent(options: Options) -> None:
    """Serves until SIGTERM or SIGINT. Interfaces and all that is on them stay; resolv.conf and hosts are given back."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        offered = features(await trio.to_thread.run_sync(probe_features), options.without)
        events = EventHub()
        kernel = Kernel()

        def link_up(endpoint_id: str, agreed: frozenset[LinkFeature]) -> None:
            interfaces.greet(endpoint_id)
            events.publish(LinkUp(endpoint_id=endpoint_id, features=sorted(agreed)))

        try:
            async with open_dataplane() as dataplane:
                links = LinkServer(
                    dataplane,
                    features=frozenset(link for guest, link in _LINK_FEATURES.items() if guest in offered),
                    on_up=link_up,
                    on_down=lambda endpoint_id, reason: events.publish(
                        LinkDown(endpoint_id=endpoint_id, reason=reason)
                    ),
                )

                async def loopback_up() -> None:
                    await interfaces.loopback_up()

                names = Names(
                    loopback_up,
                    ResolvConf(options.resolv_conf, saved_path(options.state_dir, options.resolv_conf)),
                    HostsFile(options.hosts, saved_path(options.state_dir, options.hosts)),
                )
                interfaces = Interfaces(kernel, links, on_repair=events.publish, on_change=names.set_interfaces)
                try:
                    await _serve(
                        options,
                        signals=signals,
                        interfaces=interfaces,
                        names=names,
                        links=links,
                        events=events,
                        offered=offered,
                    )
                finally:
                    with trio.CancelScope(shield=True):
                        await interfaces.close()
        finally:
            kernel.close()


async def _serve(
    options: Options,
    *,
    signals: object,
    interfaces: Interfaces,
    names: Names,
    links: LinkServer,
    events: EventHub,
    offered: frozenset[GuestFeature],
) -> None:
    await interfaces.adopt()
    control = await open_listener(options.control)
    data = await open_listener(options.data)
    service = GuestService(interfaces, names, events, offered, os.urandom(8).hex())
    server = Server([service])
    async with trio.open_nursery() as nursery:
        await nursery.start(names.run)
        nursery.start_soon(interfaces.watch)
        await nursery.start(links.serve, data)
        await nursery.start(server.serve, control)
        logger.info("version %s serves on %s, data links on %s", __version__, options.control, options.data)
        notify_ready()
        await _stop_signal(signals)
        events.close()
        await server.drain(DRAIN_TIMEOUT)
        nursery.cancel_scope.cancel()


async def _stop_signal(signals: object) -> None:
    async for number in signals:  # type: ignore[attr-defined]  # trio gives its receiver no public type
        logger.info("%s: stopping", signal.Signals(number).name)
        return


def saved_path(state_dir: Path, file: Path) -> Path:
    """Where the original of resolv.conf or hosts is kept: one file per original and network namespace.

    Machines that run several agents (the lab) may share the directory.
    """
    path = os.path.abspath(file)  # noqa: PTH100 - resolve() would follow the symbolic link
    namespace = os.stat("/proc/self/ns/net").st_ino  # noqa: PTH116
    return state_dir / f"{file.name}.{sha256(f'{namespace} {path}'.encode()).hexdigest()[:16]}"
