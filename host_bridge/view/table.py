"""What every endpoint carries, as a table that is sorted by what matters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from host_bridge.names import clean_text
from host_bridge.view.rates import Rates, bits, octets, rates_between
from host_bridge.vlan import is_carried

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

    from taploom.contracts.taploom.bridge.v1 import Status

_NOTHING = Rates()


@dataclass(frozen=True, slots=True)
class Row:
    """One endpoint: what it carries now, and what it has carried since its guest's agent started.

    Attributes:
        sent_bytes, received_bytes: of frames; `sent` is from the guest.
        drops: frames, in both directions.
    """

    guest: str
    network: str
    interface: str
    up: bool
    rates: Rates
    sent_bytes: int
    received_bytes: int
    sent_frames: int
    received_frames: int
    drops: int
    problem: str
    carried: bool
    """By another endpoint's link, which counts its frames too."""


_BY: dict[str, Callable[[Row], float]] = {
    "rate": lambda row: row.rates.bits,
    "sent": lambda row: row.rates.sent_bits,
    "received": lambda row: row.rates.received_bits,
    "frames": lambda row: row.rates.frames,
    "drops": lambda row: row.drops,
    "total": lambda row: row.sent_bytes + row.received_bytes,
    "name": lambda _: 0,
}
ORDERS = tuple(_BY)
# What is pressed for each.
KEYS = {"b": "rate", "s": "sent", "r": "received", "f": "frames", "d": "drops", "t": "total", "n": "name"}


def rows(before: Status, now: Status, order: str) -> list[Row]:
    """The endpoints, the first in `order` (one of `ORDERS`) first; among equals, by name."""
    rates = rates_between(before, now)
    found = [
        Row(
            guest=link.endpoint.guest_name,
            network=link.endpoint.network_name,
            interface=link.endpoint.interface_name,
            up=link.up,
            rates=rates.get(link.endpoint.id, _NOTHING),
            sent_bytes=link.tx_bytes,
            received_bytes=link.rx_bytes,
            sent_frames=link.tx_frames,
            received_frames=link.rx_frames,
            drops=link.drops,
            problem="" if link.up else clean_text(link.problem),
            carried=is_carried(link.endpoint.driver_options),
        )
        for link in now.links
        if link.endpoint is not None
    ]
    return sorted(found, key=lambda row: (-_BY[order](row), row.guest, row.network))


def render(found: Sequence[Row], order: str, *, room: int | None = None, hints: bool = False) -> Group:
    """The table.

    Args:
        room: lines that there are for it; None: as many as it takes.
        hints: whether to say which keys do what.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    linked = [row.rates for row in found if not row.carried]
    heading = Text.assemble(
        (f"{bits(sum(rates.sent_bits for rates in linked))} from guests, ", "bold"),
        (f"{bits(sum(rates.received_bits for rates in linked))} to guests", "bold"),
        (f"  {len(found)} endpoints, {sum(not row.up for row in found)} down; sorted by {order}", "dim"),
    )
    spare = 0 if room is None else 4 + hints
    shown = found if room is None or len(found) + spare <= room else found[: max(1, room - spare - 1)]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("GUEST", "NETWORK", "INTERFACE", "STATE"):
        table.add_column(column, no_wrap=True)
    for column in ("SENT", "RECEIVED", "FRAMES OUT", "FRAMES IN", "TOTAL OUT", "TOTAL IN", "DROPS"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in shown:
        rates = row.rates
        table.add_row(
            Text(row.guest),
            Text(row.network),
            Text(row.interface),
            Text("up", "green") if row.up else Text("down", "red"),
            *(_figure(bits(rate), rate) for rate in (rates.sent_bits, rates.received_bits)),
            *(_figure(f"{rate:,.0f}/s", rate) for rate in (rates.sent_frames, rates.received_frames)),
            octets(row.sent_bytes),
            octets(row.received_bytes),
            Text(f"{row.drops:,}", "yellow" if rates.drops else ""),
        )
    parts: list[Text | Table] = [heading, Text(), table]
    if len(shown) < len(found):
        parts.append(Text(f"and {len(found) - len(shown)} more", "dim"))
    if hints:
        keys = "  ".join(f"{key} {name}" for key, name in KEYS.items())
        parts.append(Text(f"sort by: {keys}   q quit", "dim"))
    return Group(*parts)


def _figure(text: str, rate: float) -> Text:
    from rich.text import Text

    return Text(text, "" if rate else "dim")
