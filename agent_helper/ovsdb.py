"""One OVSDB database, on trio: grouped transactions and a mirror of the columns that are waited for.

ovsdbapp's IDL (RFC 7047) runs in a thread of its own. Transactions are handed to it from worker threads; what it sees
is handed back to trio's loop with `TrioToken.run_sync_soon`, as plain values.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import trio
from ovs.db import idl as ovs_idl
from ovsdbapp import exceptions as ovsdb_exceptions
from ovsdbapp.backend.ovs_idl import command, connection, idlutils, transaction

from agent_helper import json_parser
from agent_helper.errors import HelperError, UnavailableError
from agent_helper.schemas import Schema, part_of
from taploom.patience import Patience

logger = logging.getLogger("taploom.helper.ovsdb")

T = TypeVar("T")
Row = Any  # ovs.db.idl.Row has a column per attribute; the library is untyped
Values = dict[str, Any]

json_parser.install()

# Reconnect delays in ms. The library's (1 s to 8 s) suit remote servers; ours is a child, back within milliseconds.
_BACKOFF_MIN, _BACKOFF_MAX = 10, 200
# Of a transaction, in seconds, over reconnections: the first, and the longest where processors are short.
_TIMEOUT, _LONGEST_TIMEOUT = 5.0, 60.0
_FIRST_CONTENT = 120.0  # s; an emulated machine that is short of processors takes tens of them


class Txn:
    """A transaction being built, in the IDL's thread."""

    def __init__(self, idl: Any, txn: Any) -> None:
        self._idl = idl
        self._txn = txn
        self._deleted: set[tuple[str, Any]] = set()
        self.counted = 0  # the value that `increment` has given to the column

    def rows(self, table: str) -> Iterable[Row]:
        """All rows of a table that the transaction has not deleted."""
        found = list(self._idl.tables[table].rows.values())
        return [row for row in found if (table, row.uuid) not in self._deleted]

    def only(self, table: str) -> Row:
        """The row of a table that has exactly one, or None while the database is empty."""
        return next(iter(self.rows(table)), None)

    def find(self, table: str, name: str) -> Row:
        """The row whose `name` it is, or None."""
        found = self._idl.tables[table]
        index_by_name(found)
        row = next(iter(idlutils.index_lookup_all(found, name=name)), None)
        return None if row is None or (table, row.uuid) in self._deleted else row

    def is_deleted(self, table: str, row: Row) -> bool:
        """Whether the transaction has deleted the row."""
        return (table, row.uuid) in self._deleted

    def insert(self, table: str, **columns: Any) -> Row:
        row = self._txn.insert(self._idl.tables[table])
        for column, value in columns.items():
            setattr(row, column, value)
        return row

    def ensure(self, table: str, name: str, **columns: Any) -> tuple[Row, bool]:
        """The row of that name with those columns, and whether it is new."""
        row = self.find(table, name)
        if row is None:
            return self.insert(table, name=name, **columns), True
        self.set(row, **columns)
        return row, False

    def set(self, row: Row, **columns: Any) -> None:
        """Writes the columns that differ."""
        for column, value in columns.items():
            if _plain(getattr(row, column)) != _plain(value):
                setattr(row, column, value)

    def delete(self, table: str, row: Row) -> None:
        self._deleted.add((table, row.uuid))
        row.delete()

    def has_column(self, table: str, column: str) -> bool:
        """Whether the running schema has that column; newer releases only add."""
        return table in self._idl.tables and column in self._idl.tables[table].columns

    def increment(self, row: Row, column: str) -> None:
        """Adds one to a counter, once in a transaction. (The IDL's own `increment` does nothing in a transaction that
        does nothing else.)"""
        if not self.counted:
            row.verify(column)
            self.counted = getattr(row, column, 0) + 1
            setattr(row, column, self.counted)


def index_by_name(table: Any) -> None:
    """Indexes a table's rows by `name`, unless they are. Before release 4.0 the library lost its indexes with the rows
    whenever it read a database anew."""
    if "name" not in table.rows.indexes:
        index = table.rows.index_create("name")
        index.add_columns("name")
        for row in table.rows.values():
            index.add(row)


def _plain(value: Any) -> Any:
    """A column's value in a form that compares: sets regardless of order, rows by their uuid."""
    if isinstance(value, dict):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return frozenset(_plain(v) for v in value)
    if isinstance(value, ovs_idl.Row):
        return value.uuid
    # An optional column with a value reads as a one-element list and is written as the bare value.
    return value if isinstance(value, dict) else frozenset([value])


