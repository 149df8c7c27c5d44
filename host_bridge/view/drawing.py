"""The topology as SVG.

At the top is what is outside; a line leads down from it to the gateway of every network that has a way out. A network
is a card with its gateway on its edge; from there its bus runs past its guests, a tile each. Lines of guests that are
sending or receiving are thicker and move. Colours follow the reader's light or dark theme.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from dataclasses import dataclass

from host_bridge.view.canvas import Canvas, cut, rows, text_width
from host_bridge.view.rates import bits, octets
from host_bridge.view.topology import Net, Place, Topology
from host_bridge.view.tree import count, limits, shares, traits, way_out

_NAMESPACE = "http://www.w3.org/2000/svg"

_MARGIN = 32.0
_RAIL = 48.0  # from the left margin to the cards
_TILE = 232.0
_GAP = 18.0
_DROP = 26.0  # from a bus to the tiles below
_PAD = 20.0  # within cards
_INNER = 12.0  # within tiles
_MOST_COLUMNS = 6
_LEAST_COLUMNS = 3
_LINE = 17.0
_PILL = 20.0
_COLOURS = 8
_MOST_TROUBLES = 8
_SMALLEST = 9.0  # font size
_MOVING = 1000.0  # bit/s: from here on a line is seen to move

_LIGHT = """
text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;fill:#1b2330}
.mono{font-family:ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace}
.bold{font-weight:600}
.paper{fill:#f3f5f8}.card{fill:#ffffff;stroke:#d5dbe5}.tile{fill:#f8fafc;stroke:#d5dbe5}
.muted{fill:#5b6678}.bad{fill:#c62828}.good{fill:#1e8e4e}.trait{fill:#8a5a00}.group{fill:#5b3fa6}
.pill{fill:#fff2d6;stroke:#f0d49a}.pill-group{fill:#ece6fb;stroke:#cfc2f0}
.outside{fill:#e7ecf3;stroke:#c3ccd9}.rail{fill:none;stroke:#9aa7ba;stroke-width:3;stroke-linecap:round}
.bus,.drop{fill:none;stroke-linecap:round}.bus{stroke-width:5}
.down .tile{stroke:#e2a3a3;stroke-dasharray:5 4}.down .drop{stroke-dasharray:2 6}
.b0{stroke:#3b82f6}.b1{stroke:#10a37f}.b2{stroke:#e08a1e}.b3{stroke:#a855f7}
.b4{stroke:#e5484d}.b5{stroke:#0ea5b7}.b6{stroke:#d6409f}.b7{stroke:#7c8a0e}
.f0{fill:#3b82f6}.f1{fill:#10a37f}.f2{fill:#e08a1e}.f3{fill:#a855f7}
.f4{fill:#e5484d}.f5{fill:#0ea5b7}.f6{fill:#d6409f}.f7{fill:#7c8a0e}
.flow{stroke-dasharray:7 6;animation:flow 1s linear infinite}
.dim{opacity:.18}.same .tile{stroke:#3b82f6;stroke-width:2.5}
@keyframes flow{to{stroke-dashoffset:-26}}
@media (prefers-reduced-motion:reduce){.flow{animation:none}}
"""
# What is different in the dark.
_DARK = {
    "text": "fill:#e6eaf1",
    ".paper": "fill:#0e131a",
    ".card": "fill:#161d27;stroke:#2b3644",
    ".tile": "fill:#1c2531;stroke:#334052",
    ".muted": "fill:#98a5b8",
    ".bad": "fill:#ff8f8f",
    ".good": "fill:#5ad08a",
    ".trait": "fill:#f3c775",
    ".group": "fill:#cdbcff",
    ".pill": "fill:#3a2f17;stroke:#5c4a22",
    ".pill-group": "fill:#2c2447;stroke:#483a75",
    ".outside": "fill:#1b2430;stroke:#344154",
    ".rail": "stroke:#5c6b80",
    ".down .tile": "stroke:#7d4343",
    ".same .tile": "stroke:#6ba3ff",
}


def stylesheet() -> str:
    """The drawing's style. The reader's theme decides, unless the document's root has a `data-theme`, light or dark."""

    def dark(root: str) -> str:
        return "".join(f"{root} {selector}{{{rules}}}\n" for selector, rules in _DARK.items())

    follows = dark(":root:not([data-theme=light])")
    return f"{_LIGHT}@media (prefers-color-scheme:dark){{\n{follows}}}\n{dark(':root[data-theme=dark]')}"


def draw(found: Topology) -> ET.Element:
    """The drawing, as an svg element with its style in it."""
    return _Drawing(found).element


def to_svg(found: Topology) -> str:
    """The drawing as a file of its own."""
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(draw(found), encoding="unicode") + "\n"


def summary(found: Topology) -> str:
    """The fabric in one line."""
    rate = sum(place.rates.bits for place in found.places if place.rates is not None and not place.carried) / 2
    return ", ".join(
        [
            count(len(found.networks), "network"),
            count(len(found.guests), "guest"),
            count(len(found.places), "endpoint"),
            *([f"{bits(rate)} switched"] if rate else []),
            "everything has converged" if found.converged else "not converged",
        ]
    )


@dataclass(frozen=True, slots=True)
class _Line:
    text: str
    classes: str = ""
    mono: bool = False


class _Drawing:
    def __init__(self, found: Topology) -> None:
        self._found = found
        most = max([len(network.places) for network in found.networks] or [0])
        self._columns = max(_LEAST_COLUMNS, min(_MOST_COLUMNS, math.ceil(math.sqrt(most * 0.7))))
        self._card_width = self._columns * (_TILE + _GAP) - _GAP + 2 * _PAD
        self._width = 2 * _MARGIN + _RAIL + self._card_width
        self._networks: dict[str, list[str]] = {}
        for network in found.networks:
            for place in network.places:
                self._networks.setdefault(place.guest, []).append(network.name)
        self.element = ET.Element("svg", {"class": "topology", "xmlns": _NAMESPACE})
        style = ET.SubElement(self.element, "style")
        style.text = stylesheet()
        canvas = Canvas(self.element)
        canvas.rect(0, 0, self._width, 0, "paper")
        paper = self.element[-1]
        height = self._draw(canvas)
        paper.set("height", "100%")
        paper.set("width", "100%")
        self.element.set("viewBox", f"0 0 {self._width:.0f} {height:.0f}")
        self.element.set("width", f"{self._width:.0f}")
        self.element.set("height", f"{height:.0f}")
        self.element.set("role", "img")

    def _draw(self, canvas: Canvas) -> float:
        """Draws everything; returns the height."""
        y = _MARGIN + 8
        self._text(canvas, _MARGIN, y + 10, "taploom", "bold", size=22)
        self._text(canvas, _MARGIN + 110, y + 10, summary(self._found), "muted", size=14)
        moment = f"{self._found.time.astimezone():%Y-%m-%d %H:%M:%S %Z}"
        self._text(canvas, _MARGIN, y + 32, moment, "muted", size=12)
        y = self._troubles(canvas, y + 52)
        rail = canvas.group()  # below all else
        top = y
        if any(network.ways_out for network in self._found.networks):
            y = self._outside(canvas, y)
        joints: list[float] = []
        for number, network in enumerate(self._found.networks):
            y = self._network(canvas, y, number % _COLOURS, network, joints)
        if joints:
            x = _MARGIN + _RAIL / 2
            rail.path([(x, top + 20), (x, joints[-1])], "rail")
            for joint in joints:
                rail.path([(x, joint), (_MARGIN + _RAIL, joint)], "rail")
                rail.circle(x, joint, 4, "rail")
        if self._found.unconnected:
            y = self._unconnected(canvas, y)
        if not self._found.networks and not self._found.unconnected:
            self._text(canvas, _MARGIN, y + 16, "nothing yet: taploom network create app", "muted", size=14)
            y += 40
        return y + _MARGIN - _GAP

    def _troubles(self, canvas: Canvas, y: float) -> float:
        lines = [f"{part.name}: {part.problem or part.state}" for part in self._found.ailing]
        lines += [f"{subject}: {reason}" for subject, reason in self._found.pending]
        shown = lines if len(lines) <= _MOST_TROUBLES else [*lines[:_MOST_TROUBLES], f"and {len(lines) - 8} more"]
        for line in shown:
            y += _LINE
            self._text(canvas, _MARGIN, y, line, "bad", size=13)
        return y + (12 if shown else 0)

    def _outside(self, canvas: Canvas, y: float) -> float:
        canvas.rect(_MARGIN, y, self._width - 2 * _MARGIN, 40, "outside", radius=20)
        self._text(canvas, _MARGIN + _RAIL, y + 25, "outside", "bold", size=14)
        self._text(canvas, _MARGIN + _RAIL + 76, y + 25, "over the helper's uplink", "muted", size=12)
        return y + 40 + _GAP

    # A network

    def _network(self, canvas: Canvas, y: float, colour: int, network: Net, joints: list[float]) -> float:
        group = canvas.group("network")
        x = _MARGIN + _RAIL
        card = group.group()
        gate, last = self._network_head(group, y, network)
        bottom = self._tiles(group, gate, last, colour, network)
        gateway = group.group("head", tabindex="0")
        gateway.title(f"gateway of {network.name}: {' '.join(network.gateways)}\n{way_out(network)}")
        gateway.rect(x - 9, gate - 9, 18, 18, f"f{colour}", radius=5)
        card.rect(x, y, self._card_width, bottom - y, "card", radius=14)
        if network.ways_out:
            joints.append(gate)
        return bottom + _GAP

    def _network_head(self, group: Canvas, y: float, network: Net) -> tuple[float, float]:
        """Its name, traits, subnets and load balancers; returns the heights of its gateway and of the last line."""
        x, inner = _MARGIN + _RAIL + _PAD, self._card_width - 2 * _PAD
        line = y + 32
        head = group.group("head", tabindex="0")
        head.title(_network_title(network))
        pills = [(text, text_width(text, 12) + 16) for text in traits(network)]
        room = inner - sum(own + 8 for _, own in pills) - 12
        one_row = room >= min(inner / 2, text_width(network.name, 18, bold=True))
        name = cut(network.name, room if one_row else inner, 18, bold=True)
        self._text(head, x, line, name, "bold", size=18, width=inner)
        if one_row:
            self._pills(head, x + text_width(name, 18, bold=True) + 14, line - 15, pills, "trait")
        else:
            for row in rows(((pill, pill[1]) for pill in pills), inner, 8):
                line += _PILL + 6
                self._pills(head, x, line - 15, row, "trait")
        for subnet, gateway in zip(network.subnets, network.gateways, strict=False):
            line += _LINE + 2
            self._text(head, x, line, f"{subnet}  gateway {gateway}", "muted", size=12.5, mono=True, width=inner)
        gate = line - 4
        for balancer in network.balancers:
            line += _LINE + 2
            text = f"load balancer {balancer.name}  {shares(balancer)}"
            self._text(head, x, line, text, "group", size=12.5, width=inner)
        return gate, line - 4

    def _tiles(self, group: Canvas, gate: float, head: float, colour: int, network: Net) -> float:
        """The bus, from the gateway on, and the guests along it below the head; returns where the card ends."""
        x, y = _MARGIN + _RAIL + _PAD, head + 26
        spine = x - _PAD / 2
        lines = group.group()
        tiles = [(place, self._tile_lines(network, place)) for place in network.places]
        if not tiles:
            self._text(group, x, y + 4, "nobody is on it", "muted", size=13)
            lines.path([(spine, gate), (spine, y - 8)], f"bus b{colour}")
            return y + 24
        start = y
        for at in range(0, len(tiles), self._columns):
            row = tiles[at : at + self._columns]
            start = y
            height = 38 + _LINE * max(len(parts) for _, parts in row)
            last = x + (len(row) - 1) * (_TILE + _GAP) + _TILE / 2
            lines.path([(spine, y), (last, y)], f"bus b{colour}")
            for number, (place, parts) in enumerate(row):
                tile = self._tile(group, place, x + number * (_TILE + _GAP), y, colour)
                tile.rect(0, _DROP, _TILE, height, "tile", radius=10)
                self._tile_text(tile, place, parts)
            y += _DROP + height + _GAP
        lines.path([(spine, gate), (spine, start)], f"bus b{colour}")
        return y - _GAP + _PAD

    def _pills(self, canvas: Canvas, x: float, y: float, pills: list[tuple[str, float]], classes: str) -> None:
        for text, width in pills:
            canvas.rect(x, y, width, _PILL, "pill" if classes == "trait" else "tile", radius=_PILL / 2)
            shown = cut(text, width - 16, 12)
            self._text(canvas, x + width / 2, y + 14, shown, classes, size=12, anchor="middle")
            x += width + 8

    # A guest's place

    def _tile_lines(self, network: Net, place: Place) -> list[_Line]:
        """The lines of a tile below its head."""
        lines = [_Line(address, mono=True) for address in place.addresses]
        if place.aliases:
            lines.append(_Line(f"also {', '.join(place.aliases)}", "muted"))
        if not place.up:
            lines.append(_Line(place.problem, "bad"))
        elif place.rates is not None and place.rates.bits:
            lines.append(_Line(f"↑ {bits(place.rates.sent_bits)}  ↓ {bits(place.rates.received_bits)}", "good"))
        if place.sent_limit or place.received_limit:
            lines.append(_Line(limits(place), "trait"))
        others = [name for name in self._networks[place.guest] if name != network.name]
        if others:
            lines.append(_Line(f"on {', '.join(others)} too", "muted"))
        if place.groups:
            lines.append(_Line(f"in {', '.join(place.groups)}", "group"))
        return lines

    @staticmethod
    def _tile(canvas: Canvas, place: Place, x: float, y: float, colour: int) -> Canvas:
        """A group whose origin is at the left end of its part of the bus, with its line to the bus."""
        group = canvas.group(
            "place" if place.up else "place down",
            transform=f"translate({x:g} {y:g})",
            tabindex="0",
            data_guest=place.guest,
            data_text=" ".join([place.guest, *place.addresses, *place.aliases, *place.groups]).lower(),
        )
        group.title(_place_title(place))
        rate = place.rates.bits if place.rates is not None and place.up else 0.0
        # From 1 kbit/s on, a little thicker with every factor of ten.
        thickness = 2.5 + min(6.0, max(0.0, math.log10(rate) - 3)) if rate > 0 else 2.5
        drop = f"drop b{colour} flow" if rate >= _MOVING else f"drop b{colour}"
        group.path([(_TILE / 2, 0), (_TILE / 2, _DROP)], drop, width=thickness)
        return group

    def _tile_text(self, tile: Canvas, place: Place, lines: list[_Line]) -> None:
        tile.circle(_INNER + 5, _DROP + 19, 5, "good" if place.up else "bad")
        interface = cut(place.interface, 70, 11.5, mono=True)
        room = _TILE - 2 * _INNER - 18 - text_width(interface, 11.5, mono=True) - 8
        self._text(tile, _INNER + 18, _DROP + 24, place.guest, "bold", size=14.5, width=room)
        self._text(tile, _TILE - _INNER, _DROP + 23, interface, "muted", size=11.5, anchor="end", mono=True)
        y = _DROP + 26
        for line in lines:
            y += _LINE
            width = _TILE - 2 * _INNER
            self._text(tile, _INNER, y, line.text, line.classes, size=12, mono=line.mono, width=width)

    def _unconnected(self, canvas: Canvas, y: float) -> float:
        x, inner = _MARGIN + _RAIL, self._card_width - 2 * _PAD
        card = canvas.group()
        self._text(canvas, x + _PAD, y + 28, "on no network", "muted bold", size=14)
        pills = [(name, min(inner, text_width(name, 12) + 16)) for name in self._found.unconnected]
        line = y + 40
        for row in rows(((pill, pill[1]) for pill in pills), inner, 8):
            self._pills(canvas, x + _PAD, line, row, "muted")
            line += _PILL + 8
        card.rect(x, y, self._card_width, line - y + 8, "card", radius=14)
        return line + 8 + _GAP

    def _text(
        self,
        canvas: Canvas,
        x: float,
        y: float,
        text: str,
        classes: str,
        *,
        size: float,
        mono: bool = False,
        anchor: str = "",
        width: float = 0,
    ) -> None:
        """Text that stays within `width`; else within the drawing. Addresses are made smaller before they are cut."""
        room = width or self._width - x - _MARGIN
        bold = "bold" in classes.split()
        own = text_width(text, size, mono=mono, bold=bold)
        if mono and own > room:
            size = max(_SMALLEST, size * room / own)
        if not anchor:
            text = cut(text, room, size, mono=mono, bold=bold)
        canvas.text(x, y, text, classes, size=size, anchor=anchor, mono=mono)


def _network_title(network: Net) -> str:
    return "\n".join(
        [
            f"network {network.name}",
            *(
                f"{subnet}, gateway {gateway}"
                for subnet, gateway in zip(network.subnets, network.gateways, strict=False)
            ),
            way_out(network),
            *(f"load balancer {balancer.name}: {shares(balancer)}" for balancer in network.balancers),
            f"guests {'do not reach each other' if network.isolated else 'reach each other'}; policy {network.policy}",
            f"MTU {network.mtu}",
            *(f"label {key}={value}" for key, value in network.labels.items()),
            f"id {network.id[:12]}",
        ]
    )


def _place_title(place: Place) -> str:
    lines = [
        f"{place.guest}, {place.interface}, {place.mac_address}",
        *place.addresses,
        *([f"also {', '.join(place.aliases)}"] if place.aliases else []),
        *([f"in {', '.join(place.groups)}"] if place.groups else []),
        "its link is up" if place.up else place.problem,
        f"sent {octets(place.sent_bytes)}, received {octets(place.received_bytes)}, dropped {place.drops:,} frames",
    ]
    if place.rates is not None:
        lines.append(
            f"now ↑ {bits(place.rates.sent_bits)} ({place.rates.sent_frames:,.0f} frames/s)"
            f" ↓ {bits(place.rates.received_bits)} ({place.rates.received_frames:,.0f} frames/s)"
        )
    return "\n".join([*lines, f"endpoint {place.id[:12]}"])
