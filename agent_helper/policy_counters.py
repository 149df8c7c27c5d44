"""What rules have done: the counters of the flows that they became.

A rule is an ACL; northd makes logical flows of it whose `stage-hint` is the beginning of the ACL's uuid; ovn-controller
makes OpenFlow flows of these whose cookie is the beginning of the logical flow's uuid (ovn-sb(5), Logical_Flow). They
are asked for when somebody looks: the logical flows by one transaction of RFC 7047, the counters by aggregate requests
of OpenFlow 1.3 (7.3.5.3). The agent does not replicate the table of logical flows, which has thousands of rows.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import trio

from agent_helper.errors import UnavailableError

_TIMEOUT = 5.0
# As northd of 23.03 calls the stages, and of 23.06 and later.
_STAGES = ("ls_in_acl", "ls_in_acl_eval", "ls_out_acl", "ls_out_acl_eval")
_VERSION = 4  # OpenFlow 1.3
_HELLO, _ERROR, _ECHO_REQUEST, _ECHO_REPLY, _MULTIPART_REQUEST, _MULTIPART_REPLY = 0, 1, 2, 3, 18, 19
_AGGREGATE = 2
_HEADER = struct.Struct("!BBHI")
_REQUEST = struct.Struct("!HH4xB3xII4xQQHH4x")
_REPLY = struct.Struct("!HH4xQQI4x")
_ANY = 0xFFFFFFFF
# In one write; vswitchd answers them in order.
_AT_ONCE = 200


async def read_counters(db_socket: Path, mgmt: Path, acls: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    """Packets and bytes of each rule.

    Args:
        db_socket: ovsdb-server's.
        mgmt: where the integration bridge takes OpenFlow connections.
        acls: rules' ids and their ACLs' uuids.

    Raises:
        UnavailableError: a daemon does not answer.
    """
    try:
        with trio.fail_after(_TIMEOUT):
            cookies = await _cookies(db_socket)
            wanted = {rule_id: cookies.get(uuid[:8], ()) for rule_id, uuid in acls.items()}
            counted = await _aggregates(mgmt, sorted({cookie for found in wanted.values() for cookie in found}))
    except (OSError, trio.TooSlowError, trio.BrokenResourceError, ValueError) as exc:
        raise UnavailableError(f"the counters cannot be read now ({exc}); try again") from exc
    return {
        rule_id: (sum(counted[c][0] for c in found), sum(counted[c][1] for c in found))
        for rule_id, found in wanted.items()
    }


async def _cookies(db_socket: Path) -> dict[str, list[int]]:
    """The cookies of the flows of each ACL, by the first eight digits of its uuid."""
    operations = [
        {
            "op": "select",
            "table": "Logical_Flow",
            "where": [["external_ids", "includes", ["map", [["stage-name", stage]]]]],
            "columns": ["_uuid", "external_ids"],
        }
        for stage in _STAGES
    ]
    request = {"method": "transact", "params": ["OVN_Southbound", *operations], "id": 1}
    stream = await trio.open_unix_socket(str(db_socket))
    async with stream:
        await stream.send_all(json.dumps(request).encode())
        reply = await _answer(stream)
    cookies: dict[str, list[int]] = {}
    for result in reply:
        for row in result["rows"]:
            ids = dict(row["external_ids"][1])
            if "stage-hint" in ids:
                cookies.setdefault(ids["stage-hint"], []).append(int(row["_uuid"][1][:8], 16))
    return cookies


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


async def _aggregates(mgmt: Path, cookies: Iterable[int]) -> dict[int, tuple[int, int]]:
    """Packets and bytes of all flows with each cookie."""
    counted: dict[int, tuple[int, int]] = {}
    todo = list(cookies)
    if not todo:
        return counted
    async with await trio.open_unix_socket(str(mgmt)) as stream:
        messages = _Messages(stream)
        await stream.send_all(_HEADER.pack(_VERSION, _HELLO, _HEADER.size, 0))
        while todo:
            group, todo = todo[:_AT_ONCE], todo[_AT_ONCE:]
            asked = dict(enumerate(group, 1))
            await stream.send_all(b"".join(_request(xid, cookie) for xid, cookie in asked.items()))
            while asked:
                kind, xid, body = await messages.next()
                if kind == _ECHO_REQUEST:
                    await stream.send_all(_HEADER.pack(_VERSION, _ECHO_REPLY, _HEADER.size + len(body), xid) + body)
                elif kind == _ERROR:
                    raise ValueError(f"ovs-vswitchd refused with OpenFlow error {body[:4].hex()}")
                elif kind == _MULTIPART_REPLY and xid in asked:
                    _, _, packets, octets, _ = _REPLY.unpack_from(body)
                    counted[asked.pop(xid)] = packets, octets
    return counted


def _request(xid: int, cookie: int) -> bytes:
    # Every table, port and group; the cookie's lower 32 bits are ovn-controller's, the others are 0; no match.
    body = _REQUEST.pack(_AGGREGATE, 0, 0xFF, _ANY, _ANY, cookie, 0xFFFFFFFFFFFFFFFF, 1, 4)
    return _HEADER.pack(_VERSION, _MULTIPART_REQUEST, _HEADER.size + len(body), xid) + body


class _Messages:
    """OpenFlow messages from a stream."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._data = bytearray()

    async def next(self) -> tuple[int, int, bytes]:
        """Type, transaction id and body of the next one."""
        await self._fill(_HEADER.size)
        _, kind, length, xid = _HEADER.unpack_from(self._data)
        if length < _HEADER.size:
            raise ValueError("ovs-vswitchd does not speak OpenFlow")
        await self._fill(length)
        body = bytes(self._data[_HEADER.size : length])
        del self._data[:length]
        return kind, xid, body

    async def _fill(self, size: int) -> None:
        while len(self._data) < size:
            chunk = await self._stream.receive_some(65536)
            if not chunk:
                raise ValueError("ovs-vswitchd closed the connection")
            self._data += chunk
