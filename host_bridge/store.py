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
import dataclasses
import datetime
import fcntl
import json
import os
import secrets
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from host_bridge import ipam
from host_bridge.balancer import tables as balancer_tables
from host_bridge.errors import GuestNotFoundError, NameInUseError, StateError
from host_bridge.mirror import tables as mirror_tables
from host_bridge.model import (
    ContainerRecord,
    EndpointRecord,
    GuestRecord,
    GuestSettings,
    NetworkRecord,
    SubnetRecord,
)
from host_bridge.policy.tables import PolicyTables, create_tables
from host_bridge.qos.tables import QosTable
from host_bridge.qos.tables import create_table as create_qos
from host_bridge.vlan import OPTION_PARENT

DATABASE = "bridge.db"
_LOCK = "bridge.lock"
# "tplm": `file bridge.db` shows it, and another program's database is not taken for ours.
_APPLICATION_ID = 0x74706C6D

# With all that an endpoint has, in one query: a guest may have hundreds.
_ENDPOINTS = """
SELECT e.*,
    (SELECT json_group_array(json_array(family, address)) FROM addresses WHERE endpoint_id = e.id),
    (SELECT json_group_array(json_array(position, alias)) FROM aliases WHERE endpoint_id = e.id),
    (SELECT mac FROM macs WHERE endpoint_id = e.id)
FROM endpoints e
"""

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


# SQLite changes no constraint of a table, so `networks` and `macs` are made anew: host, none and configurations have no
# DNS server, and a MAC address has one holder per network, as Docker has it, not one in all.
_SCHEMA_2 = """
CREATE TABLE new_networks (
    id           TEXT PRIMARY KEY,
    name         TEXT NOT NULL UNIQUE,
    internal     INTEGER NOT NULL CHECK (internal IN (0, 1)),
    mtu          INTEGER NOT NULL CHECK (mtu BETWEEN 68 AND 65535),
    created_us   INTEGER NOT NULL,
    active       INTEGER NOT NULL CHECK (active IN (0, 1)),
    dns_server   TEXT UNIQUE,
    driver       TEXT NOT NULL DEFAULT 'bridge',
    predefined   INTEGER NOT NULL DEFAULT 0 CHECK (predefined IN (0, 1)),
    attachable   INTEGER NOT NULL DEFAULT 0,
    ingress      INTEGER NOT NULL DEFAULT 0,
    config_only  INTEGER NOT NULL DEFAULT 0,
    config_from  TEXT NOT NULL DEFAULT '',
    enable_ipv4  INTEGER NOT NULL DEFAULT 1,
    enable_ipv6  INTEGER NOT NULL DEFAULT 0,
    labels       TEXT NOT NULL DEFAULT '{}',
    options      TEXT NOT NULL DEFAULT '{}',
    ipam_driver  TEXT NOT NULL DEFAULT 'default',
    ipam_options TEXT,
    idle_subnets TEXT NOT NULL DEFAULT '[]'
) STRICT;
INSERT INTO new_networks (id, name, internal, mtu, created_us, active, dns_server, enable_ipv6)
    SELECT id, name, internal, mtu, created_us, active, dns_server,
           EXISTS (SELECT 1 FROM subnets s WHERE s.network_id = n.id AND s.family = 6)
    FROM networks n;
DROP TABLE networks;
ALTER TABLE new_networks RENAME TO networks;
ALTER TABLE subnets ADD COLUMN ip_range TEXT NOT NULL DEFAULT '';
ALTER TABLE subnets ADD COLUMN auxiliary TEXT NOT NULL DEFAULT '[]';
ALTER TABLE subnets ADD COLUMN configured INTEGER NOT NULL DEFAULT 1;
ALTER TABLE subnets ADD COLUMN gateway_given INTEGER NOT NULL DEFAULT 0;
-- Every MAC address of a network: of an endpoint, or of the network's gateway, DNS server or uplink.
CREATE TABLE new_macs (
    network_id  TEXT NOT NULL REFERENCES networks (id) ON DELETE CASCADE,
    mac         TEXT NOT NULL,
    role        TEXT NOT NULL CHECK (role IN ('endpoint', 'gateway', 'dns', 'uplink')),
    endpoint_id TEXT UNIQUE REFERENCES endpoints (id) ON DELETE CASCADE,
    PRIMARY KEY (network_id, mac),
    CHECK ((endpoint_id IS NULL) = (role <> 'endpoint'))
) STRICT;
INSERT INTO new_macs
    SELECT coalesce(m.network_id, e.network_id), m.mac, m.role, m.endpoint_id
    FROM macs m LEFT JOIN endpoints e ON e.id = m.endpoint_id;
DROP TABLE macs;
ALTER TABLE new_macs RENAME TO macs;
CREATE UNIQUE INDEX macs_of_networks ON macs (network_id, role) WHERE endpoint_id IS NULL;
-- Where a network's router hangs on the helper's uplink, in CIDR form.
CREATE TABLE uplinks (
    address    TEXT PRIMARY KEY,
    network_id TEXT NOT NULL REFERENCES networks (id) ON DELETE CASCADE,
    family     INTEGER NOT NULL CHECK (family IN (4, 6)),
    UNIQUE (network_id, family)
) STRICT;
ALTER TABLE guests ADD COLUMN settings TEXT NOT NULL DEFAULT '{}';
ALTER TABLE endpoints ADD COLUMN static_addresses TEXT NOT NULL DEFAULT '[]';
ALTER TABLE endpoints ADD COLUMN static_mac INTEGER NOT NULL DEFAULT 0;
ALTER TABLE endpoints ADD COLUMN links TEXT NOT NULL DEFAULT '[]';
ALTER TABLE endpoints ADD COLUMN driver_options TEXT NOT NULL DEFAULT '{}';
ALTER TABLE endpoints ADD COLUMN names TEXT NOT NULL DEFAULT '[]';
CREATE TABLE containers (
    id         TEXT PRIMARY KEY,
    name       TEXT NOT NULL UNIQUE,
    created_us INTEGER NOT NULL,
    config     TEXT NOT NULL,
    state      TEXT NOT NULL
) STRICT;
"""


