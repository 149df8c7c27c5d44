"""What documents name and where they come from, whatever they are about: apart from how they are read, which the bridge
does not do.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from host_bridge.errors import InvalidError
from host_bridge.names import shown

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}", re.ASCII)


class Source:
    """Where a document comes from, for messages."""

    def __init__(self, name: str = "") -> None:
        self._name = name

    def wrong(self, line: int, message: str) -> InvalidError:
        """The error that something at a line is wrong."""
        return InvalidError(self.text(line, message))

    def text(self, line: int, message: str) -> str:
        """What is to be said of a line."""
        where = ":".join(part for part in (self._name, str(line) if line else "") if part)
        return f"{where}: {message}" if where else message


@dataclass(frozen=True, slots=True)
class Changes:
    """What an apply did with what the document names, by names in order."""

    created: tuple[str, ...] = ()
    updated: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


def check_name(source: Source, line: int, kind: str, name: str) -> None:
    """Raises InvalidError unless something may be called so."""
    if not _NAME.fullmatch(name):
        raise source.wrong(
            line,
            f"{kind} name {shown(name)} is not allowed: use 1 to 63 letters, digits, '_', '.' and '-', the first one a "
            "letter or digit",
        )
