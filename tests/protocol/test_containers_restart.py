"""A bridge that is killed, a runtime that is started again: nothing acknowledged is lost, nothing is half-done."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from containers_support import ContainerRig, open_container_rig

from host_bridge.store import Store


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[ContainerRig]:
    async with open_container_rig(tmp_path) as rig:
        yield rig


async def call_and_kill(rig: ContainerRig, method: str, path: str, body: object = None, *, during: str) -> None:
    """Makes a request, and kills the bridge while the runtime's call is under way."""
    rig.runtime.hold[during] = trio.Event()

    async def request() -> None:
        # The bridge goes away under it, in whatever way.
        with contextlib.suppress(Exception):
            await rig.docker(method, path, body)

    calls = rig.runtime.calls.count(during)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(request)
        await rig.until(lambda: rig.runtime.calls.count(during) > calls)
        await rig.kill_bridge()
        nursery.cancel_scope.cancel()
    rig.runtime.hold.pop(during).set()


async def test_running_containers_are_taken_up(rig: ContainerRig) -> None:
    await rig.docker("POST", "/networks/create", {"Name": "app"})
    binding = {"80/tcp": [{"HostPort": ""}]}
    container_id = await rig.run_container("web", HostConfig={"PortBindings": binding})
    await rig.docker("POST", "/networks/app/connect", {"Container": "web", "EndpointConfig": {"Aliases": ["www"]}})
    before = await rig.inspect("web")
    port = int(before["NetworkSettings"]["Ports"]["80/tcp"][0]["HostPort"])
    await rig.kill_bridge()
    await rig.nursery.start(rig._bridge)
    # It is served from the first moment on, before the helper has been told anything.
    with trio.fail_after(60):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(b"early")
            assert await stream.receive_some() == b"early"
    assert [(one.address, one.port) for one in rig.helper.streams] == [("172.18.0.2", 80)]
    await rig.connected()
    after = await rig.inspect("web")
    assert after["State"] == before["State"]
    assert after["NetworkSettings"] == before["NetworkSettings"]
    assert rig.runtime.calls == ["create", "boot", "start"]
    assert (await rig.docker("POST", "/containers/web/stop")).status == 204
    assert not rig.runtime.containers[container_id].main.running


async def test_an_exit_while_no_bridge_is_there(rig: ContainerRig) -> None:
    await rig.run_container("web")
    await rig.run_container("again", HostConfig={"RestartPolicy": {"Name": "always"}})
    await rig.run_container("once", HostConfig={"AutoRemove": True})
    await rig.kill_bridge()
    for name in ("web", "again", "once"):
        rig.runtime.end(rig.runtime.named(name), 5)
    await rig.start_bridge()
    await rig.until(lambda: not rig.manager.container("web").running)
    state = (await rig.inspect("web"))["State"]
    assert (state["Status"], state["ExitCode"]) == ("exited", 5)
    await rig.until(lambda: rig.manager.container("again").alive)
    assert (await rig.inspect("again"))["RestartCount"] == 1
    await rig.until(lambda: len(rig.runtime.containers) == 2)
    assert [guest.name for guest in rig.fabric.desired.guests()] == ["again"]


@pytest.mark.parametrize("during", ["boot", "start"])
async def test_killed_during_a_start(rig: ContainerRig, during: str) -> None:
    await rig.docker("POST", "/networks/create", {"Name": "app"})
    container_id = await rig.create("web", HostConfig={"NetworkMode": "app"})
    await call_and_kill(rig, "POST", "/containers/web/start", during=during)
    await rig.start_bridge()
    await rig.until(lambda: not rig.manager.container("web").state["Phase"])
    await rig.until(lambda: rig.runtime.containers[container_id].booted is None)
    assert (await rig.inspect("web"))["State"]["Status"] == "created"
    assert rig.fabric.desired.guests() == []
    assert (await rig.docker("POST", "/containers/web/start")).status == 204
    assert (await rig.inspect("web"))["NetworkSettings"]["Networks"]["app"]["IPAddress"] == "172.18.0.2"


async def test_a_start_clears_what_a_killed_one_left(rig: ContainerRig) -> None:
    container_id = await rig.run_container("web")
    await rig.kill_bridge()
    # As if the bridge had been killed right before it noted that the process runs.
    with Store(rig.directory / "state") as store, store.change():
        (record,) = store.containers()
        state = record.state | {"Phase": "starting", "Running": False}
        store.update_container(dataclasses.replace(record, state=state))
    await rig.nursery.start(rig._bridge)
    assert (await rig.docker("POST", "/containers/web/start")).status == 204
    assert (await rig.inspect("web"))["NetworkSettings"]["IPAddress"] == "172.17.0.2"
    assert rig.runtime.containers[container_id].main.running


async def test_killed_during_a_creation(rig: ContainerRig) -> None:
    body = {"Image": "box", "Cmd": ["sleep"]}
    await call_and_kill(rig, "POST", "/containers/create?name=web", body, during="create")
    await rig.start_bridge()
    await rig.until(lambda: not rig.runtime.containers)
    assert (await rig.docker("GET", "/containers/json?all=1")).value == []
    await rig.create("web")


async def test_killed_during_a_removal(rig: ContainerRig) -> None:
    await rig.run_container("web")
    await call_and_kill(rig, "DELETE", "/containers/web?force=1", during="delete")
    await rig.start_bridge()
    await rig.until(lambda: not rig.runtime.containers)
    await rig.until(lambda: not rig.manager.containers())
    await rig.create("web")


