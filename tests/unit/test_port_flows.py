"""Flow monitors: the bytes that vswitchd sends, and what may come instead."""

from __future__ import annotations

import struct
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from agent_helper.openflow import Connection
from agent_helper.port_flows import PortFlows, request, updates

ADDED, DELETED, MODIFIED, ABBREVIATED = 0, 1, 2, 3


def update(event: int, port: int, *, table: int = 0, more: bytes = b"", actions: bytes = b"") -> bytes:
    """What is sent of a flow whose match is `in_port` and, should there be one, more (nicira-ext.h)."""
    match = struct.pack("!IH", 0x2, port) + more
    body = match + bytes(-len(match) % 8) + actions
    return struct.pack("!HHHHHHHBxQ", 24 + len(body), event, 0, 100, 0, 0, len(match), table, 0xAD731DDD) + body


def reply(*entries: bytes, vendor: int = 0x2320, subtype: int = 2) -> bytes:
    return struct.pack("!HHIII", 0xFFFF, 0, vendor, subtype, 0) + b"".join(entries)


def test_request() -> None:
    # struct nicira10_stats_msg less its header, struct nx_flow_monitor_request
    assert request().hex() == "ffff0000000023200000000200000000000000010007ffff0000000000000000"


def test_updates() -> None:
    tagged = struct.pack("!IHH", 0x0904, 0x1014, 0x1FFF)
    body = reply(
        update(ADDED, 7),
        update(ADDED, 8, actions=bytes(64)),
        update(DELETED, 7),
        update(MODIFIED, 8),
        update(ADDED, 9, more=tagged),
        update(ADDED, 10, table=65),
        struct.pack("!HHI", 8, ABBREVIATED, 0x1234),
        struct.pack("!HHHHHHHBxQ", 24, ADDED, 0, 0, 0, 0, 0, 0, 0),
        update(ADDED, 11),
    )
    assert list(updates(body)) == [(7, True), (8, True), (7, False), (11, True)]


@pytest.mark.parametrize("other", [reply(update(ADDED, 7), vendor=1), reply(update(ADDED, 7), subtype=0)])
def test_other_replies_are_passed_over(other: bytes) -> None:
    assert list(updates(other)) == []


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        reply()[:-1],
        reply(b"\0"),
        reply(struct.pack("!HHI", 0, ADDED, 0)),
        reply(struct.pack("!HHI", 400, ADDED, 0)),
        reply(struct.pack("!HHI", 8, ADDED, 0)),
        reply(struct.pack("!HHHHHHHBxQ", 24, ADDED, 0, 0, 0, 0, 6, 0, 0)),
    ],
)
def test_damaged_replies_are_refused(bad: bytes) -> None:
    with pytest.raises(ValueError, match="flow monitor's reply"):
        list(updates(bad))


@given(st.lists(st.tuples(st.sampled_from([ADDED, DELETED]), st.integers(1, 0xFEFF)), max_size=20), st.data())
def test_any_updates(changes: list[tuple[int, int]], data: st.DataObject) -> None:
    entries = [update(event, port, actions=bytes(8 * data.draw(st.integers(0, 3)))) for event, port in changes]
    assert list(updates(reply(*entries))) == [(port, event == ADDED) for event, port in changes]


@given(st.binary(max_size=120))
def test_any_bytes(tail: bytes) -> None:
    for body in (tail, reply(tail)):
        try:
            found = list(updates(body))
        except ValueError:
            continue
        assert all(0 <= port <= 0xFFFF for port, _ in found)


def message(kind: int, body: bytes = b"", xid: int = 5, version: int = 1) -> bytes:
    return struct.pack("!BBHI", version, kind, 8 + len(body), xid) + body


@given(st.integers(1, 40))
def test_messages_in_pieces(size: int) -> None:
    async def main() -> None:
        ours, theirs = trio.testing.memory_stream_pair()
        connection = Connection(ours, 1)
        sent = message(0) + message(2, b"there?", xid=9) + message(17, b"x" * 30)
        async with trio.open_nursery() as nursery:
            for at in range(0, len(sent), size):
                nursery.start_soon(theirs.send_all, sent[at : at + size])
                await trio.testing.wait_all_tasks_blocked()
            assert await connection.next() == (0, 5, b"")
            assert await connection.next() == (17, 5, b"x" * 30)
        assert await theirs.receive_some() == message(3, b"there?", xid=9)

    trio.run(main)


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (message(1, b"\0\1\0\2rest"), "refused with OpenFlow error 00010002"),
        (b"HTTP/1.1 400 Bad Request\r\n", "closed the connection"),
        (b"\1\0\0\0\0\0\0\0", "does not speak OpenFlow"),
        (b"", "closed the connection"),
    ],
)
async def test_what_is_no_answer(sent: bytes, reason: str) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    await theirs.send_all(sent)
    await theirs.send_eof()
    with pytest.raises(ValueError, match=reason):
        await Connection(ours, 1).next()


async def test_who_waits_is_told(tmp_path: Path, nursery: trio.Nursery) -> None:
    mgmt = tmp_path / "br.mgmt"
    asked, streams = trio.Event(), list[trio.SocketStream]()

    async def serve(stream: trio.SocketStream) -> None:
        streams.append(stream)
        await stream.send_all(message(0) + message(17, reply(update(ADDED, 3))))
        asked.set()
        async for _ in stream:
            pass

    with trio.socket.socket(trio.socket.AF_UNIX) as sock:
        await sock.bind(str(mgmt))
        sock.listen()
        await nursery.start(partial(trio.serve_listeners, serve, [trio.SocketListener(sock)]))
        flows = PortFlows(mgmt)
        nursery.start_soon(flows.run)
        with trio.fail_after(60):
            await flows.wait(3)
            assert not flows.has(4)
            nursery.start_soon(streams[0].send_all, message(17, reply(update(ADDED, 4), update(DELETED, 3)), xid=0))
            await flows.wait(4)
            assert not flows.has(3)
            # Another vswitchd has the flows that it tells itself.
            asked = trio.Event()
            await streams[0].send_eof()
            await asked.wait()
            await flows.wait(3)
            assert not flows.has(4)
        nursery.cancel_scope.cancel()
