"""How documents say which guests are meant, on which networks."""

from __future__ import annotations

from dataclasses import dataclass

from host_bridge.names import shown
from host_bridge.sources import Source
from host_bridge.values import line_field

_MAX_TEXT = 255


@dataclass(frozen=True, slots=True)
class Selector:
    """Guests' places on networks: those that fit all that is given; or the members of a group."""

    guest: str = ""
    alias: str = ""
    label: str = ""
    network: str = ""
    group: str = ""
    line: int = line_field()

    def given(self) -> dict[str, str]:
        """What is given, by name."""
        found = {name: getattr(self, name) for name in ("guest", "alias", "label", "network", "group")}
        return {name: value for name, value in found.items() if value}


def check_selector(source: Source, selector: Selector) -> None:
    """Raises InvalidError unless the selector gives something that may be."""
    given = selector.given()
    if not given:
        raise source.wrong(selector.line, "this selects nobody: give a guest, an alias, a label, a network or a group")
    if "group" in given and len(given) > 1:
        others = ", ".join(sorted(given.keys() - {"group"}))
        raise source.wrong(selector.line, f"a group stands by itself: leave out {others}, or write another entry")
    for name, value in given.items():
        if len(value) > _MAX_TEXT or not value.isprintable() or value != value.strip():
            raise source.wrong(selector.line, f"{name} {shown(value)} is not allowed: nothing can be called so")
    if selector.label.startswith("="):
        raise source.wrong(selector.line, f"label {shown(selector.label)} has no key: write KEY or KEY=VALUE")
