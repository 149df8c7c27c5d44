"""Database schemas (RFC 7047, 3.2): databases are created from them, and a client replicates a part of one.

Both without a program of OVS's: in a helper VM each start of one takes a tenth of a second or more.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Schema = dict[str, Any]
Record = dict[str, dict[str, dict[str, object]]]
"""A transaction in a database's file: rows by table and UUID, with the columns that differ from the default."""


def read_schema(file: Path) -> Schema:
    """The schema in a file such as vswitch.ovsschema."""
    schema: Schema = json.loads(file.read_bytes())
    return schema


def create_database(file: Path, schema: Schema, *records: Record) -> None:
    """Makes a standalone database, as `ovsdb-tool create`; with records, it has these transactions' rows.

    The file is a log whose first record is the schema (ovsdb(5), "Standalone Format"): for each record a header with
    its length in bytes and its SHA-1, and the record.

    Raises:
        FileExistsError: the file is there.
    """
    with file.open("xb") as database:
        for content in (schema, *records):
            record = json.dumps(content, separators=(",", ":")).encode() + b"\n"
            digest = hashlib.sha1(record, usedforsecurity=False).hexdigest()
            database.write(b"OVSDB JSON %d %s\n" % (len(record), digest.encode()) + record)


def part_of(schema: Schema, tables: Mapping[str, Iterable[str]]) -> Schema:
    """The schema with these tables and columns only, those of them that it has; the library takes as long to
    understand a column that nobody asks for as one that somebody does.

    A column that refers to a table which is left out has plain UUIDs.
    """
    found = {}
    for name, columns in tables.items():
        table = schema["tables"].get(name)
        if table is not None:
            kept = {c: _without_references(table["columns"][c], tables) for c in columns if c in table["columns"]}
            found[name] = {key: value for key, value in table.items() if key != "indexes"} | {"columns": kept}
    return {**schema, "tables": found}


def _without_references(column: Mapping[str, Any], tables: Mapping[str, Any]) -> dict[str, Any]:
    kind = column["type"]
    if not isinstance(kind, dict):
        return dict(column)
    changed = dict(kind)
    for side in ("key", "value"):
        base = kind.get(side)
        if isinstance(base, dict) and "refTable" in base and base["refTable"] not in tables:
            changed[side] = {key: value for key, value in base.items() if key not in {"refTable", "refType"}}
    return {**column, "type": changed}
