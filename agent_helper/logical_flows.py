"""Which logical flows northd has made of rows of the northbound database (ovn-sb(5), Logical_Flow).

They are asked for when somebody looks, by one transaction of RFC 7047: the agent does not replicate the table, which
has thousands of rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import trio


async def flows_of(db_socket: Path, stages: Iterable[str]) -> dict[str, list[str]]:
    """The uuids of the logical flows in some stages, by the first eight digits of the uuid of the row that each is made
    from (its `stage-hint`).

    Args:
        db_socket: ovsdb-server's.

    Raises:
        OSError, trio.BrokenResourceError: it does not answer.
        ValueError: it refuses.
    """
    operations = [
        {
            "op": "select",
            "table": "Logical_Flow",
            "where": [["external_ids", "includes", ["map", [["stage-name", stage]]]]],
            "columns": ["_uuid", "external_ids"],
        }
        for stage in stages
    ]
    request = {"method": "transact", "params": ["OVN_Southbound", *operations], "id": 1}
    async with await trio.open_unix_socket(str(db_socket)) as stream:
        await stream.send_all(json.dumps(request).encode())
        reply = await _answer(stream)
    found: dict[str, list[str]] = {}
    for result in reply:
        for row in result["rows"]:
            ids = dict(row["external_ids"][1])
            if "stage-hint" in ids:
                found.setdefault(ids["stage-hint"], []).append(row["_uuid"][1])
    return found


async def _answer(stream: trio.SocketStream) -> list[dict[str, Any]]:
    data = bytearray()
    async for chunk in stream:
        data += chunk
        # The answer is one object, and megabytes may come in pieces: it is parsed when it may be whole.
        if chunk.rstrip().endswith(b"}"):
            try:
                message = json.loads(data)
            except ValueError:
                continue
            if not isinstance(message.get("result"), list):
                raise ValueError(f"ovsdb-server answers {str(message.get('error'))[:200]}")
            return [result for result in message["result"] if result]
    raise ValueError("ovsdb-server closed the connection")
