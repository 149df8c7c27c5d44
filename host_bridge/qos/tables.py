"""The table of limits and marks: part of `host_bridge.store.Store`."""

from __future__ import annotations

import sqlite3
from typing import Any

from host_bridge.qos.model import Said

# A guest has no foreign key: a container that does not run is no guest, and what is said of it stays.
_SCHEMA = """
CREATE TABLE qos (
    network_id TEXT NOT NULL REFERENCES networks (id) ON DELETE CASCADE,
    guest_id   TEXT NOT NULL,
    direction  TEXT NOT NULL CHECK (direction IN ('in', 'out')),
    rate       INTEGER CHECK (rate > 0),
    burst      INTEGER CHECK (burst > 0),
    dscp       INTEGER CHECK (dscp BETWEEN 0 AND 63),
    PRIMARY KEY (network_id, guest_id, direction),
    CHECK ((rate IS NULL) = (burst IS NULL)),
    CHECK (rate IS NOT NULL OR dscp IS NOT NULL)
) STRICT
"""


def create_table(connection: sqlite3.Connection) -> None:
    """Adds the table to a database that does not have it."""
    connection.execute(_SCHEMA)


class QosTable:
    """Reads and writes the table, which is read much more often than it changes."""

    _qos: dict[tuple[str, str], dict[str, Said]] | None = None

    def _run(self, statement: str, *values: Any) -> None:
        raise NotImplementedError

    def _all(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        raise NotImplementedError

    def qos(self) -> dict[tuple[str, str], dict[str, Said]]:
        """What is said of each direction, by network's and guest's id; an empty guest's id: of the network."""
        if self._qos is None:
            self._qos = {}
            for network_id, guest_id, direction, rate, burst, dscp in self._all("SELECT * FROM qos"):
                self._qos.setdefault((network_id, guest_id), {})[direction] = Said(rate, burst, dscp)
        return self._qos

    def put_qos(self, network_id: str, guest_id: str, direction: str, said: Said) -> None:
        """Says something of a direction, in place of what was."""
        self.forget_qos()
        self._run(
            "INSERT INTO qos VALUES (?1, ?2, ?3, ?4, ?5, ?6)"
            " ON CONFLICT (network_id, guest_id, direction) DO UPDATE SET rate = ?4, burst = ?5, dscp = ?6",
            network_id,
            guest_id,
            direction,
            said.rate,
            said.burst,
            said.dscp,
        )

    def delete_qos(self, *, network_id: str = "", guest_id: str, direction: str = "") -> None:
        """Removes what is said of a guest, on one network and of one direction where these are given."""
        self.forget_qos()
        self._run(
            "DELETE FROM qos WHERE guest_id = ?1 AND (?2 = '' OR network_id = ?2) AND (?3 = '' OR direction = ?3)",
            guest_id,
            network_id,
            direction,
        )

    def forget_qos(self) -> None:
        """Has the table read again: it has changed, or a change was undone."""
        self._qos = None