def _create_2(connection: sqlite3.Connection) -> None:
    for statement in _SCHEMA_2.split(";"):
        if statement.strip():
            connection.execute(statement)
    # Schema 1 did not say who chose a subnet: one of those that the bridge gives by itself was most likely its choice.
    (host_id,) = connection.execute("SELECT value FROM meta WHERE key = 'host_id'").fetchone()
    prefix = ipam.ula_prefix(str(host_id))
    own = {str(pool) for pool in ipam.default_pools()}
    for (subnet,) in connection.execute("SELECT subnet FROM subnets").fetchall():
        parsed = ipam.parse_subnet(subnet)
        if subnet in own or (parsed.prefixlen == 64 and ipam.overlaps(parsed, prefix)):
            connection.execute("UPDATE subnets SET configured = 0 WHERE subnet = ?", (subnet,))


# MIGRATIONS[n] takes a database from schema n to n + 1, inside the transaction that also sets user_version. Foreign
# keys are not enforced meanwhile, but checked at the end.
MIGRATIONS: tuple[Callable[[sqlite3.Connection], None], ...] = (
    _create_1,
    _create_2,
    create_tables,
    create_qos,
    balancer_tables.create_tables,
    mirror_tables.create_table,
)


class Store(PolicyTables, QosTable, balancer_tables.BalancerTables, mirror_tables.MirrorTable):
    """The database and the lock on its directory.

    All methods are synchronous and for one thread: a commit takes well under a millisecond plus one fsync.

    Args:
        directory: the state directory; created 0700 when missing.

    Raises:
        StateError: the directory is in use by another bridge, or the database is damaged, of another program, or newer.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # Networks are read much more often than they change: by id, as they are in the database.
        self._networks: dict[str, NetworkRecord] = {}
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
            self._migrate(connection)
            connection.execute("PRAGMA foreign_keys = ON")
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
                if connection.execute("PRAGMA foreign_key_check").fetchone() is not None:
                    raise sqlite3.DatabaseError(f"schema {number + 1} would lose references")
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
            self._networks.clear()
            self.forget_qos()
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
        """Inserts a network with its subnets, gateways, auxiliary addresses, uplink and MAC addresses."""
        ipam_options = None if network.ipam_options is None else _to_json(dict(network.ipam_options))
        self._run(
            "INSERT INTO networks VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            network.id,
            network.name,
            int(network.internal),
            network.mtu,
            _to_us(network.created_at),
            int(network.active),
            network.dns_server or None,
            network.driver,
            int(network.predefined),
            int(network.attachable),
            int(network.ingress),
            int(network.config_only),
            network.config_from,
            int(network.enable_ipv4),
            int(network.enable_ipv6),
            _to_json(dict(network.labels)),
            _to_json(dict(network.options)),
            network.ipam_driver,
            ipam_options,
            _to_json([_subnet_to_list(subnet) for subnet in network.idle_subnets]),
        )
        for subnet in network.subnets:
            for address in (subnet.gateway, *(address for _, address in subnet.auxiliary)):
                self._run("INSERT INTO addresses VALUES (?, ?, ?, NULL)", network.id, address, subnet.family)
            self._run(
                "INSERT INTO subnets VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                network.id,
                subnet.family,
                subnet.subnet,
                subnet.gateway,
                subnet.ip_range,
                _to_json(subnet.auxiliary),
                int(subnet.configured),
                int(subnet.gateway_given),
            )
        for role, mac in (("gateway", network.gateway_mac), ("dns", network.dns_mac)):
            if mac:
                self._run("INSERT INTO macs VALUES (?, ?, ?, NULL)", network.id, mac, role)
        if network.uplink_addresses:
            self.insert_uplink(network.id, network.uplink_addresses, network.uplink_mac)

    def insert_uplink(self, network_id: str, addresses: tuple[str, ...], mac: str) -> None:
        """Gives a network that has none its place on the uplink."""
        self._networks.pop(network_id, None)
        for address in addresses:
            self._run("INSERT INTO uplinks VALUES (?, ?, ?)", address, network_id, 6 if ":" in address else 4)
        self._run("INSERT INTO macs VALUES (?, ?, 'uplink', NULL)", network_id, mac)

    def rename_network(self, network_id: str, name: str) -> None:
        """Gives the network another name."""
        self._networks.pop(network_id, None)
        self._run("UPDATE networks SET name = ? WHERE id = ?", name, network_id)

    def activate_network(self, network_id: str) -> None:
        """Marks the network as created."""
        self._networks.pop(network_id, None)
        self._run("UPDATE networks SET active = 1 WHERE id = ?", network_id)

    def delete_network(self, network_id: str) -> None:
        """Deletes the network, which must have no endpoints."""
        self._delete_network(network_id)

    def _delete_network(self, network_id: str) -> None:
        self._networks.pop(network_id, None)
        self._run("DELETE FROM subnets WHERE network_id = ?", network_id)
        self._run("DELETE FROM networks WHERE id = ?", network_id)

    def networks(self) -> list[NetworkRecord]:
        """All networks, pending ones too, in order of their names."""
        return self._networks_of(self._all("SELECT id FROM networks ORDER BY name"))

    def network(self, network_id: str) -> NetworkRecord | None:
        """The network of a full id."""
        known = self._networks.get(network_id)
        if known is not None:
            return known
        row = self._first("SELECT * FROM networks WHERE id = ?", network_id)
        if row is None:
            return None
        network = self._networks[network_id] = self._network(row)
        return network

    def network_id_of(self, name: str) -> str | None:
        """The id of the network of a name, also of a pending one."""
        row = self._first("SELECT id FROM networks WHERE name = ?", name)
        return None if row is None else str(row[0])

    def find_networks(self, text: str) -> list[NetworkRecord]:
        """The created network of this id, or else of this name, or else those whose id begins so, in order of names."""
        return self._networks_of(self._find("networks WHERE active = 1", text))

    def _find(self, where: str, text: str) -> list[tuple[Any, ...]]:
        if not text or not text.isprintable():
            return []  # nothing is called so, and SQLite takes no lone surrogates
        for condition in ("id = ?1", "name = ?1", "substr(id, 1, length(?1)) = ?1"):
            rows = self._all(f"SELECT id FROM {where} AND {condition} ORDER BY name", text)  # noqa: S608 (constants)
            if rows:
                return rows
        return []

    def _networks_of(self, rows: list[tuple[Any, ...]]) -> list[NetworkRecord]:
        return [network for (network_id,) in rows if (network := self.network(network_id)) is not None]

    def _network(self, row: tuple[Any, ...]) -> NetworkRecord:
        subnets = self._all(
            "SELECT family, subnet, gateway, ip_range, auxiliary, configured, gateway_given FROM subnets"
            " WHERE network_id = ? ORDER BY family",
            row[0],
        )
        macs = dict(self._all("SELECT role, mac FROM macs WHERE network_id = ? AND endpoint_id IS NULL", row[0]))
        uplinks = self._all("SELECT address FROM uplinks WHERE network_id = ? ORDER BY family", row[0])
        return NetworkRecord(
            id=row[0],
            name=row[1],
            internal=bool(row[2]),
            mtu=row[3],
            created_at=_from_us(row[4]),
            active=bool(row[5]),
            dns_server=row[6] or "",
            gateway_mac=macs.get("gateway", ""),
            dns_mac=macs.get("dns", ""),
            subnets=tuple(
                SubnetRecord(family, subnet, gateway, ip_range, _pairs(auxiliary), bool(configured), bool(given))
                for family, subnet, gateway, ip_range, auxiliary, configured, given in subnets
            ),
            driver=row[7],
            predefined=bool(row[8]),
            attachable=bool(row[9]),
            ingress=bool(row[10]),
            config_only=bool(row[11]),
            config_from=row[12],
            enable_ipv4=bool(row[13]),
            enable_ipv6=bool(row[14]),
            labels=json.loads(row[15]),
            options=json.loads(row[16]),
            ipam_driver=row[17],
            ipam_options=None if row[18] is None else json.loads(row[18]),
            idle_subnets=tuple(_subnet_from_list(one) for one in json.loads(row[19])),
            uplink_addresses=tuple(address for (address,) in uplinks),
            uplink_mac=macs.get("uplink", ""),
        )

    # Guests

    def insert_guest(self, guest: GuestRecord) -> None:
        """Inserts a guest."""
        self._run(
            "INSERT INTO guests VALUES (?, ?, ?, ?, ?, ?)",
            guest.id,
            guest.name,
            guest.address,
            guest.data_address,
            _to_us(guest.created_at),
            _settings_to_json(guest.settings),
        )

    def update_guest(self, guest_id: str, *, name: str, settings: GuestSettings) -> None:
        """Gives the guest this name and these settings."""
        self._run("UPDATE guests SET name = ?, settings = ? WHERE id = ?", name, _settings_to_json(settings), guest_id)

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

    def find_guests(self, text: str) -> list[GuestRecord]:
        """The guest of this id, or else of this name, or else those whose id begins so, in order of names."""
        rows = self._find("guests WHERE true", text)
        return [guest for (guest_id,) in rows if (guest := self.guest(guest_id)) is not None]

    # Endpoints

    def insert_endpoint(self, endpoint: EndpointRecord) -> None:
        """Inserts an endpoint with its addresses, MAC address and aliases."""
        self._run(
            "INSERT INTO endpoints VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            endpoint.id,
            endpoint.network_id,
            endpoint.guest_id,
            endpoint.interface_name,
            endpoint.gateway_priority,
            _to_us(endpoint.created_at),
            int(endpoint.active),
            _to_json(endpoint.static_addresses),
            int(endpoint.static_mac),
            _to_json(endpoint.links),
            _to_json(dict(endpoint.driver_options)),
            _to_json(endpoint.names),
        )
        for address in endpoint.addresses:
            family = 6 if ":" in address else 4
            self._run("INSERT INTO addresses VALUES (?, ?, ?, ?)", endpoint.network_id, address, family, endpoint.id)
        self._run(
            "INSERT INTO macs VALUES (?, ?, 'endpoint', ?)", endpoint.network_id, endpoint.mac_address, endpoint.id
        )
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
        query = f"{_ENDPOINTS} JOIN guests g ON g.id = e.guest_id"
        if network_id is not None:
            rows = self._all(f"{query} WHERE e.network_id = ? ORDER BY g.name", network_id)
        elif guest_id is not None:
            # eth2 before eth10.
            rows = self._all(
                f"{query} WHERE e.guest_id = ? ORDER BY length(e.interface_name), e.interface_name", guest_id
            )
        else:
            rows = self._all(f"{query} ORDER BY g.name, length(e.interface_name), e.interface_name")
        return [_endpoint(row) for row in rows]

    def endpoint(self, endpoint_id: str) -> EndpointRecord | None:
        """The endpoint of a full id."""
        row = self._first(f"{_ENDPOINTS} WHERE e.id = ?", endpoint_id)
        return None if row is None else _endpoint(row)

    def interface_names(self, guest_id: str) -> set[str]:
        """The names of the guest's interfaces."""
        return {name for (name,) in self._all("SELECT interface_name FROM endpoints WHERE guest_id = ?", guest_id)}

    def guests_with_links(self, network_id: str) -> list[str]:
        """The ids of the guests that have names of their own for others on the network."""
        rows = self._all("SELECT guest_id FROM endpoints WHERE network_id = ? AND links <> '[]'", network_id)
        return [guest_id for (guest_id,) in rows]

    def endpoint_of(self, network_id: str, guest_id: str) -> EndpointRecord | None:
        """The endpoint of a guest on a network."""
        row = self._first(f"{_ENDPOINTS} WHERE e.network_id = ? AND e.guest_id = ?", network_id, guest_id)
        return None if row is None else _endpoint(row)

    def carrier_of(self, endpoint: EndpointRecord) -> EndpointRecord | None:
        """The endpoint over whose interface this one goes; None: it is not there, or there is none."""
        carried = endpoint.carried
        over = None if carried is None else self.network_id_of(carried.parent)
        return None if over is None else self.endpoint_of(over, endpoint.guest_id)

    def carried_by(self, endpoint: EndpointRecord) -> list[str]:
        """The ids of the endpoints that go over this one's interface, or did while it was there."""
        rows = self._all(
            "SELECT e.id FROM endpoints e JOIN networks n ON n.id = ?1"
            " WHERE e.guest_id = ?2 AND json_extract(e.driver_options, ?3) = n.name",
            endpoint.network_id,
            endpoint.guest_id,
            f'$."{OPTION_PARENT}"',
        )
        return [endpoint_id for (endpoint_id,) in rows]

    # Containers

    def insert_container(self, container: ContainerRecord) -> None:
        """Inserts a container; NameInUseError when another container, or a guest that is none, has its name."""
        with self._within():
            self._check_container_name(container)
            self._run(
                "INSERT INTO containers VALUES (?, ?, ?, ?, ?)",
                container.id,
                container.name,
                _to_us(container.created_at),
                _to_json(container.config),
                _to_json(container.state),
            )

    def update_container(self, container: ContainerRecord, *, durable: bool = True) -> None:
        """Replaces name, config and state of a container. A guest of the container is renamed by `Fabric.rename_guest`.

        Args:
            durable: False for a change that may be lost with the machine's power.

        Raises:
            GuestNotFoundError: it is gone.
            NameInUseError: another container, or a guest that is none, has its name.
        """
        with self._within(durable=durable):
            self._check_container_name(container)
            row = self._first(
                "UPDATE containers SET name = ?, config = ?, state = ? WHERE id = ? RETURNING id",
                container.name,
                _to_json(container.config),
                _to_json(container.state),
                container.id,
            )
            if row is None:
                raise GuestNotFoundError(container.id)

    def rename_container(self, container_id: str, name: str) -> None:
        """Gives the container, when there is one of the id, another name."""
        self._run("UPDATE containers SET name = ? WHERE id = ?", name, container_id)

    def delete_container(self, container_id: str) -> None:
        """Deletes the container's record; what is not there is success."""
        with self._within():
            self._run("DELETE FROM containers WHERE id = ?", container_id)
            self.delete_qos(guest_id=container_id)
            self.delete_mirrors_of(container_id)

    def containers(self) -> list[ContainerRecord]:
        """All containers in order of their names."""
        return [_container(row) for row in self._all("SELECT * FROM containers ORDER BY name")]

    def container(self, container_id: str) -> ContainerRecord | None:
        """The container of a full id."""
        row = self._first("SELECT * FROM containers WHERE id = ?", container_id)
        return None if row is None else _container(row)

    def is_container(self, guest_id: str) -> bool:
        """True when there is a container of this id."""
        return self._first("SELECT 1 FROM containers WHERE id = ?", guest_id) is not None

    def holder_of_name(self, name: str, besides: str = "") -> str | None:
        """The id of the guest or container that has a name, other than the one of the id `besides`; None: nobody."""
        row = self._first(
            "SELECT id FROM guests WHERE name = ?1 AND id <> ?2"
            " UNION ALL SELECT id FROM containers WHERE name = ?1 AND id <> ?2",
            name,
            besides,
        )
        return None if row is None else str(row[0])

    def _check_container_name(self, container: ContainerRecord) -> None:
        holder = self.holder_of_name(container.name, container.id)
        if holder is not None:
            raise NameInUseError(container.name, holder)

    @contextlib.contextmanager
    def _within(self, *, durable: bool = True) -> Iterator[None]:
        """The transaction that is under way, or one for the block."""
        if self._connection.in_transaction:
            yield
        else:
            with self.change(durable=durable):
                yield

    # What is taken

    def addresses_in(self, network_id: str, family: int) -> list[str]:
        """The network's addresses of a family that have a holder."""
        rows = self._all("SELECT address FROM addresses WHERE network_id = ? AND family = ?", network_id, family)
        return [address for (address,) in rows]

    def taken_addresses(self, network_id: str, address: str | None = None) -> dict[str, str]:
        """The network's addresses that have a holder, or only this one if it has: address -> who, for people."""
        rows = self._all(
            "SELECT a.address, g.name, s.gateway = a.address FROM addresses a"
            " JOIN subnets s ON s.network_id = a.network_id AND s.family = a.family"
            " LEFT JOIN endpoints e ON e.id = a.endpoint_id"
            " LEFT JOIN guests g ON g.id = e.guest_id"
            " WHERE a.network_id = ?1 AND (?2 IS NULL OR a.address = ?2)",
            network_id,
            address,
        )
        holders = {
            held: f"guest {guest}" if guest is not None else "the gateway" if gateway else "an auxiliary address"
            for held, guest, gateway in rows
        }
        for network, held, balancer in self.balancer_addresses():
            if network == network_id and held in holders:
                holders[held] = f"balancer {balancer}" if balancer else "the health checks of load balancers"
        return holders

    def taken_macs(self) -> set[str]:
        """The MAC addresses of the whole fabric."""
        return {mac for (mac,) in self._all("SELECT mac FROM macs")}

    def holder_of_mac(self, network_id: str, mac: str) -> str | None:
        """Who on the network has the MAC address, for people."""
        row = self._first(
            "SELECT m.role, n.name, g.name FROM macs m JOIN networks n ON n.id = m.network_id"
            " LEFT JOIN endpoints e ON e.id = m.endpoint_id LEFT JOIN guests g ON g.id = e.guest_id"
            " WHERE m.network_id = ? AND m.mac = ?",
            network_id,
            mac,
        )
        if row is None:
            return None
        role, network, guest = row
        return f"guest {guest}" if role == "endpoint" else f"the {role} of network {network}"

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


