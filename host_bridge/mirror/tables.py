"""The table of mirrors: part of `host_bridge.store.Store`."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Any

# Guests have no foreign keys: a container that does not run is no guest, and its mirrors stay.
_SCHEMA = """
CREATE TABLE mirrors (
    source_network_id TEXT NOT NULL REFERENCES networks (id) ON DELETE CASCADE,
    source_guest_id   TEXT NOT NULL,
    target_network_id TEXT NOT NULL REFERENCES networks (id) ON DELETE CASCADE,
    target_guest_id   TEXT NOT NULL,
    direction         TEXT NOT NULL CHECK (direction IN ('in', 'out', 'both')),
    PRIMARY KEY (source_network_id, source_guest_id, target_network_id, target_guest_id)
) STRICT
"""

Place = tuple[str, str]
"""A network's id and a guest's."""


@dataclass(frozen=True, slots=True)
class MirrorRecord:
    """A mirror from one place to another; `direction` is in, out or both."""

    source: Place
    target: Place
    direction: str


def create_table(connection: sqlite3.Connection) -> None:
    """Adds the table to a database that does not have it."""
    connection.execute(_SCHEMA)


class MirrorTable:
    """Reads and writes the table."""

    def _run(self, statement: str, *values: Any) -> None:
        raise NotImplementedError

    def _all(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        raise NotImplementedError

    def mirrors(self) -> list[MirrorRecord]:
        """All mirrors."""
        return [MirrorRecord((a, b), (c, d), direction) for a, b, c, d, direction in self._all("SELECT * FROM mirrors")]

    def put_mirror(self, mirror: MirrorRecord) -> None:
        """Adds a mirror, in place of one from the same to the same."""
        self._run(
            "INSERT OR REPLACE INTO mirrors VALUES (?, ?, ?, ?, ?)", *mirror.source, *mirror.target, mirror.direction
        )

    def delete_mirror(self, source: Place, target: Place) -> None:
        """Removes a mirror."""
        self._run(
            "DELETE FROM mirrors WHERE source_network_id = ? AND source_guest_id = ?"
            " AND target_network_id = ? AND target_guest_id = ?",
            *source,
            *target,
        )

    def delete_mirrors_of(self, guest_id: str, network_id: str = "") -> None:
        """Removes the mirrors from and to a guest, on one network where that is given."""
        self._run(
            "DELETE FROM mirrors WHERE (source_guest_id = ?1 AND (?2 = '' OR source_network_id = ?2))"
            " OR (target_guest_id = ?1 AND (?2 = '' OR target_network_id = ?2))",
            guest_id,
            network_id,
        )
