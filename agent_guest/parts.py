"""The agent's parts put together: interfaces, links and names."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import trio

from taploom.contracts.taploom.guest.v1 import GuestFeature, LinkDown, LinkUp
from taploom.contracts.taploom.link.v1 import LinkFeature
from taploom.link import LinkServer, open_dataplane

from .events import EventHub
from .interfaces import Interfaces
from .kernel import Kernel
from .names import Names
from .options import LINK_FEATURES, Options
from .resolver.hostsfile import HostsFile
from .resolver.resolvconf import ResolvConf
from .service import GuestService


@contextlib.asynccontextmanager
async def open_parts(
    options: Options, data: trio.abc.Listener[Any] | Sequence[trio.abc.Listener[Any]], offered: frozenset[GuestFeature]
) -> AsyncIterator[tuple[GuestService, EventHub]]:
    """Runs them while the block does. Interfaces and all that is on them stay; resolv.conf and hosts are given back.

    Args:
        data: where data links come in.
        offered: the agent's features.
    """
    events = EventHub()
    kernel = Kernel()

    def link_up(endpoint_id: str, agreed: frozenset[LinkFeature]) -> None:
        interfaces.greet(endpoint_id)
        events.publish(LinkUp(endpoint_id=endpoint_id, features=sorted(agreed)))

    try:
        async with open_dataplane() as dataplane:
            links = LinkServer(
                dataplane,
                features=frozenset(link for guest, link in LINK_FEATURES.items() if guest in offered),
                on_up=link_up,
                on_down=lambda endpoint_id, reason: events.publish(LinkDown(endpoint_id=endpoint_id, reason=reason)),
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
                await interfaces.adopt()
                async with trio.open_nursery() as nursery:
                    await nursery.start(names.run)
                    nursery.start_soon(interfaces.watch)
                    await nursery.start(links.serve, data)
                    yield GuestService(interfaces, names, events, offered), events
                    nursery.cancel_scope.cancel()
            finally:
                with trio.CancelScope(shield=True):
                    await interfaces.close()
    finally:
        kernel.close()


def saved_path(state_dir: Path, file: Path) -> Path:
    """Where the original of resolv.conf or hosts is kept: one file per original and network namespace.

    Machines that run several agents (the lab) may share the directory.
    """
    path = os.path.abspath(file)  # noqa: PTH100 - resolve() would follow the symbolic link
    namespace = os.stat("/proc/self/ns/net").st_ino  # noqa: PTH116
    return state_dir / f"{file.name}.{sha256(f'{namespace} {path}'.encode()).hexdigest()[:16]}"
