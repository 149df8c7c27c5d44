"""The tables of load balancers: part of `host_bridge.store.Store`."""

from __future__ import annotations

import sqlite3
from typing import Any

from host_bridge.balancer.model import Balancer, from_json
from host_bridge.values import to_json

_SCHEMA = """
CREATE TABLE balancers (
    name       TEXT PRIMARY KEY,
    definition TEXT NOT NULL,
    created_us INTEGER NOT NULL,
    updated_us INTEGER NOT NULL
) STRICT;
-- Addresses of networks that load balancers hold. Those of nobody (balancer is NULL) are where health checks come from.
CREATE TABLE balancer_addresses (
    network_id TEXT NOT NULL,
    address    TEXT NOT NULL,
    family     INTEGER NOT NULL CHECK (family IN (4, 6)),
    balancer   TEXT REFERENCES balancers (name) ON DELETE CASCADE,
    PRIMARY KEY (network_id, address),
    UNIQUE (balancer, network_id, family),
    FOREIGN KEY (network_id, address) REFERENCES addresses (network_id, address) ON DELETE CASCADE
) STRICT;
CREATE UNIQUE INDEX balancer_checks ON balancer_addresses (network_id, family) WHERE balancer IS NULL;
"""


def create_tables(connection: sqlite3.Connection) -> None:
    """Adds the tables to a database that has none of them."""
    for statement in _SCHEMA.split(";"):
        if statement.strip():
            connection.execute(statement)


class BalancerTables:
    """Reads and writes the tables of load balancers."""

    def _run(self, statement: str, *values: Any) -> None:
        raise NotImplementedError

    def _all(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        raise NotImplementedError

    def balancers(self) -> list[tuple[Balancer, int, int]]:
        """All load balancers in order of their names, with when they were applied first and last changed (µs since
        1970)."""
        rows = self._all("SELECT name, definition, created_us, updated_us FROM balancers ORDER BY name")
        return [(from_json(name, text), created, updated) for name, text, created, updated in rows]

    def put_balancer(self, balancer: Balancer, now_us: int) -> None:
        """Inserts or replaces a load balancer; its addresses are put apart."""
        self._run(
            "INSERT INTO balancers VALUES (?1, ?2, ?3, ?3)"
            " ON CONFLICT (name) DO UPDATE SET definition = ?2, updated_us = ?3",
            balancer.name,
            to_json(balancer),
            now_us,
        )

    def delete_balancer(self, name: str) -> None:
        """Deletes a load balancer; its addresses are free from the commit on."""
        for network_id, address, holder in self.balancer_addresses():
            if holder == name:
                self.free_balancer_address(network_id, address)
        self._run("DELETE FROM balancers WHERE name = ?", name)

    def balancer_addresses(self) -> list[tuple[str, str, str | None]]:
        """(network's id, address, load balancer's name or None for health checks), IPv4 before IPv6."""
        rows = self._all("SELECT network_id, address, balancer FROM balancer_addresses ORDER BY network_id, family")
        return [(network_id, address, balancer) for network_id, address, balancer in rows]

    def hold_balancer_address(self, network_id: str, address: str, balancer: str | None) -> None:
        """Reserves an address of a network for a load balancer, or for health checks."""
        family = 6 if ":" in address else 4
        self._run("INSERT INTO addresses VALUES (?, ?, ?, NULL)", network_id, address, family)
        self._run("INSERT INTO balancer_addresses VALUES (?, ?, ?, ?)", network_id, address, family, balancer)

    def free_balancer_address(self, network_id: str, address: str) -> None:
        """Gives an address back."""
        self._run(
            "DELETE FROM addresses WHERE network_id = ?1 AND address = ?2 AND EXISTS"
            " (SELECT 1 FROM balancer_addresses b WHERE b.network_id = ?1 AND b.address = ?2)",
            network_id,
            address,
        )

    def balancers_on(self, network_id: str) -> list[str]:
        """The names of the load balancers that have an address on a network, in order."""
        rows = self._all(
            "SELECT DISTINCT balancer FROM balancer_addresses WHERE network_id = ? AND balancer IS NOT NULL"
            " ORDER BY balancer",
            network_id,
        )
        return [name for (name,) in rows]
