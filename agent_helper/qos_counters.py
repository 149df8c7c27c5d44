"""What limits have done: the counters of their meters.

A limit is a row of QoS; northd makes a logical flow of it, ovn-controller a meter of that. Which is told by
ovn-controller's `meter-table-list`; what it let in and dropped by OpenFlow 1.3, 7.3.5.12 ("Meter Statistics").
"""

from __future__ import annotations

import re
import struct
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import trio

from agent_helper import openflow
from agent_helper.errors import UnavailableError
from agent_helper.logical_flows import flows_of

_TIMEOUT = 5.0
# As northd of 23.03 calls the stages, and of releases that mark and meter in one.
_STAGES = ("ls_in_qos_meter", "ls_out_qos_meter", "ls_in_qos", "ls_out_qos")
_METER_LINE = re.compile(r"uuid ([0-9a-f-]{36}) .*: (\d+)\s*")
_ALL = struct.pack("!I4x", 0xFFFFFFFF)
_METER = struct.Struct("!IH6xIQQII")
_BAND = struct.Struct("!QQ")


@dataclass(frozen=True)
class Limited:
    """What one limit has let through and dropped."""

    passed_frames: int
    passed_bytes: int
    dropped_frames: int
    dropped_bytes: int


async def read_counters(
    db_socket: Path,
    mgmt: Path,
    list_meters: Callable[[], Awaitable[str]],
    limits: Mapping[tuple[str, bool], str],
    known: dict[str, list[str]],
) -> dict[tuple[str, bool], Limited]:
    """What each limit has done; limits that are not programmed yet are left out.

    Args:
        db_socket: ovsdb-server's.
        mgmt: where the integration bridge takes OpenFlow connections.
        list_meters: asks ovn-controller for `meter-table-list`.
        limits: the uuids of rows of QoS.
        known: the logical flows of limits as `flows_of` gives them; it is brought up to date where it is not.

    Raises:
        UnavailableError: a daemon does not answer.
    """
    try:
        with trio.fail_after(_TIMEOUT):
            meters = meters_of(await list_meters())
            # They are sought among all of the fabric's, and seldom change: only when one that is wanted has no meter.
            if not all(any(flow in meters for flow in known.get(uuid[:8], ())) for uuid in limits.values()):
                flows = await flows_of(db_socket, _STAGES)
                known.clear()
                known.update(flows)
            (answer,) = await openflow.multipart(mgmt, openflow.METER, [_ALL])
            counted = parse_meters(answer)
    except (OSError, trio.TooSlowError, trio.BrokenResourceError, ValueError, struct.error) as exc:
        raise UnavailableError(f"the limits' counters cannot be read now ({exc}); try again") from exc
    found = {}
    for key, uuid in limits.items():
        for flow in known.get(uuid[:8], ()):
            one = counted.get(meters.get(flow, 0))
            if one is not None:
                found[key] = one
    return found


def meters_of(listed: str) -> dict[str, int]:
    """The meters' numbers in ovn-controller's list, by the logical flows' uuids."""
    return {match[1]: int(match[2]) for match in _METER_LINE.finditer(listed)}


def parse_meters(answer: bytes) -> dict[int, Limited]:
    """The counters in an answer to a request of meter statistics, by the meters' numbers.

    Raises:
        ValueError, struct.error: it is malformed.
    """
    found = {}
    offset = 0
    while offset < len(answer):
        number, length, _, frames, octets, _, _ = _METER.unpack_from(answer, offset)
        if length < _METER.size:
            raise ValueError("ovs-vswitchd's meter statistics are malformed")
        bands = [_BAND.unpack_from(answer, place) for place in range(offset + _METER.size, offset + length, _BAND.size)]
        dropped_frames, dropped_bytes = sum(band[0] for band in bands), sum(band[1] for band in bands)
        # What came in includes what was dropped.
        passed = max(0, frames - dropped_frames), max(0, octets - dropped_bytes)
        found[number] = Limited(*passed, dropped_frames, dropped_bytes)
        offset += length
    return found
