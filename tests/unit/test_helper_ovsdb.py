"""Rows are found by name whatever the OVSDB library has done with its indexes."""

from __future__ import annotations

from types import SimpleNamespace

import ovs.db.schema
from ovs.db import custom_index
from ovsdbapp.backend.ovs_idl import idlutils

from agent_helper.ovsdb import index_by_name


def test_an_index_that_was_lost_with_the_rows_is_made_anew() -> None:
    schema = ovs.db.schema.DbSchema.from_json(
        {"name": "Test", "version": "1.0.0", "tables": {"A": {"columns": {"name": {"type": "string"}}}}}
    )
    table = schema.tables["A"]
    for _ in range(2):
        table.rows = custom_index.IndexedRows(table)  # as ovs.db.idl did on each reconnection until 4.0
        for number in range(3):
            table.rows[number] = SimpleNamespace(uuid=number, name=f"row{number}", _table=table)
        index_by_name(table)
        index_by_name(table)
        assert [row.uuid for row in idlutils.index_lookup_all(table, name="row1")] == [1]
        assert not list(idlutils.index_lookup_all(table, name="row9"))