async def test_a_runtime_that_was_started_again(rig: ContainerRig) -> None:
    await rig.run_container("web")
    await rig.run_container("always", HostConfig={"RestartPolicy": {"Name": "unless-stopped"}})
    rig.runtime.stop()
    await rig.until(lambda: not rig.manager.runtime.connected)  # type: ignore[union-attr]
    answer = await rig.docker("POST", "/containers/web/exec", {"Cmd": ["echo"]})
    assert answer.status == 201
    await rig.nursery.start(rig.runtime.run)
    await rig.until(lambda: not rig.manager.container("web").running)
    assert (await rig.inspect("web"))["State"]["ExitCode"] == 137
    await rig.until(lambda: rig.manager.container("always").alive)
    assert [guest.name for guest in rig.fabric.desired.guests()] == ["always"]


async def test_a_runtime_that_lost_its_disk(rig: ContainerRig) -> None:
    await rig.create("web")
    rig.runtime.containers.clear()
    assert (await rig.docker("POST", "/containers/web/start")).status == 204
    assert rig.runtime.calls == ["create", "boot", "create", "boot", "start"] or rig.runtime.calls[-1] == "start"


async def test_containers_that_nobody_knows_are_removed_from_the_runtime(rig: ContainerRig, tmp_path: Path) -> None:
    await rig.create("web")
    await rig.kill_bridge()
    (tmp_path / "state" / "bridge.db").unlink()
    for name in ("bridge.db-wal", "bridge.db-shm"):
        (tmp_path / "state" / name).unlink(missing_ok=True)
    await rig.start_bridge()
    await rig.until(lambda: not rig.runtime.containers)


async def test_changes_of_stopped_containers_survive(rig: ContainerRig) -> None:
    await rig.docker("POST", "/networks/create", {"Name": "app"})
    await rig.create("web")
    await rig.docker("POST", "/networks/app/connect", {"Container": "web", "EndpointConfig": {"Aliases": ["www"]}})
    await rig.docker("POST", "/containers/web/rename?name=front")
    before = await rig.inspect("front")
    await rig.kill_bridge()
    await rig.start_bridge()
    assert await rig.inspect("front") == before


async def test_without_runtime_there_is_a_clear_refusal(rig: ContainerRig) -> None:
    await rig.create("web")
    rig.manager.runtime = None
    answer = await rig.docker("POST", "/containers/create", {"Image": "box", "Cmd": ["sleep"]})
    assert answer.status == 501
    assert "--runtime" in answer.message
    assert len((await rig.docker("GET", "/containers/json?all=1")).value) == 1


async def test_a_removal_that_was_still_to_come(rig: ContainerRig) -> None:
    await rig.run_container("web", HostConfig={"AutoRemove": True})
    rig.runtime.hold["delete"] = trio.Event()
    rig.runtime.end(rig.runtime.named("web"), 0)
    await rig.until(lambda: "delete" in rig.runtime.calls)
    await rig.kill_bridge()
    # As if it had been killed before it noted that the container is to be removed.
    with Store(rig.directory / "state") as store, store.change():
        (record,) = store.containers()
        store.update_container(dataclasses.replace(record, state=record.state | {"Phase": ""}))
    rig.runtime.hold.pop("delete").set()
    await rig.start_bridge()
    await rig.until(lambda: not rig.manager.containers())
    assert not rig.runtime.containers


async def test_an_exec_that_ended_while_the_runtime_was_away(rig: ContainerRig) -> None:
    container_id = await rig.run_container("web")
    exec_id = (await rig.docker("POST", "/containers/web/exec", {"Cmd": ["sleep", "9"]})).value["Id"]
    assert (await rig.docker("POST", f"/exec/{exec_id}/start", {"Detach": True})).status == 200
    # The event is lost with the connection; the process and the container are the same when it is back.
    rig.runtime.lost_events = True
    rig.runtime.end(rig.runtime.containers[container_id], 0, exec_id)
    rig.runtime.hang_up()
    await rig.nursery.start(rig.runtime.run)
    await rig.until(lambda: not rig.manager.execs.get(exec_id).running)
    assert (await rig.inspect("web"))["State"]["Running"]


async def test_a_connect_that_was_written_by_half(rig: ContainerRig) -> None:
    await rig.docker("POST", "/networks/create", {"Name": "app"})
    await rig.docker("POST", "/networks/create", {"Name": "back"})
    await rig.run_container("web")
    await rig.docker("POST", "/networks/app/connect", {"Container": "web", "EndpointConfig": {"Aliases": ["www"]}})
    await rig.kill_bridge()
    # As if it had been killed between the two records of a connect, and of a disconnect.
    with Store(rig.directory / "state") as store, store.change():
        (record,) = store.containers()
        networks = dict(record.config["Networks"])
        networks["back"] = networks.pop("app")
        store.update_container(dataclasses.replace(record, config=record.config | {"Networks": networks}))
    await rig.start_bridge()
    networks = (await rig.inspect("web"))["NetworkSettings"]["Networks"]
    assert sorted(networks) == ["app", "bridge"]
    assert networks["app"]["Aliases"][0] == "www"
    assert (await rig.docker("POST", "/networks/back/connect", {"Container": "web"})).status == 200
    assert (await rig.docker("POST", "/networks/app/disconnect", {"Container": "web"})).status == 200


async def test_endpoints_that_came_by_the_own_api(rig: ContainerRig) -> None:
    await rig.docker("POST", "/networks/create", {"Name": "app"})
    await rig.run_container("web")
    await rig.fabric.connect("app", "web")
    await rig.until(lambda: "app" in rig.manager.container("web").networks)
    await rig.fabric.disconnect("bridge", "web")
    await rig.until(lambda: list(rig.manager.container("web").networks) == ["app"])
    await rig.docker("POST", "/containers/web/restart?t=0")
    assert sorted((await rig.inspect("web"))["NetworkSettings"]["Networks"]) == ["app"]
