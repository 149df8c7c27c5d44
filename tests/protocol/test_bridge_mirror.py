"""Mirrors between the bridge and the helper: told as a whole, again when endpoints come and go, refused plainly."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from bridge_support import Rig, open_rig, unchanged
from test_bridge_fabric import connect, create, disconnect, refused, status

from taploom.contracts.taploom.bridge import v1 as bridge
from taploom.contracts.taploom.helper import v1 as helper
from taploom.rpc import RpcError, StatusCode


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path) as rig:
        yield rig


async def people(rig: Rig) -> tuple[bridge.Endpoint, bridge.Endpoint]:
    """web and db on app, ids on watch; returns web's and ids's places."""
    for network in ("app", "watch"):
        await create(rig, network)
    for name in ("web", "db", "ids"):
        await rig.guest(name)
    web, _ = await connect(rig, "app", "web"), await connect(rig, "app", "db")
    return web, await connect(rig, "watch", "ids")


def end(text: str) -> bridge.MirrorEnd:
    guest, _, network = text.partition("@")
    return bridge.MirrorEnd(guest=guest, network=network)


async def add(
    rig: Rig,
    source: str = "web",
    target: str = "ids",
    direction: bridge.MirrorDirection = bridge.MirrorDirection.UNSPECIFIED,
) -> bridge.AddMirrorResponse:
    mirror = bridge.Mirror(source=end(source), target=end(target), direction=direction)
    return await rig.mirrors.add_mirror(bridge.AddMirrorRequest(mirror=mirror))


async def remove(rig: Rig, source: str = "web", target: str = "ids") -> bridge.RemoveMirrorResponse:
    return await rig.mirrors.remove_mirror(bridge.RemoveMirrorRequest(source=end(source), target=end(target)))


async def listed(rig: Rig) -> list[tuple[str, str, str]]:
    found = (await rig.mirrors.list_mirrors(bridge.ListMirrorsRequest())).mirrors
    ends = [(one.source or end(""), one.target or end(""), one.direction.name or "") for one in found]
    return [(f"{s.guest}@{s.network}", way, f"{t.guest}@{t.network}") for s, t, way in ends]


def told(rig: Rig) -> dict[tuple[str, str], helper.MirrorDirection]:
    return {(one.source_endpoint_id, one.target_endpoint_id): one.direction for one in rig.helper.mirrors.mirrors}


async def test_told_and_told_again(rig: Rig) -> None:
    web, ids = await people(rig)
    assert told(rig) == {}
    done = await add(rig)
    assert done.pending == ""
    assert done.mirror is not None
    assert done.mirror.direction == bridge.MirrorDirection.BOTH
    assert told(rig) == {(web.id, ids.id): helper.MirrorDirection.UNSPECIFIED}
    await add(rig, "web@app", "ids@watch", bridge.MirrorDirection.OUT)
    assert told(rig) == {(web.id, ids.id): helper.MirrorDirection.OUT}
    await add(rig, "db", "ids", bridge.MirrorDirection.IN)
    assert await listed(rig) == [("db@app", "IN", "ids@watch"), ("web@app", "OUT", "ids@watch")]
    # A helper that knows nothing any more.
    await rig.helper.stop()
    rig.helper.mirrors = helper.Mirrors()
    await rig.nursery.start(rig.helper.run)
    await rig.until(lambda: len(told(rig)) == 2)
    await remove(rig, "db")
    assert list(told(rig)) == [(web.id, ids.id)]
    # They go with the connection; what connects again is another matter.
    await disconnect(rig, "watch", "ids")
    await rig.until(lambda: told(rig) == {})
    assert await listed(rig) == []
    await connect(rig, "watch", "ids")
    assert told(rig) == {}
    with refused(StatusCode.NOT_FOUND, "there is no mirror of web on app to ids on watch: 'taploom mirror ls' lists"):
        await remove(rig)


async def test_several_places(rig: Rig) -> None:
    await people(rig)
    await connect(rig, "app", "ids")
    with unchanged(rig), refused(StatusCode.INVALID_ARGUMENT, "guest ids is on networks app, watch: name the network"):
        await add(rig)
    await add(rig, "web", "ids@watch")
    await add(rig, "web", "ids@app")
    with unchanged(rig), refused(StatusCode.INVALID_ARGUMENT, "several mirrors that this may be (of web on app to ids"):
        await remove(rig)
    await remove(rig, "web", "ids@app")
    await remove(rig)
    assert await listed(rig) == []
    assert told(rig) == {}


async def test_refusals(rig: Rig) -> None:
    await people(rig)
    await add(rig)
    invalid, missing, state = StatusCode.INVALID_ARGUMENT, StatusCode.NOT_FOUND, StatusCode.FAILED_PRECONDITION
    with unchanged(rig):
        for source, target, code, reason in (
            ("web", "web", invalid, "web on app cannot be mirrored to itself"),
            ("", "ids", invalid, "name both"),
            ("web", "", invalid, "name both"),
            ("nobody", "ids", missing, "guest nobody not found"),
            ("web", "ids@app", state, "guest ids is not connected to network app"),
            ("web@nowhere", "ids", missing, "network nowhere not found"),
            ("ids", "db", state, "ids on watch receives copies, which would be copied again"),
            ("db", "web", state, "web on app is mirrored itself"),
        ):
            with refused(code, reason):
                await add(rig, source, target)
        with refused(invalid, "this direction is not known"):
            await add(rig, "db", "ids", bridge.MirrorDirection(9))
        with refused(missing, "guest nobody not found"):
            await remove(rig, "nobody")


async def test_an_old_helper(rig: Rig) -> None:
    await people(rig)
    await add(rig)
    await rig.helper.stop()
    rig.helper.features.remove(helper.HelperFeature.MIRRORS)
    rig.helper.mirrors = helper.Mirrors()
    rig.helper.version = "0.0.9"
    await rig.nursery.start(rig.helper.run)
    await rig.until(lambda: rig.fabric.helper.lacks(helper.HelperFeature.MIRRORS))
    text = "the helper (version 0.0.9) is too old to copy what guests send and receive: update it"
    with unchanged(rig), refused(StatusCode.FAILED_PRECONDITION, text):
        await add(rig, "db")
    assert (await rig.mirrors.list_mirrors(bridge.ListMirrorsRequest())).pending == text
    assert [one.reason for one in (await status(rig)).pending if one.subject == "the mirrors"] == [text]
    assert told(rig) == {}
    assert (await remove(rig)).pending == ""


async def test_a_helper_that_cannot(rig: Rig) -> None:
    web, ids = await people(rig)
    rig.helper.fail["ApplyMirrors"] = RpcError(StatusCode.FAILED_PRECONDITION, "the kernel has no such thing")
    assert "the kernel has no such thing" in (await add(rig)).pending
    assert "the kernel has no such thing" in (await rig.mirrors.list_mirrors(bridge.ListMirrorsRequest())).pending
    # Nobody is kept from connecting.
    await rig.guest("more")
    await connect(rig, "app", "more")
    del rig.helper.fail["ApplyMirrors"]
    await rig.until(lambda: list(told(rig)) == [(web.id, ids.id)])


async def test_recorded_while_the_helper_is_away(rig: Rig) -> None:
    web, ids = await people(rig)
    await rig.helper.stop()
    await rig.until(lambda: not rig.fabric.helper.connected)
    assert "helper" in (await add(rig)).pending
    await rig.nursery.start(rig.helper.run)
    await rig.until(lambda: list(told(rig)) == [(web.id, ids.id)])