class _Job:
    def __init__(self, op: Callable[[Txn], Any]) -> None:
        self.op = op
        self.done = False
        self.value: Any = None
        self.counted = 0
        self.error: Exception | None = None


class _Command(command.BaseCommand):  # type: ignore[misc]  # untyped library
    """Runs every job's operation in one transaction; run again from the start when the server says try again."""

    def __init__(self, api: _Api, jobs: list[_Job]) -> None:
        super().__init__(api)
        self.jobs = jobs
        self.counted = 0

    def run_idl(self, txn: Any) -> None:
        ours = Txn(self.api.idl, txn)
        for job in self.jobs:
            job.value = job.op(ours)
        self.counted = ours.counted

    def __str__(self) -> str:
        return f"{len(self.jobs)} operations"


class _Api:
    """The little of ovsdbapp's Backend that a transaction needs, without its class-wide connection."""

    def __init__(self, ovsdb_connection: Any) -> None:
        self.ovsdb_connection = ovsdb_connection

    @property
    def idl(self) -> Any:
        return self.ovsdb_connection.idl


class _Idl(connection.OvsdbIdl):  # type: ignore[misc]  # untyped library
    def __init__(self, remote: str, helper: Any, owner: Database) -> None:
        super().__init__(remote, helper)
        self._owner = owner
        self._dump_seqno: int | None = None
        self._session.reconnect.min_backoff = _BACKOFF_MIN
        self._session.reconnect.max_backoff = _BACKOFF_MAX

    def run(self) -> bool:
        changed: bool = super().run()
        # A new session that has its dump: rows that went while we were away were never announced.
        if self.state == self.IDL_S_MONITORING and self._dump_seqno != self._last_seqno:
            self._dump_seqno = self._last_seqno
            self._owner._dumped_in_thread()
        return changed

    def notify(self, event: str, row: Row, updates: Any = None) -> None:
        self._owner._changed_in_thread(event, row)


class Mirror:
    """The mirrored columns of one table, in trio's thread, keyed by `name` (or the uuid)."""

    def __init__(self) -> None:
        self.rows: dict[str, Values] = {}
        self._waiters: dict[str, list[trio.Event]] = {}

    async def wait(self, key: str, condition: Callable[[Values | None], bool]) -> Values | None:
        """Returns the row (None: not there) as soon as the condition holds of it."""
        while not condition(self.rows.get(key)):
            event = trio.Event()
            waiters = self._waiters.setdefault(key, [])
            waiters.append(event)
            try:
                await event.wait()
            finally:
                waiters.remove(event)
                if not waiters and self._waiters.get(key) is waiters:
                    del self._waiters[key]
        return self.rows.get(key)

    def put(self, key: str, values: Values | None) -> None:
        if values is None:
            self.rows.pop(key, None)
        else:
            self.rows[key] = values
        for event in self._waiters.get(key, ()):
            event.set()

    def reset(self, rows: dict[str, Values]) -> None:
        gone = self.rows.keys() - rows.keys()
        for key in gone:
            self.put(key, None)
        for key, values in rows.items():
            self.put(key, values)


