"""Captures between a caller, the bridge and the helper: passed on as they come, ended by either, refused plainly."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from bridge_support import Rig, open_rig
from test_bridge_fabric import connect, create, disconnect, refused

from taploom.contracts.taploom.bridge import v1 as bridge
from taploom.contracts.taploom.helper import v1 as helper
from taploom.rpc import RpcError, StatusCode


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path) as rig:
        yield rig


async def two_networks(rig: Rig) -> tuple[bridge.Endpoint, bridge.Endpoint]:
    """web on app and on lab."""
    await create(rig, "app")
    await create(rig, "lab")
    await rig.guest("web")
    return await connect(rig, "app", "web"), await connect(rig, "lab", "web")


async def captured(rig: Rig, *, stop: bool = False, **wanted: object) -> tuple[bytes, bridge.CaptureEnd]:
    """The bytes, and why there are no more. With `stop`, the caller ends it after the first of them."""
    data, end = b"", bridge.CaptureEnd.UNSPECIFIED
    with trio.fail_after(60):
        async with rig.captures.capture() as call:
            await call.send(bridge.CaptureRequest(**wanted))  # type: ignore[arg-type]
            async for part in call:
                data, end = data + part.data, part.end
                if stop:
                    await call.done_writing()
    return data, end


def asked(rig: Rig) -> helper.CaptureRequest:
    assert rig.helper.capture is not None
    return rig.helper.capture


async def test_the_helper_is_asked_for_what_was_wanted(rig: Rig) -> None:
    app, lab = await two_networks(rig)
    assert await captured(rig, stop=True, guest="web") == (b"packets and more", bridge.CaptureEnd.STOPPED)
    interfaces = {one.name: one.endpoint_id for one in asked(rig).interfaces}
    assert interfaces == {"web@app": app.id, "web@lab": lab.id}
    assert not asked(rig).filter
    rig.helper.capture_end = helper.CaptureEnd.COMPLETE
    wanted = {
        "guest": app.guest_id,
        "network": "lab",
        "filter": "tcp port 80",
        "snaplen": 96,
        "max_packets": 7,
        "max_duration_ms": 1500,
        "direction": bridge.CaptureDirection.OUT,
    }
    assert await captured(rig, **wanted) == (b"packets and more", bridge.CaptureEnd.COMPLETE)
    request = asked(rig)
    assert [one.name for one in request.interfaces] == ["web@lab"]
    assert request.filter[-1].code == 0x06, "a classic BPF program ends with a return"
    assert 96 in [one.k for one in request.filter if one.code == 0x06], "and keeps as much as is wanted"
    assert (request.filter_text, request.snaplen) == ("tcp port 80", 96)
    assert (request.max_packets, request.max_duration_ms) == (7, 1500)
    assert request.direction is helper.CaptureDirection.OUT


async def test_the_end_that_the_helper_says(rig: Rig) -> None:
    await two_networks(rig)
    rig.helper.capture_end = helper.CaptureEnd.GONE
    assert await captured(rig, guest="web") == (b"packets and more", bridge.CaptureEnd.GONE)


async def test_a_helper_that_ends_meanwhile(rig: Rig) -> None:
    await two_networks(rig)
    with trio.fail_after(60), refused(StatusCode.UNAVAILABLE, "the helper went away: "):
        async with rig.captures.capture() as call:
            await call.send(bridge.CaptureRequest(guest="web"))
            assert (await anext(aiter(call))).data == b"packets"
            await rig.helper.stop()
            async for _ in call:
                pass


async def test_the_helper_refuses(rig: Rig) -> None:
    await two_networks(rig)
    rig.helper.fail["Capture"] = RpcError(StatusCode.RESOURCE_EXHAUSTED, "16 captures are running")
    with refused(StatusCode.RESOURCE_EXHAUSTED, "16 captures are running"):
        await captured(rig, guest="web")


async def test_refusals(rig: Rig) -> None:
    await two_networks(rig)
    await rig.guest("lonely")
    for code, text, wanted in (
        (StatusCode.NOT_FOUND, "nosuch", {"guest": "nosuch"}),
        (StatusCode.NOT_FOUND, "nosuch", {"guest": "web", "network": "nosuch"}),
        (StatusCode.FAILED_PRECONDITION, "lonely is on no network: connect it first", {"guest": "lonely"}),
        (StatusCode.FAILED_PRECONDITION, "lonely is not connected to", {"guest": "lonely", "network": "app"}),
        (StatusCode.INVALID_ARGUMENT, "syntax error", {"guest": "web", "filter": "tcp prt 80"}),
        (StatusCode.INVALID_ARGUMENT, "update the bridge", {"guest": "web", "direction": 9}),
    ):
        with refused(code, text):
            await captured(rig, **wanted)
    with refused(StatusCode.INVALID_ARGUMENT, "nothing was said to capture"):
        async with rig.captures.capture() as call:
            await call.done_writing()
            async for _ in call:
                pass
    assert "Capture" not in rig.helper.calls
    await disconnect(rig, "lab", "web")
    with refused(StatusCode.FAILED_PRECONDITION, "web is not connected to"):
        await captured(rig, guest="web", network="lab")


async def test_a_helper_that_cannot_or_does_not_answer(rig: Rig) -> None:
    await two_networks(rig)
    rig.helper.features.remove(helper.HelperFeature.CAPTURE)
    await rig.helper.stop()
    await rig.until(lambda: not rig.fabric.helper.connected)
    with refused(StatusCode.UNAVAILABLE, "helper"):
        await captured(rig, guest="web")
    await rig.nursery.start(rig.helper.run)
    await rig.until(lambda: rig.fabric.helper.lacks(helper.HelperFeature.CAPTURE))
    with refused(StatusCode.FAILED_PRECONDITION, "too old to capture packets: update it"):
        await captured(rig, guest="web")
