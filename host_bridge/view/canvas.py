"""Drawing SVG: elements with escaped text, and how much room text takes.

No font is at hand when a page is written, so widths are those of a wide one (DejaVu Sans): with any other, text is
narrower than what is left for it.
"""

from __future__ import annotations

import unicodedata
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from typing import TypeVar

_NARROW = frozenset("ijl.,:;'|!")
_SLIM = frozenset('frt()[]{}-"/\\ I')
_WIDE = frozenset("mwMW@%&")
_MONO = 0.61

T = TypeVar("T")


def text_width(text: str, size: float, *, mono: bool = False, bold: bool = False) -> float:
    """At most so wide is a line of text, in units of the drawing."""
    width = sum(_advance(character, mono=mono) for character in text)
    return width * size * (1.1 if bold else 1.0)


def _advance(character: str, *, mono: bool) -> float:
    if not character.isascii():
        return 1.2 if unicodedata.east_asian_width(character) in "WF" else 0.9
    if mono:
        return _MONO
    if character in _NARROW:
        return 0.36
    if character in _SLIM:
        return 0.45
    if character in _WIDE:
        return 1.0
    return 0.78 if character.isupper() else 0.64


def cut(text: str, width: float, size: float, *, mono: bool = False, bold: bool = False) -> str:
    """The text, or as much of it as fits and an ellipsis."""
    if text_width(text, size, mono=mono, bold=bold) <= width:
        return text
    while text and text_width(text + "…", size, mono=mono, bold=bold) > width:
        text = text[:-1]
    return text + "…"


def printable(text: str) -> str:
    """User input as XML and a reader can have it: control characters and the like are shown as question marks."""
    return "".join(character if character.isprintable() else "?" for character in text)


def rows(items: Iterable[tuple[T, float]], width: float, gap: float) -> list[list[T]]:
    """Items in rows, as many in each as fit.

    Args:
        items: each with its width.
        width: of a row; an item that is wider has a row of its own.
        gap: between two.
    """
    found: list[list[T]] = []
    left = 0.0
    for item, own in items:
        if not found or own > left:
            found.append([])
            left = width
        found[-1].append(item)
        left -= own + gap
    return found


class Canvas:
    """An SVG element that is drawn into."""

    def __init__(self, parent: ET.Element) -> None:
        self.element = parent

    def group(self, classes: str = "", **attributes: str) -> Canvas:
        """A group within this one."""
        return Canvas(self._add("g", classes, attributes))

    def title(self, text: str) -> None:
        """What is told when the pointer is over the group; it must come before all else in it."""
        self._add("title", "", {}).text = printable_lines(text)

    def rect(
        self, x: float, y: float, width: float, height: float, classes: str, *, radius: float = 0, **attributes: str
    ) -> None:
        """A rectangle."""
        shape = {"x": _number(x), "y": _number(y), "width": _number(width), "height": _number(height)}
        self._add("rect", classes, shape | ({"rx": _number(radius)} if radius else {}) | attributes)

    def circle(self, x: float, y: float, radius: float, classes: str) -> None:
        """A disc."""
        self._add("circle", classes, {"cx": _number(x), "cy": _number(y), "r": _number(radius)})

    def path(self, points: Sequence[tuple[float, float]], classes: str, *, width: float = 0) -> None:
        """Lines from point to point."""
        drawn = "M" + " L".join(f"{_number(x)} {_number(y)}" for x, y in points)
        self._add("path", classes, {"d": drawn} | ({"stroke-width": _number(width)} if width else {}))

    def text(
        self, x: float, y: float, text: str, classes: str, *, size: float, anchor: str = "", mono: bool = False
    ) -> None:
        """A line of text; `y` is its base line. `anchor`: end or middle, of `x`."""
        attributes = {"x": _number(x), "y": _number(y), "font-size": _number(size)}
        if anchor:
            attributes["text-anchor"] = anchor
        self._add("text", f"mono {classes}" if mono else classes, attributes).text = printable(text)

    def _add(self, tag: str, classes: str, attributes: dict[str, str]) -> ET.Element:
        named = {name.replace("_", "-"): printable(value) for name, value in attributes.items()}
        return ET.SubElement(self.element, tag, ({"class": classes} if classes else {}) | named)


def printable_lines(text: str) -> str:
    """As `printable`, of several lines."""
    return "\n".join(printable(line) for line in text.split("\n"))


def _number(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")