class Database:
    """A connection to one database.

    Args:
        remote: where ovsdb-server listens, such as `unix:/run/x/db.sock`.
        schema: what the database was created from.
        tables: the tables and columns to replicate. Tables with a mandatory `name` column are indexed by it.
        mirror: the tables and columns to keep in `mirrors`.
        on_dump: called in trio's thread after each (re)connection, once the database's content is there, and after a
            transaction that was given up: when what is in the database may not be what was meant.
        on_change: called in trio's thread with (table, key, values or None) for each change of a mirrored table.
    """

    def __init__(
        self,
        remote: str,
        schema: Schema,
        *,
        tables: Mapping[str, list[str]],
        mirror: Mapping[str, list[str]],
        on_dump: Callable[[], None],
        on_change: Callable[[str, str, Values | None], None] | None = None,
    ) -> None:
        part = part_of(schema, tables)
        self.name: str = part["name"]
        helper = ovs_idl.SchemaHelper(schema_json=part)
        for table, content in part["tables"].items():
            helper.register_columns(table, list(content["columns"]))
        self._columns = mirror
        self._on_dump = on_dump
        self._on_change = on_change
        self._token = trio.lowlevel.current_trio_token()
        self.mirrors: dict[str, Mirror] = {table: Mirror() for table in mirror}
        self._idl = _Idl(remote, helper, self)
        for table in self._idl.tables.values():
            # A row inserted without the column that an index goes by would stay in it; ACLs need no name.
            if "name" in table.columns and table.columns["name"].type.n_min == 1:
                index_by_name(table)
        self._connection = connection.Connection(self._idl, timeout=_FIRST_CONTENT)
        self._api = _Api(self._connection)
        self._jobs: list[_Job] = []
        self._commit_lock = trio.Lock()
        self._patience = Patience(_TIMEOUT, _LONGEST_TIMEOUT)
        self._limiter = trio.CapacityLimiter(2)

    async def start(self) -> None:
        """Connects and waits for the content."""
        await trio.to_thread.run_sync(self._connection.start, limiter=self._limiter)
        self._connection.timeout = _TIMEOUT

    async def stop(self) -> None:
        """Ends the IDL's thread and closes the connection."""
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._connection.stop, 2.0, limiter=self._limiter)

    async def transact(self, op: Callable[[Txn], T]) -> T:
        """As `transact_counted`, without the count."""
        return (await self.transact_counted(op))[0]

    async def transact_counted(self, op: Callable[[Txn], T]) -> tuple[T, int]:
        """Runs the operation in a transaction, together with those of other tasks that wait at the same time.

        The operation runs in another thread, perhaps more than once, and must reach the same end state each time.

        Returns:
            What the operation returned, and the value that the transaction gave to the column that an operation
            in it incremented (0 when none did).

        Raises:
            UnavailableError: the server does not answer.
            Exception: whatever the operation raises; nothing was changed then.
        """
        job = _Job(op)
        self._jobs.append(job)
        try:
            async with self._commit_lock:
                if not job.done:
                    jobs, self._jobs = self._jobs, []
                    with trio.CancelScope(shield=True):
                        await self._commit(jobs)
        except trio.Cancelled:
            with contextlib.suppress(ValueError):
                self._jobs.remove(job)
            raise
        if job.error is not None:
            raise job.error
        return job.value, job.counted

    async def _commit(self, jobs: list[_Job]) -> None:
        try:
            await trio.to_thread.run_sync(self._commit_in_thread, jobs, limiter=self._limiter)
        except ovsdb_exceptions.TimeoutException:
            for job in jobs:
                job.done, job.error = True, UnavailableError(f"the {self.name} database does not answer; try again")
            self._on_dump()  # it may yet be done, when the server answers again
        except Exception as exc:
            if len(jobs) == 1:
                # The library's own errors are RuntimeErrors with the server's words.
                error = HelperError(f"the {self.name} database: {exc}") if isinstance(exc, RuntimeError) else exc
                jobs[0].done, jobs[0].error = True, error
            else:  # one is wrong: the others must not suffer
                for job in jobs:
                    await self._commit([job])
        else:
            for job in jobs:
                job.done = True

    def _commit_in_thread(self, jobs: list[_Job]) -> None:
        cmd = _Command(self._api, jobs)
        with self._patience.attempt(ovsdb_exceptions.TimeoutException) as within:
            txn = transaction.Transaction(self._api, self._connection, within, True, False)
            txn.add(cmd)
            txn.commit()
        for job in jobs:
            job.counted = cmd.counted

    # The IDL's thread from here on.

    def _values(self, row: Row) -> tuple[str, Values]:
        columns = self._columns[row._table.name]
        values = {column: getattr(row, column) for column in columns}
        return str(getattr(row, "name", None) or row.uuid), values

    def _dumped_in_thread(self) -> None:
        dump = {
            table: dict(self._values(row) for row in self._idl.tables[table].rows.values()) for table in self._columns
        }

        def hand_over() -> None:
            for table, rows in dump.items():
                self.mirrors[table].reset(rows)
            self._on_dump()

        self._hand_over(hand_over)

    def _changed_in_thread(self, event: str, row: Row) -> None:
        table = row._table.name
        if table not in self._columns:
            return
        key, found = self._values(row)
        values = None if event == ovs_idl.ROW_DELETE else found

        def hand_over() -> None:
            self.mirrors[table].put(key, values)
            if self._on_change is not None:
                self._on_change(table, key, values)

        self._hand_over(hand_over)

    def _hand_over(self, function: Callable[[], None]) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(function)