def _endpoint(row: tuple[Any, ...]) -> EndpointRecord:
    """Of a row of `_ENDPOINTS`."""
    *_, addresses, aliases, mac = row
    return EndpointRecord(
        id=row[0],
        network_id=row[1],
        guest_id=row[2],
        interface_name=row[3],
        mac_address=mac,
        gateway_priority=row[4],
        created_at=_from_us(row[5]),
        active=bool(row[6]),
        addresses=tuple(address for _, address in sorted(json.loads(addresses))),
        aliases=tuple(alias for _, alias in sorted(json.loads(aliases))),
        static_addresses=tuple(json.loads(row[7])),
        static_mac=bool(row[8]),
        links=_pairs(row[9]),
        driver_options=json.loads(row[10]),
        names=tuple(json.loads(row[11])),
    )


def _guest(row: tuple[Any, ...]) -> GuestRecord:
    settings = json.loads(row[5])
    return GuestRecord(
        id=row[0],
        name=row[1],
        address=row[2],
        data_address=row[3],
        created_at=_from_us(row[4]),
        settings=GuestSettings(
            hostname=settings.get("hostname", ""),
            domainname=settings.get("domainname", ""),
            dns=tuple(settings.get("dns", ())),
            dns_search=tuple(settings.get("dns_search", ())),
            dns_options=tuple(settings.get("dns_options", ())),
            extra_hosts=tuple((name, address) for name, address in settings.get("extra_hosts", ())),
            card_mac=settings.get("card_mac", ""),
            card_qmp=settings.get("card_qmp", ""),
        ),
    )


def _container(row: tuple[Any, ...]) -> ContainerRecord:
    return ContainerRecord(
        id=row[0],
        name=row[1],
        created_at=_from_us(row[2]),
        config=json.loads(row[3]),
        state=json.loads(row[4]),
    )


def _to_json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _settings_to_json(settings: GuestSettings) -> str:
    given: Mapping[str, Any] = {name: value for name, value in dataclasses.asdict(settings).items() if value}
    return _to_json(given)


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, value) for name, value in json.loads(text))


def _subnet_to_list(subnet: SubnetRecord) -> list[Any]:
    return [
        subnet.family,
        subnet.subnet,
        subnet.gateway,
        subnet.ip_range,
        subnet.auxiliary,
        subnet.configured,
        subnet.gateway_given,
    ]


def _subnet_from_list(values: list[Any]) -> SubnetRecord:
    family, subnet, gateway, ip_range, auxiliary, configured, given = values
    return SubnetRecord(family, subnet, gateway, ip_range, tuple((n, a) for n, a in auxiliary), configured, given)


def _to_us(moment: datetime.datetime) -> int:
    return round(moment.timestamp() * 1_000_000)


def _from_us(value: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(value / 1_000_000, tz=datetime.UTC)
