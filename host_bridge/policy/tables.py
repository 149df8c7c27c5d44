"""The tables of policies: part of `host_bridge.store.Store`."""

from __future__ import annotations

import sqlite3
from typing import Any

from host_bridge.policy.model import Group, from_json
from host_bridge.values import to_json

_SCHEMA = """
CREATE TABLE policy_groups (
    name       TEXT PRIMARY KEY,
    definition TEXT NOT NULL,
    created_us INTEGER NOT NULL,
    updated_us INTEGER NOT NULL
) STRICT;
CREATE TABLE policy_networks (
    network_id TEXT PRIMARY KEY REFERENCES networks (id) ON DELETE CASCADE,
    behaviour  TEXT NOT NULL CHECK (behaviour IN ('allow', 'deny', 'deny-in', 'deny-out'))
) STRICT;
"""


def create_tables(connection: sqlite3.Connection) -> None:
    """Adds the tables to a database that has none of them."""
    for statement in _SCHEMA.split(";"):
        if statement.strip():
            connection.execute(statement)


class PolicyTables:
    """Reads and writes the tables of policies."""

    def _run(self, statement: str, *values: Any) -> None:
        raise NotImplementedError

    def _all(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        raise NotImplementedError

    def policy_groups(self) -> list[tuple[Group, int, int]]:
        """All groups in order of their names, with when they were applied first and last changed (µs since 1970)."""
        rows = self._all("SELECT name, definition, created_us, updated_us FROM policy_groups ORDER BY name")
        return [(from_json(name, text), created, updated) for name, text, created, updated in rows]

    def put_policy_group(self, group: Group, now_us: int) -> None:
        """Inserts or replaces a group."""
        self._run(
            "INSERT INTO policy_groups VALUES (?1, ?2, ?3, ?3)"
            " ON CONFLICT (name) DO UPDATE SET definition = ?2, updated_us = ?3",
            group.name,
            to_json(group),
            now_us,
        )

    def delete_policy_group(self, name: str) -> None:
        """Deletes a group."""
        self._run("DELETE FROM policy_groups WHERE name = ?", name)

    def policy_networks(self) -> dict[str, str]:
        """What networks do by default, by their ids; those that have only their option to go by are not there."""
        return dict(self._all("SELECT network_id, behaviour FROM policy_networks"))

    def put_policy_network(self, network_id: str, behaviour: str) -> None:
        """Says what a network does by default."""
        self._run(
            "INSERT INTO policy_networks VALUES (?1, ?2) ON CONFLICT (network_id) DO UPDATE SET behaviour = ?2",
            network_id,
            behaviour,
        )

    def delete_policy_network(self, network_id: str) -> None:
        """Leaves a network to its option."""
        self._run("DELETE FROM policy_networks WHERE network_id = ?", network_id)

    def guest_at(self, address: str) -> str | None:
        """The name of the guest that has an address on a network; None: nobody has."""
        rows = self._all(
            "SELECT g.name FROM addresses a JOIN endpoints e ON e.id = a.endpoint_id JOIN guests g ON g.id = e.guest_id"
            " WHERE a.address = ?",
            address,
        )
        return str(rows[0][0]) if rows else None
