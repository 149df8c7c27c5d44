"""Which ports of the integration bridge have their flows, told by vswitchd at the moment in which it has them.

ovn-controller programs a logical port in one bundle, which vswitchd takes as a whole: with the flow that takes in what
the port receives (ovn-architecture(7), table 0) all others are there. It says so in Open vSwitch's database only after
the southbound database has confirmed the port's binding and vswitchd the bundle, which is two turns of its loop later,
some milliseconds each in a large fabric.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from pathlib import Path

import trio

from agent_helper.openflow import Connection, open_connection

logger = logging.getLogger("taploom.helper.port_flows")

# Flow monitors of OpenFlow 1.0 with Nicira's extensions, which every release of Open vSwitch has (nicira-ext.h).
_VERSION = 1
_STATS_REQUEST, _STATS_REPLY = 16, 17
_STATS = struct.Struct("!HHIII")  # type, flags, vendor, subtype, pad
_VENDOR, _NICIRA, _FLOW_MONITOR = 0xFFFF, 0x00002320, 2
_REQUEST = struct.Struct("!IHHHB5x")  # id, flags, out_port, match_len, table
_INITIAL, _ADDED_TOO, _DELETED_TOO = 1, 2, 4
_NO_PORT = 0xFFFF
_UPDATE = struct.Struct("!HH")  # length, event
_FLOW = struct.Struct("!HHHHHHHBxQ")  # length, event, reason, priority, timeouts, match_len, table, cookie
_ADDED, _DELETED = 0, 1
_IN_PORT = struct.Struct("!IH")
_NXM_IN_PORT = 0x00000002
_INPUT_TABLE = 0
_PAUSE = 0.05  # s, before it is asked again


class PortFlows:
    """The ports that have the flow which takes in what they receive.

    Args:
        mgmt: where the bridge takes OpenFlow connections.
    """

    def __init__(self, mgmt: Path) -> None:
        self._mgmt = mgmt
        self._ports: set[int] = set()
        self._waiters: dict[int, trio.Event] = {}

    def has(self, port: int) -> bool:
        """Whether a port, by its OpenFlow number, has its flows."""
        return port in self._ports

    async def wait(self, port: int) -> None:
        """Returns once a port has its flows."""
        while port not in self._ports:
            await self._waiters.setdefault(port, trio.Event()).wait()

    async def run(self) -> None:
        """Listens until cancelled, over vswitchd's ends and starts. Where vswitchd does not tell, no port has any."""
        while True:
            try:
                async with open_connection(self._mgmt, _VERSION) as connection:
                    await self._listen(connection)
            except (OSError, trio.BrokenResourceError):
                pass  # vswitchd is being started again
            except ValueError as exc:
                logger.info("the integration bridge's flows are not told: %s", exc)
            finally:
                self._ports.clear()
            await trio.sleep(_PAUSE)

    async def _listen(self, connection: Connection) -> None:
        await connection.send(connection.message(_STATS_REQUEST, 1, request()))
        while True:
            kind, _, body = await connection.next()
            if kind == _STATS_REPLY:
                for port, there in updates(body):
                    self._change(port, there=there)

    def _change(self, port: int, *, there: bool) -> None:
        if not there:
            self._ports.discard(port)
            return
        self._ports.add(port)
        waiter = self._waiters.pop(port, None)
        if waiter is not None:
            waiter.set()


def request() -> bytes:
    """The body that asks for the flows of table 0, and then for those that come and go."""
    monitor = _REQUEST.pack(1, _INITIAL | _ADDED_TOO | _DELETED_TOO, _NO_PORT, 0, _INPUT_TABLE)
    return _STATS.pack(_VENDOR, 0, _NICIRA, _FLOW_MONITOR, 0) + monitor


def updates(body: bytes) -> Iterator[tuple[int, bool]]:
    """From a reply's body: the ports whose flow has come (True) or gone (False), in this order.

    Only flows that take in all that a port receives: one for the frames with some tag of a trunk says nothing of it.

    Raises:
        ValueError: it is not such a reply.
    """
    if len(body) < _STATS.size:
        raise ValueError("ovs-vswitchd sent a flow monitor's reply that is too short")
    kind, _, vendor, subtype, _ = _STATS.unpack_from(body)
    if (kind, vendor, subtype) != (_VENDOR, _NICIRA, _FLOW_MONITOR):
        return
    at = _STATS.size
    while at < len(body):
        try:
            length, event = _UPDATE.unpack_from(body, at)
            if not _UPDATE.size <= length <= len(body) - at:
                raise ValueError("an update's length is wrong")
            port = _port(body[at : at + length]) if event in (_ADDED, _DELETED) else None
        except (struct.error, ValueError) as exc:
            raise ValueError(f"ovs-vswitchd sent a flow monitor's reply that cannot be read: {exc}") from exc
        if port is not None:
            yield port, event == _ADDED
        at += length


def _port(flow: bytes) -> int | None:
    _, _, _, _, _, _, match_len, table, _ = _FLOW.unpack_from(flow)
    if table != _INPUT_TABLE or match_len != _IN_PORT.size:
        return None
    field, port = _IN_PORT.unpack_from(flow, _FLOW.size)
    return int(port) if field == _NXM_IN_PORT else None
