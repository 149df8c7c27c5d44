"""The agent's life: it answers as soon as it can, then loads the rest of itself, and stops in the right order."""

from __future__ import annotations

import gc
import logging
import os
import signal
from typing import TYPE_CHECKING

import trio

from taploom import __version__
from taploom.address import open_listener
from taploom.link.tap import probe_features
from taploom.notify import notify_ready
from taploom.rpc import Server

from . import vlan
from .front import Front
from .options import Options, features

if TYPE_CHECKING:
    from types import ModuleType

    from taploom.contracts.taploom.guest.v1 import GuestFeature

logger = logging.getLogger("taploom.guest.agent")

DRAIN_TIMEOUT = 1.0


async def run_agent(options: Options) -> None:
    """Serves until SIGTERM or SIGINT. Interfaces and all that is on them stay; resolv.conf and hosts are given back.

    What takes a third of the agent's imports is imported when the host can already connect and ask what the agent is:
    in a VM without hardware acceleration that is a second earlier. Calls that need it wait for it.
    """
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        offered = await trio.to_thread.run_sync(_offered, options)
        front = Front(offered, os.urandom(8).hex())
        control = await open_listener(options.control)
        data = await open_listener(options.data)
        server = Server([front])
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve, control)
            notify_ready()
            parts = await trio.to_thread.run_sync(_import_parts)
            async with parts.open_parts(options, data, offered) as (service, events):
                front.open(service)
                logger.info("version %s serves on %s, data links on %s", __version__, options.control, options.data)
                await _stop_signal(signals)
                events.close()
                await server.drain(DRAIN_TIMEOUT)
            nursery.cancel_scope.cancel()


def _offered(options: Options) -> frozenset[GuestFeature]:
    return features(probe_features(), options.without, vlan=vlan.is_possible())


def _import_parts() -> ModuleType:
    from . import parts

    # What has been imported stays: a full collection that walked it would stop frames for some 10 ms each time.
    gc.freeze()
    gc.enable()
    return parts


async def _stop_signal(signals: object) -> None:
    async for number in signals:  # type: ignore[attr-defined]  # trio gives its receiver no public type
        logger.info("%s: stopping", signal.Signals(number).name)
        return
