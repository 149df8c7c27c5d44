"""The bridge's durable state: one SQLite file, one transaction per change.

WAL keeps readers (`sqlite3 bridge.db`) from blocking the bridge and makes a commit one append. `synchronous` is FULL:
an answer "created" then also survives a power cut; with NORMAL one could lose the last commits, and the addresses
in them would be given out twice. A commit whose row is still pending uses NORMAL: nobody has been told of it, and
start-up removes pending rows anyway, so the hot path waits for one fsync and not two.

The unique indexes, not the code that looks for free addresses, are what guarantees that no address, MAC, name or
interface name has two holders.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import secrets
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from host_bridge.errors import StateError
from host_bridge.model import EndpointRecord, GuestRecord, NetworkRecord, SubnetRecord

DATABASE = "bridge.db"
_LOCK = "bridge.lock"
# "tplm": `file bridge.db` shows it, and another program's database is not taken for ours.
_APPLICATION_ID = 0x74706C6D

_SCHEMA_1 = """
CREATE TABLE meta (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT;
CREATE TABLE networks (
    id          TEXT PRIMARY KEY,
    name        TEXT NOT NULL UNIQUE,
    internal    INTEGER NOT NULL CHECK (internal IN (0, 1)),
    mtu         INTEGER NOT NULL CHECK (mtu BETWEEN 68 AND 65535),
    created_us  INTEGER NOT NULL,
    active      INTEGER NOT NULL CHECK (active IN (0, 1)),
    dns_server  TEXT NOT NULL UNIQUE
) STRICT;
CREATE TABLE guests (
    id           TEXT PRIMARY KEY,
    name         TEXT NOT NULL UNIQUE,
    address      TEXT NOT NULL UNIQUE,
    data_address TEXT NOT NULL UNIQUE,
    created_us   INTEGER NOT NULL
) STRICT;
CREATE TABLE endpoints (
    id               TEXT PRIMARY KEY,
    network_id       TEXT NOT NULL REFERENCES networks (id),
    guest_id         TEXT NOT NULL REFERENCES guests (id),
    interface_name   TEXT NOT NULL,
    gateway_priority INTEGER NOT NULL,
    created_us       INTEGER NOT NULL,
    active           INTEGER NOT NULL CHECK (active IN (0, 1)),
    UNIQUE (network_id, guest_id),
    UNIQUE (guest_id, interface_name)
) STRICT;
CREATE TABLE aliases (
    endpoint_id TEXT NOT NULL REFERENCES endpoints (id) ON DELETE CASCADE,
    position    INTEGER NOT NULL,
    alias       TEXT NOT NULL COLLATE NOCASE,
    PRIMARY KEY (endpoint_id, alias)
) STRICT;
-- Who holds an address: an endpoint, or the network's gateway (endpoint_id is NULL).
CREATE TABLE addresses (
    network_id  TEXT NOT NULL REFERENCES networks (id) ON DELETE CASCADE,
    address     TEXT NOT NULL,
    family      INTEGER NOT NULL CHECK (family IN (4, 6)),
    endpoint_id TEXT REFERENCES endpoints (id) ON DELETE CASCADE,
    PRIMARY KEY (network_id, address),
    UNIQUE (endpoint_id, family)
) STRICT;
CREATE TABLE subnets (
    network_id TEXT NOT NULL REFERENCES networks (id) ON DELETE CASCADE,
    family     INTEGER NOT NULL CHECK (family IN (4, 6)),
    subnet     TEXT NOT NULL UNIQUE,
    gateway    TEXT NOT NULL,
    PRIMARY KEY (network_id, family),
    FOREIGN KEY (network_id, gateway) REFERENCES addresses (network_id, address)
) STRICT;
-- Every MAC address of the fabric: of an endpoint, or of a network's gateway or DNS server.
CREATE TABLE macs (
    mac         TEXT PRIMARY KEY,
    role        TEXT NOT NULL CHECK (role IN ('endpoint', 'gateway', 'dns')),
    network_id  TEXT REFERENCES networks (id) ON DELETE CASCADE,
    endpoint_id TEXT UNIQUE REFERENCES endpoints (id) ON DELETE CASCADE,
    UNIQUE (network_id, role),
    CHECK ((endpoint_id IS NULL) <> (network_id IS NULL))
) STRICT;
CREATE INDEX endpoints_by_guest ON endpoints (guest_id);
"""


def _create_1(connection: sqlite3.Connection) -> None:
    for statement in _SCHEMA_1.split(";"):
        if statement.strip():
            connection.execute(statement)
    connection.execute("INSERT INTO meta VALUES ('host_id', ?)", (secrets.token_hex(16),))


# MIGRATIONS[n] takes a database from schema n to n + 1, inside the transaction that also sets user_version.
MIGRATIONS: tuple[Callable[[sqlite3.Connection], None], ...] = (_create_1,)


class Store:
    """The database and the lock on its directory.

    All methods are synchronous and for one thread: a commit takes well under a millisecond plus one fsync.

    Args:
        directory: the state directory; created 0700 when missing.

    Raises:
        StateError: the directory is in use by another bridge, or the database is damaged, of another program, or newer.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StateError(f"cannot use state directory {directory}: {error.strerror}") from error
        try:
            self._take_lock()
            self._connection = self._open()
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the database and gives up the directory's lock."""
        self._connection.close()
        os.close(self._lock)

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._lock, 32, 0).decode("ascii", "replace").strip()
            by = f" (process {holder})" if holder.isdecimal() else ""
            raise StateError(
                f"another bridge{by} uses state directory {self._directory}: stop it, or give another --state-dir"
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def _open(self) -> sqlite3.Connection:
        path = self._directory / DATABASE
        try:
            # SQLite gives -wal and -shm the database's mode, so creating it 0600 first covers all three.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            path.chmod(0o600)
        except OSError as error:
            raise StateError(f"cannot open {path}: {error.strerror}") from error
        connection = sqlite3.connect(path, isolation_level=None, cached_statements=256)
        try:
            connection.execute("PRAGMA busy_timeout = 5000")
            self._check(connection, path)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            self._migrate(connection)
        except StateError:
            connection.close()
            raise
        except sqlite3.DatabaseError as error:
            connection.close()
            raise StateError(
                f"{path} is damaged ({error}): restore it from a backup, or move it away to start with no networks"
            ) from error
        return connection

    @staticmethod
    def _check(connection: sqlite3.Connection, path: Path) -> None:
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if application != _APPLICATION_ID and tables:
            raise StateError(f"{path} is another program's database: give another --state-dir")
        if version > len(MIGRATIONS):
            raise StateError(
                f"{path} has schema {version}, this bridge knows {len(MIGRATIONS)}: run the newer taploom that wrote it"
            )
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(str(verdict).splitlines()[0])

    @staticmethod
    def _migrate(connection: sqlite3.Connection) -> None:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        for number in range(version, len(MIGRATIONS)):
            connection.execute("BEGIN IMMEDIATE")
            try:
                MIGRATIONS[number](connection)
                connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {number + 1}")
                connection.execute("COMMIT")
            except BaseException:
                connection.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def change(self, *, durable: bool = True) -> Iterator[None]:
        """One transaction: committed at the end of the block, undone when the block raises.

        Args:
            durable: False when nobody is told of the change before a later durable one (a pending row).
        """
        self._connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            # Inside, so that a COMMIT that fails (disk full) rolls back.
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    def dump(self) -> str:
        """The whole database as SQL, for tests and for people."""
        return "\n".join(self._connection.iterdump())

    def host_id(self) -> str:
        """This host's random id, the source of its IPv6 ULA prefix."""
        (value,) = self._one("SELECT value FROM meta WHERE key = 'host_id'")
        return str(value)

    def remove_pending(self) -> tuple[list[str], list[str]]:
        """Removes what a bridge that was killed had not finished; returns the ids of the networks and endpoints."""
        with self.change():
            endpoints = [row[0] for row in self._all("DELETE FROM endpoints WHERE active = 0 RETURNING id")]
            networks = [row[0] for row in self._all("SELECT id FROM networks WHERE active = 0")]
            for network in networks:
                self._delete_network(network)
        return networks, endpoints

    # Networks

    def insert_network(self, network: NetworkRecord) -> None:
        """Inserts a network with its subnets, gateways and MAC addresses."""
        self._run(
            "INSERT INTO networks VALUES (?, ?, ?, ?, ?, ?, ?)",
            network.id,
            network.name,
            int(network.internal),
            network.mtu,
            _to_us(network.created_at),
            int(network.active),
            network.dns_server,
        )
        for subnet in network.subnets:
            self._run("INSERT INTO addresses VALUES (?, ?, ?, NULL)", network.id, subnet.gateway, subnet.family)
            self._run(
                "INSERT INTO subnets VALUES (?, ?, ?, ?)",
                network.id,
                subnet.family,
                subnet.subnet,
                subnet.gateway,
            )
        for role, mac in (("gateway", network.gateway_mac), ("dns", network.dns_mac)):
            self._run("INSERT INTO macs VALUES (?, ?, ?, NULL)", mac, role, network.id)

    def activate_network(self, network_id: str) -> None:
        """Marks the network as created."""
        self._run("UPDATE networks SET active = 1 WHERE id = ?", network_id)

    def delete_network(self, network_id: str) -> None:
        """Deletes the network, which must have no endpoints."""
        self._delete_network(network_id)

    def _delete_network(self, network_id: str) -> None:
        self._run("DELETE FROM subnets WHERE network_id = ?", network_id)
        self._run("DELETE FROM networks WHERE id = ?", network_id)

    def networks(self) -> list[NetworkRecord]:
        """All networks, pending ones too, in order of their names."""
        return [self._network(row) for row in self._all("SELECT * FROM networks ORDER BY name")]

    def network(self, network_id: str) -> NetworkRecord | None:
        """The network of a full id."""
        row = self._first("SELECT * FROM networks WHERE id = ?", network_id)
        return None if row is None else self._network(row)

    def _network(self, row: tuple[Any, ...]) -> NetworkRecord:
        subnets = self._all("SELECT family, subnet, gateway FROM subnets WHERE network_id = ? ORDER BY family", row[0])
        macs = dict(self._all("SELECT role, mac FROM macs WHERE network_id = ?", row[0]))
        return NetworkRecord(
            id=row[0],
            name=row[1],
            internal=bool(row[2]),
            mtu=row[3],
            created_at=_from_us(row[4]),
            active=bool(row[5]),
            dns_server=row[6],
            gateway_mac=macs["gateway"],
            dns_mac=macs["dns"],
            subnets=tuple(SubnetRecord(*subnet) for subnet in subnets),
        )

    # Guests

    def insert_guest(self, guest: GuestRecord) -> None:
        """Inserts a guest."""
        self._run(
            "INSERT INTO guests VALUES (?, ?, ?, ?, ?)",
            guest.id,
            guest.name,
            guest.address,
            guest.data_address,
            _to_us(guest.created_at),
        )

    def delete_guest(self, guest_id: str) -> None:
        """Deletes the guest and its endpoints."""
        self._run("DELETE FROM endpoints WHERE guest_id = ?", guest_id)
        self._run("DELETE FROM guests WHERE id = ?", guest_id)

    def guests(self) -> list[GuestRecord]:
        """All guests in order of their names."""
        return [_guest(row) for row in self._all("SELECT * FROM guests ORDER BY name")]

    def guest(self, guest_id: str) -> GuestRecord | None:
        """The guest of a full id."""
        row = self._first("SELECT * FROM guests WHERE id = ?", guest_id)
        return None if row is None else _guest(row)

    # Endpoints

    def insert_endpoint(self, endpoint: EndpointRecord) -> None:
        """Inserts an endpoint with its addresses, MAC address and aliases."""
        self._run(
            "INSERT INTO endpoints VALUES (?, ?, ?, ?, ?, ?, ?)",
            endpoint.id,
            endpoint.network_id,
            endpoint.guest_id,
            endpoint.interface_name,
            endpoint.gateway_priority,
            _to_us(endpoint.created_at),
            int(endpoint.active),
        )
        for address in endpoint.addresses:
            family = 6 if ":" in address else 4
            self._run("INSERT INTO addresses VALUES (?, ?, ?, ?)", endpoint.network_id, address, family, endpoint.id)
        self._run("INSERT INTO macs VALUES (?, 'endpoint', NULL, ?)", endpoint.mac_address, endpoint.id)
        for position, alias in enumerate(endpoint.aliases):
            self._run("INSERT INTO aliases VALUES (?, ?, ?)", endpoint.id, position, alias)

    def activate_endpoint(self, endpoint_id: str) -> None:
        """Marks the endpoint as connected."""
        self._run("UPDATE endpoints SET active = 1 WHERE id = ?", endpoint_id)

    def rename_interface(self, endpoint_id: str, interface_name: str) -> None:
        """Gives the endpoint another interface name."""
        self._run("UPDATE endpoints SET interface_name = ? WHERE id = ?", interface_name, endpoint_id)

    def delete_endpoint(self, endpoint_id: str) -> None:
        """Deletes the endpoint; its addresses and MAC address are free from the commit on."""
        self._run("DELETE FROM endpoints WHERE id = ?", endpoint_id)

    def endpoints(self, *, network_id: str | None = None, guest_id: str | None = None) -> list[EndpointRecord]:
        """Endpoints, pending ones too: all, or a network's in order of guests' names, or a guest's in order of
        interface names."""
        query = "SELECT e.* FROM endpoints e JOIN guests g ON g.id = e.guest_id"
        if network_id is not None:
            rows = self._all(f"{query} WHERE e.network_id = ? ORDER BY g.name", network_id)
        elif guest_id is not None:
            # eth2 before eth10.
            rows = self._all(
                f"{query} WHERE e.guest_id = ? ORDER BY length(e.interface_name), e.interface_name", guest_id
            )
        else:
            rows = self._all(f"{query} ORDER BY g.name, length(e.interface_name), e.interface_name")
        return [self._endpoint(row) for row in rows]

    def endpoint(self, endpoint_id: str) -> EndpointRecord | None:
        """The endpoint of a full id."""
        row = self._first("SELECT * FROM endpoints WHERE id = ?", endpoint_id)
        return None if row is None else self._endpoint(row)

    def endpoint_of(self, network_id: str, guest_id: str) -> EndpointRecord | None:
        """The endpoint of a guest on a network."""
        row = self._first("SELECT * FROM endpoints WHERE network_id = ? AND guest_id = ?", network_id, guest_id)
        return None if row is None else self._endpoint(row)

    def _endpoint(self, row: tuple[Any, ...]) -> EndpointRecord:
        addresses = self._all("SELECT address FROM addresses WHERE endpoint_id = ? ORDER BY family", row[0])
        aliases = self._all("SELECT alias FROM aliases WHERE endpoint_id = ? ORDER BY position", row[0])
        (mac,) = self._one("SELECT mac FROM macs WHERE endpoint_id = ?", row[0])
        return EndpointRecord(
            id=row[0],
            network_id=row[1],
            guest_id=row[2],
            interface_name=row[3],
            mac_address=mac,
            gateway_priority=row[4],
            created_at=_from_us(row[5]),
            active=bool(row[6]),
            addresses=tuple(address for (address,) in addresses),
            aliases=tuple(alias for (alias,) in aliases),
        )

    # What is taken

    def taken_addresses(self, network_id: str) -> dict[str, str]:
        """The network's addresses that have a holder: address -> who, for people."""
        rows = self._all(
            "SELECT a.address, g.name FROM addresses a LEFT JOIN endpoints e ON e.id = a.endpoint_id"
            " LEFT JOIN guests g ON g.id = e.guest_id WHERE a.network_id = ?",
            network_id,
        )
        return {address: "the gateway" if guest is None else f"guest {guest}" for address, guest in rows}

    def taken_macs(self) -> dict[str, str]:
        """Every MAC address of the fabric: MAC -> who, for people."""
        rows = self._all(
            "SELECT m.mac, m.role, n.name, g.name FROM macs m LEFT JOIN networks n ON n.id = m.network_id"
            " LEFT JOIN endpoints e ON e.id = m.endpoint_id LEFT JOIN guests g ON g.id = e.guest_id"
        )
        return {
            mac: f"guest {guest}" if role == "endpoint" else f"the {role} of network {network}"
            for mac, role, network, guest in rows
        }

    def _run(self, statement: str, *values: Any) -> None:
        self._connection.execute(statement, values)

    def _all(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        return self._connection.execute(statement, values).fetchall()

    def _first(self, statement: str, *values: Any) -> tuple[Any, ...] | None:
        row: tuple[Any, ...] | None = self._connection.execute(statement, values).fetchone()
        return row

    def _one(self, statement: str, *values: Any) -> tuple[Any, ...]:
        row = self._first(statement, *values)
        assert row is not None
        return row


def _guest(row: tuple[Any, ...]) -> GuestRecord:
    return GuestRecord(id=row[0], name=row[1], address=row[2], data_address=row[3], created_at=_from_us(row[4]))


def _to_us(moment: datetime.datetime) -> int:
    return round(moment.timestamp() * 1_000_000)


def _from_us(value: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(value / 1_000_000, tz=datetime.UTC)
