"""What endpoints carry per second, from two statuses; and figures for people."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from taploom.contracts.taploom.bridge.v1 import Link, Status


@dataclass(frozen=True, slots=True)
class Rates:
    """What one endpoint carried, seen from its guest, on average between two statuses.

    Attributes:
        sent_bits, received_bits: bits of frames per second, Ethernet headers included.
        sent_frames, received_frames: frames per second. One frame may be many packets (segmentation offload).
        drops: frames dropped per second, in both directions.
    """

    sent_bits: float = 0.0
    received_bits: float = 0.0
    sent_frames: float = 0.0
    received_frames: float = 0.0
    drops: float = 0.0

    @property
    def bits(self) -> float:
        """Both directions."""
        return self.sent_bits + self.received_bits

    @property
    def frames(self) -> float:
        """Both directions."""
        return self.sent_frames + self.received_frames


def rates_between(before: Status, now: Status) -> dict[str, Rates]:
    """The rates of the endpoints that both statuses have, by their ids; none when no time has passed."""
    seconds = elapsed(before.time, now.time)
    if seconds <= 0:
        return {}
    earlier: Mapping[str, Link] = {link.endpoint.id: link for link in before.links if link.endpoint}
    found = {}
    for link in now.links:
        if link.endpoint is None or (last := earlier.get(link.endpoint.id)) is None:
            continue

        def rate(new: int, old: int) -> float:
            # Counters start again with the agent.
            return max(0, new - old) / seconds

        found[link.endpoint.id] = Rates(
            sent_bits=rate(link.tx_bytes, last.tx_bytes) * 8,
            received_bits=rate(link.rx_bytes, last.rx_bytes) * 8,
            sent_frames=rate(link.tx_frames, last.tx_frames),
            received_frames=rate(link.rx_frames, last.rx_frames),
            drops=rate(link.drops, last.drops),
        )
    return found


def elapsed(start: datetime.datetime | None, end: datetime.datetime | None) -> float:
    """Seconds from one moment to another; 0 where one is not known."""
    return (end - start).total_seconds() if start is not None and end is not None else 0.0


def octets(count: float) -> str:
    """A number of bytes, such as 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def bits(rate: float) -> str:
    """A rate in bits per second, such as 1.2 Mbit/s."""
    for unit in ("bit/s", "kbit/s", "Mbit/s"):
        if rate < 1000:
            return f"{rate:.0f} {unit}" if unit == "bit/s" else f"{rate:.1f} {unit}"
        rate /= 1000
    return f"{rate:.2f} Gbit/s"
