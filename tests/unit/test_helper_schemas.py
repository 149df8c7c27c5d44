"""Schemas: databases made from them, and parts of them, are what OVS's own programs and library take."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import ovs.db.schema
import pytest

from agent_helper import daemons, stack
from agent_helper.schemas import Schema, create_database, part_of, read_schema

SCHEMA: Schema = {
    "name": "Test",
    "version": "1.0.0",
    "tables": {
        "A": {
            "isRoot": True,
            "indexes": [["name"], ["other"]],
            "columns": {
                "name": {"type": "string"},
                "other": {"type": "integer"},
                "bs": {"type": {"key": {"type": "uuid", "refTable": "B"}, "min": 0, "max": "unlimited"}},
                "cs": {"type": {"key": {"type": "uuid", "refTable": "C", "refType": "weak"}, "min": 0, "max": 5}},
            },
        },
        "B": {"columns": {"name": {"type": "string"}, "x": {"type": "real"}}},
        "C": {"columns": {"name": {"type": "string"}}},
    },
}


def test_a_part_has_what_was_asked_for_and_stands_alone() -> None:
    part = part_of(SCHEMA, {"A": ["bs", "cs", "newer"], "B": ["name"], "Newer": ["name"]})
    assert {name: list(table["columns"]) for name, table in part["tables"].items()} == {
        "A": ["bs", "cs"],
        "B": ["name"],
    }
    known = ovs.db.schema.DbSchema.from_json(part)
    assert known.tables["A"].columns["bs"].type.key.ref_table_name == "B"
    assert known.tables["A"].columns["cs"].type.key.ref_table_name is None
    assert "indexes" in SCHEMA["tables"]["A"]  # as it was


def test_a_database_is_a_log_that_begins_with_the_schema(tmp_path: Path) -> None:
    create_database(tmp_path / "a.db", SCHEMA)
    header, _, record = (tmp_path / "a.db").read_bytes().partition(b"\n")
    assert header.startswith(b"OVSDB JSON %d " % len(record))
    assert json.loads(record) == SCHEMA
    with pytest.raises(FileExistsError):
        create_database(tmp_path / "a.db", SCHEMA)


def test_a_database_has_the_rows_of_its_records(tmp_path: Path) -> None:
    one = "01234567-89ab-4cde-a123-456789abcdef"
    create_database(tmp_path / "a.db", SCHEMA, {"A": {one: {"name": "a"}}})
    done = subprocess.run(
        ["ovsdb-tool", "query", tmp_path / "a.db", '["Test", {"op": "select", "table": "A", "where": []}]'],
        capture_output=True,
        check=True,
    )
    (row,) = json.loads(done.stdout)[0]["rows"]
    assert (row["name"], row["_uuid"]) == ("a", ["uuid", one])


@pytest.mark.parametrize("tables", [stack._CONF_TABLES, stack._NB_TABLES, stack._SB_TABLES])
def test_tables_refer_to_what_is_replicated_too(tables: dict[str, list[str]]) -> None:
    """Of rows that are not replicated only the UUID is known: not what the agent works with."""
    files = {**{key: Path("/usr/share") / file for key, (file, _) in daemons.SCHEMAS.items()}}
    present = [read_schema(file) for file in files.values() if file.exists()]
    for schema in present:
        if set(tables) <= set(schema["tables"]):
            part = part_of(schema, tables)
            for name, table in part["tables"].items():
                for column in table["columns"]:
                    assert "refTable" in json.dumps(table["columns"][column]) or "refTable" not in json.dumps(
                        schema["tables"][name]["columns"][column]
                    )
