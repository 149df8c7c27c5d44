"""Containers over Docker's API, with a runtime of pretended processes: their records, guests and ports."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from containers_support import IMAGE, ContainerRig, open_container_rig

from taploom.contracts.taploom.guest.v1 import GuestFeature
from taploom.rpc import RpcError, StatusCode


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[ContainerRig]:
    async with open_container_rig(tmp_path) as rig:
        yield rig


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_create_start_stop_remove(rig: ContainerRig) -> None:
    container_id = await rig.create("web", Hostname="h", Env=["B=2"])
    created = await rig.inspect("web")
    assert (created["State"]["Status"], created["Image"], created["Name"]) == ("created", IMAGE, "/web")
    assert created["Config"]["Env"] == ["B=2", "A=image"]
    assert created["Config"]["Labels"] == {"from": "image"}
    assert rig.runtime.calls == ["create"]

    assert (await rig.docker("POST", "/containers/web/start")).status == 204
    assert (await rig.docker("POST", "/containers/web/start")).status == 304
    running = await rig.inspect(container_id[:8])
    assert running["State"]["Running"]
    assert running["State"]["Pid"] == rig.runtime.containers[container_id].main.pid
    assert running["NetworkSettings"]["IPAddress"] == "172.17.0.2"
    assert running["NetworkSettings"]["Ports"] == {"80/tcp": None}
    spec = rig.runtime.containers[container_id].main.spec
    assert spec is not None
    assert set(spec.environment) >= {"HOSTNAME=h", "A=image", "B=2"}
    assert rig.fabric.desired.find_guest("web").id == container_id

    assert (await rig.docker("DELETE", "/containers/web")).status == 409
    assert (await rig.docker("POST", "/containers/web/stop")).status == 204
    assert (await rig.docker("POST", "/containers/web/stop")).status == 304
    stopped = await rig.inspect("web")
    assert (stopped["State"]["Status"], stopped["State"]["ExitCode"]) == ("exited", 143)
    assert stopped["NetworkSettings"]["IPAddress"] == ""
    assert rig.fabric.desired.guests() == []
    assert not rig.helper.endpoints
    assert (await rig.docker("DELETE", "/containers/web")).status == 204
    assert (await rig.docker("GET", "/containers/web/json")).status == 404
    assert not rig.runtime.containers


async def test_stop_kills_what_ignores_the_signal(rig: ContainerRig) -> None:
    container_id = await rig.run_container("web", "stubborn")
    assert (await rig.docker("POST", "/containers/web/stop?t=0")).status == 204
    assert (await rig.inspect("web"))["State"]["ExitCode"] == 137
    assert (await rig.docker("POST", "/containers/web/start")).status == 204
    process = rig.runtime.containers[container_id].main
    assert (await rig.docker("POST", "/containers/web/kill?signal=USR1")).status == 204
    assert process.signals == [10]
    assert (await rig.docker("POST", "/containers/web/kill")).status == 204
    answer = await rig.docker("POST", "/containers/web/kill")
    assert (answer.status, answer.message) == (
        409,
        f"Cannot kill container: web: Container {container_id} is not running",
    )


async def test_a_command_that_cannot_be_run_leaves_the_container_as_it_was(rig: ContainerRig) -> None:
    await rig.create("web", "nosuch")
    answer = await rig.docker("POST", "/containers/web/start")
    assert answer.status == 400
    assert 'exec: "nosuch": executable file not found in $PATH: unknown' in answer.message
    state = (await rig.inspect("web"))["State"]
    assert (state["Status"], state["ExitCode"], state["Error"]) == ("created", 127, answer.message)
    assert rig.fabric.desired.guests() == []
    assert not rig.helper.endpoints
    assert rig.runtime.named("web").booted is None
    assert rig.runtime.calls == ["create", "boot", "start", "halt"]


@pytest.mark.parametrize("call", ["boot", "start"])
async def test_a_runtime_that_fails_undoes_the_start(rig: ContainerRig, call: str) -> None:
    port = free_port()
    await rig.create(
        "web", ExposedPorts={"80/tcp": {}}, HostConfig={"PortBindings": {"80/tcp": [{"HostPort": str(port)}]}}
    )
    rig.runtime.fail[call] = RpcError(StatusCode.INTERNAL, "no memory")
    answer = await rig.docker("POST", "/containers/web/start")
    assert (answer.status, answer.message) == (500, "no memory")
    assert rig.fabric.desired.guests() == []
    rig.runtime.fail.clear()
    assert (await rig.docker("POST", "/containers/web/start")).status == 204


async def test_create_that_the_runtime_refuses_leaves_nothing(rig: ContainerRig) -> None:
    rig.runtime.fail["create"] = RpcError(StatusCode.UNAVAILABLE, "no space left on device")
    answer = await rig.docker("POST", "/containers/create?name=web", {"Image": "box", "Cmd": ["sleep"]})
    assert answer.status == 503
    rig.runtime.fail.clear()
    assert (await rig.docker("GET", "/containers/json?all=1")).value == []
    assert not rig.runtime.containers
    await rig.create("web")


async def test_names(rig: ContainerRig) -> None:
    first = await rig.create("web")
    answer = await rig.docker("POST", "/containers/create?name=web", {"Image": "box", "Cmd": ["sleep"]})
    assert answer.status == 409
    assert answer.message == (
        f'Conflict. The container name "/web" is already in use by container "{first}". You have to remove (or rename) '
        "that container to be able to reuse that name."
    )
    answer = await rig.docker("POST", "/containers/create", {"Image": "box", "Cmd": ["sleep"]})
    name = (await rig.inspect(answer.value["Id"]))["Name"]
    assert "_" in name
    assert (await rig.docker("POST", "/containers/web/rename?name=db")).status == 204
    await rig.run_container("web")
    # The guest's name is the container's, on its networks too.
    assert (await rig.docker("POST", "/containers/web/rename?name=web2")).status == 204
    assert rig.fabric.desired.find_guest("web2").name == "web2"
    answer = await rig.docker("POST", "/containers/web2/rename?name=db")
    assert answer.status == 409
    assert answer.message.startswith('Error when allocating new name: Conflict. The container name "/db"')
    assert (await rig.inspect("web2"))["Name"] == "/web2"


async def test_published_ports(rig: ContainerRig) -> None:
    port = free_port()
    host = {"PortBindings": {"80/tcp": [{"HostPort": str(port)}]}}
    await rig.run_container("web", HostConfig=host)
    ports = (await rig.inspect("web"))["NetworkSettings"]["Ports"]["80/tcp"]
    assert {"HostIp": "0.0.0.0", "HostPort": str(port)} in ports
    await rig.create("web2", HostConfig=host)
    answer = await rig.docker("POST", "/containers/web2/start")
    assert answer.status == 500
    assert "driver failed programming external connectivity on endpoint web2 (" in answer.message
    assert answer.message.endswith(f"Bind for 0.0.0.0:{port} failed: port is already allocated")
    # Refused before anything was booted.
    assert rig.runtime.calls.count("boot") == 1
    await rig.docker("POST", "/containers/web/stop")
    assert (await rig.docker("POST", "/containers/web2/start")).status == 204

    await rig.docker("POST", "/networks/bridge/disconnect", {"Container": "web2"})
    assert (await rig.inspect("web2"))["NetworkSettings"]["Ports"] == {}
    await rig.docker("POST", "/networks/create", {"Name": "app"})
    await rig.docker("POST", "/networks/app/connect", {"Container": "web2"})
    ports = (await rig.inspect("web2"))["NetworkSettings"]["Ports"]["80/tcp"]
    assert ports[0]["HostPort"] == str(port)


async def test_networks_of_running_and_stopped_containers(rig: ContainerRig) -> None:
    for name in ("app", "back"):
        await rig.docker("POST", "/networks/create", {"Name": name})
    container_id = await rig.run_container("web")
    answer = await rig.docker(
        "POST", "/networks/app/connect", {"Container": "web", "EndpointConfig": {"Aliases": ["www"]}}
    )
    assert answer.status == 200
    networks = (await rig.inspect("web"))["NetworkSettings"]["Networks"]
    assert networks["app"]["Aliases"] == ["www", container_id[:12]]
    assert networks["app"]["IPAddress"]
    await rig.docker("POST", "/containers/web/stop")
    assert (await rig.docker("POST", "/networks/back/connect", {"Container": "web"})).status == 200
    assert (await rig.docker("POST", "/networks/bridge/disconnect", {"Container": "web"})).status == 200
    await rig.docker("POST", "/containers/web/start")
    networks = (await rig.inspect("web"))["NetworkSettings"]["Networks"]
    assert sorted(networks) == ["app", "back"]
    assert all(endpoint["IPAddress"] for endpoint in networks.values())
    guest = rig.runtime.containers[container_id].guest
    assert guest is not None
    assert {one.network_name: one.name for one in guest.interfaces.values()} == {"app": "eth0", "back": "eth1"}


async def test_a_network_that_is_gone_stops_a_start(rig: ContainerRig) -> None:
    await rig.docker("POST", "/networks/create", {"Name": "app"})
    await rig.create("web", HostConfig={"NetworkMode": "app"})
    assert (await rig.docker("DELETE", "/networks/app")).status == 204
    answer = await rig.docker("POST", "/containers/web/start")
    assert (answer.status, answer.message) == (404, "network app not found")
    assert (await rig.inspect("web"))["State"]["Error"] == "network app not found"


async def test_several_networks_from_the_start(rig: ContainerRig) -> None:
    for name in ("app", "back"):
        await rig.docker("POST", "/networks/create", {"Name": name})
    body = {
        "Image": "box",
        "Cmd": ["sleep"],
        "HostConfig": {"NetworkMode": "back"},
        "NetworkingConfig": {"EndpointsConfig": {"app": {}, "back": {"Aliases": ["b"]}}},
    }
    answer = await rig.docker("POST", "/v1.43/containers/create?name=web", body)
    assert answer.message == "Container cannot be connected to network endpoints: app, back"
    assert (await rig.docker("POST", "/v1.44/containers/create?name=web", body)).status == 201
    assert (await rig.docker("POST", "/containers/web/start")).status == 204
    guest = rig.runtime.named("web").guest
    assert guest is not None
    assert {one.network_name: one.name for one in guest.interfaces.values()} == {"back": "eth0", "app": "eth1"}


async def test_a_network_over_the_interface_on_another(rig: ContainerRig) -> None:
    for name in ("base", "inner"):
        await rig.docker("POST", "/networks/create", {"Name": name})
    tagged = {"DriverOpts": {"taploom.vlan.parent": "base", "taploom.vlan.tag": "20"}}
    body = {
        "Image": "box",
        "Cmd": ["sleep"],
        "HostConfig": {"NetworkMode": "base"},
        "NetworkingConfig": {"EndpointsConfig": {"inner": tagged, "base": {}}},
    }
    assert (await rig.docker("POST", "/v1.44/containers/create?name=web", body)).status == 201

    async def is_there() -> None:
        guest = rig.runtime.named("web").guest
        assert guest is not None
        found = {one.network_name: one for one in guest.interfaces.values()}
        assert {name: one.name for name, one in found.items()} == {"base": "eth0", "inner": "eth0.20"}
        trunk = found["inner"].trunk_child
        assert trunk is not None
        assert (trunk.parent_endpoint_id, trunk.tag) == (found["base"].endpoint_id, 20)
        networks = (await rig.inspect("web"))["NetworkSettings"]["Networks"]
        assert networks["inner"]["DriverOpts"] == tagged["DriverOpts"]
        assert networks["inner"]["MacAddress"] == networks["base"]["MacAddress"]

    assert (await rig.docker("POST", "/containers/web/start")).status == 204
    await is_there()
    assert (await rig.docker("POST", "/networks/inner/disconnect", {"Container": "web"})).status == 200
    connect = {"Container": "web", "EndpointConfig": tagged}
    assert (await rig.docker("POST", "/networks/inner/connect", connect)).status == 200
    await is_there()
    # Where the agent in the container's VM cannot, nobody could.
    await rig.docker("POST", "/containers/web/stop")
    rig.runtime.guests_without.add(GuestFeature.VLAN)
    answer = await rig.docker("POST", "/containers/web/start")
    assert answer.status == 409
    assert "web on inner: the agent (version 0.1.0) makes no VLAN interfaces" in answer.message
    assert answer.message.endswith("(8021q): connect it without a tag")
    assert (await rig.docker("POST", "/networks/inner/disconnect", {"Container": "web"})).status == 200
    assert (await rig.docker("POST", "/containers/web/start")).status == 204
    assert (await rig.docker("POST", "/networks/inner/connect", connect)).status == 409
    assert list((await rig.inspect("web"))["NetworkSettings"]["Networks"]) == ["base"]


async def test_restart_policies(rig: ContainerRig) -> None:
    policy = {"RestartPolicy": {"Name": "on-failure", "MaximumRetryCount": 2}}
    await rig.run_container("web", "exit", "3", HostConfig=policy)
    await rig.until(lambda: not rig.manager.container("web").running)
    found = await rig.inspect("web")
    assert (found["RestartCount"], found["State"]["ExitCode"]) == (2, 3)
    assert rig.runtime.calls.count("boot") == 3

    await rig.run_container("db", HostConfig={"RestartPolicy": {"Name": "always"}})
    rig.runtime.end(rig.runtime.named("db"), 0)
    await rig.until(
        lambda: rig.manager.container("db").state["RestartCount"] == 1 and rig.manager.container("db").alive
    )
    assert (await rig.docker("POST", "/containers/db/stop")).status == 204
    assert not (await rig.inspect("db"))["State"]["Running"]


async def test_removal_after_the_end(rig: ContainerRig) -> None:
    await rig.create("web", "exit", "5", HostConfig={"AutoRemove": True})
    async with trio.open_nursery() as nursery:
        answers = []

        async def wait() -> None:
            answers.append(await rig.docker("POST", "/v1.41/containers/web/wait?condition=removed"))

        nursery.start_soon(wait)
        await rig.until(lambda: rig.manager.container("web").changed._lot)
        await rig.docker("POST", "/containers/web/start")
    assert answers[0].value == {"Error": None, "StatusCode": 5}
    assert (await rig.docker("GET", "/containers/web/json")).status == 404


async def test_wait_for_the_next_exit(rig: ContainerRig) -> None:
    await rig.create("web", "exit", "4")
    async with trio.open_nursery() as nursery:
        answers = []

        async def wait() -> None:
            answers.append(await rig.docker("POST", "/containers/web/wait?condition=next-exit"))

        nursery.start_soon(wait)
        await rig.until(lambda: rig.manager.container("web").changed._lot)
        await rig.docker("POST", "/containers/web/start")
    assert answers[0].value == {"StatusCode": 4}
    # It does not run: no wait at all.
    assert (await rig.docker("POST", "/containers/web/wait")).value == {"StatusCode": 4}


async def test_lists_and_filters(rig: ContainerRig) -> None:
    await rig.docker("POST", "/networks/create", {"Name": "app"})
    await rig.run_container("web", HostConfig={"NetworkMode": "app"}, Labels={"tier": "front"})
    await rig.run_container("db", "exit", "3")
    await rig.until(lambda: not rig.manager.container("db").running)
    await rig.create("idle")

    async def names(query: str = "", **filters: list[str]) -> list[str]:
        answer = await rig.docker("GET", f"/containers/json?{query}&filters={json.dumps(filters).replace(' ', '')}")
        assert answer.status == 200, answer.body
        return [one["Names"][0] for one in answer.value]

    assert await names() == ["/web"]
    assert await names("all=1") == ["/idle", "/db", "/web"]
    assert await names("limit=2") == ["/idle", "/db"]
    assert await names("all=1", network=["app"]) == ["/web"]
    assert await names(status=["exited"]) == ["/db"]
    assert await names("all=1", exited=["3"]) == ["/db"]
    assert await names("all=1", exited=["0"]) == []
    assert await names("all=1", label=["tier=front"]) == ["/web"]
    assert await names("all=1", label=["from=image"]) == ["/idle", "/db", "/web"]
    assert await names("all=1", before=["db"]) == ["/web"]
    assert await names("all=1", since=["db"]) == ["/idle"]
    assert await names("all=1", name=["^/?d"]) == ["/db"]
    assert await names("all=1", ancestor=["box"]) == ["/idle", "/db", "/web"]
    assert await names("all=1", expose=["70-90/tcp"]) == ["/idle", "/db", "/web"]
    assert await names("all=1", publish=["80"]) == []


async def test_plain_guests_are_containers_that_cannot_be_stopped(rig: ContainerRig, tmp_path: Path) -> None:
    from bridge_support import FakeGuest

    agent = FakeGuest(tmp_path / "vm")
    await rig.nursery.start(agent.run)
    await rig.fabric.register_guest("vm", agent.control)
    await rig.docker("POST", "/networks/create", {"Name": "app"})
    assert (await rig.docker("POST", "/networks/app/connect", {"Container": "vm"})).status == 200
    found = await rig.inspect("vm")
    assert found["State"]["Status"] == "running"
    assert found["NetworkSettings"]["Networks"]["app"]["IPAddress"] == "172.18.0.2"
    (listed,) = (await rig.docker("GET", "/containers/json")).value
    assert (listed["Image"], listed["State"]) == ("<none>", "running")
    for action in ("stop", "kill", "restart", "start"):
        assert (await rig.docker("POST", f"/containers/vm/{action}")).status == 501
    assert (await rig.docker("POST", "/networks/app/disconnect", {"Container": "vm"})).status == 200
    answer = await rig.docker("POST", "/containers/create?name=vm", {"Image": "box", "Cmd": ["sleep"]})
    assert answer.status == 409


async def test_events(rig: ContainerRig) -> None:
    actions: list[str] = []
    rig.manager.on_event = lambda kind, action, actor, attributes: actions.append(action)
    await rig.run_container("web", "exit", "3")
    await rig.until(lambda: not rig.manager.container("web").running)
    await rig.docker("DELETE", "/containers/web")
    assert actions == ["create", "start", "die", "destroy"]


async def test_links_on_the_default_bridge(rig: ContainerRig) -> None:
    await rig.create("db")
    await rig.create("web", HostConfig={"Links": ["db:data"]})
    assert (await rig.inspect("web"))["HostConfig"]["Links"] == ["/db:/web/data"]
    answer = await rig.docker("POST", "/containers/web/start")
    assert (answer.status, answer.message) == (500, "Cannot link to a non running container: /db AS /web/data")
    await rig.docker("POST", "/containers/db/start")
    assert (await rig.docker("POST", "/containers/web/start")).status == 204
    spec = rig.runtime.named("web").main.spec
    assert spec is not None
    assert {"DATA_PORT=tcp://172.17.0.2:80", "DATA_NAME=/web/data"} <= set(spec.environment)
    settings = rig.fabric.desired.find_guest("web").settings
    assert settings.extra_hosts == ((f"data {rig.manager.container('db').id[:12]} db", "172.17.0.2"),)


async def test_images(rig: ContainerRig) -> None:
    answer = await rig.docker("POST", "/images/create?fromSrc=-&repo=tool&tag=1", raw=b"x" * 2048)
    assert (answer.status, answer.value) == (200, {"status": IMAGE})
    answer = await rig.docker("POST", "/images/create?fromSrc=-&repo=tool&tag=1", raw=b"x")
    assert answer.status == 500
    answer = await rig.docker("POST", "/images/create?fromSrc=-&repo=tool&changes=FOO+x", raw=b"x" * 2048)
    assert (answer.status, answer.message) == (400, "unknown instruction: FOO")
    assert "tool:1" in (await rig.docker("GET", "/images/tool:1/json")).value["RepoTags"]
    answer = await rig.docker("GET", "/images/none/json")
    assert (answer.status, answer.message) == (404, "no such image: none: No such image: none:latest")
    answer = await rig.docker("POST", "/images/create?fromImage=alpine&tag=3")
    assert answer.status == 404
    assert "docker import" in answer.message
    assert (await rig.docker("POST", "/images/box/tag?repo=other&tag=2")).status == 201
    assert (await rig.docker("DELETE", "/images/other:2")).value == [{"Untagged": "other:2"}]
    # An image with a name stays.
    assert (await rig.docker("POST", "/images/prune")).value == {"ImagesDeleted": None, "SpaceReclaimed": 0}
    assert (await rig.docker("GET", "/images/tool:1/json")).status == 200
    answer = await rig.docker("POST", "/containers/create", {"Image": "none", "Cmd": ["sleep"]})
    assert (answer.status, answer.message) == (404, "No such image: none:latest")


async def test_concurrent_calls_on_one_container(rig: ContainerRig) -> None:
    await rig.create("web")
    statuses: list[int] = []

    async def call(method: str, path: str) -> None:
        statuses.append((await rig.docker(method, path)).status)

    async with trio.open_nursery() as nursery:
        for _ in range(6):
            nursery.start_soon(call, "POST", "/containers/web/start")
    assert sorted(statuses) == [204, *[304] * 5]
    statuses.clear()
    async with trio.open_nursery() as nursery:
        for _ in range(6):
            nursery.start_soon(call, "DELETE", "/containers/web?force=1")
    assert statuses.count(204) >= 1
    assert set(statuses) <= {204, 404, 409}
    assert not rig.runtime.containers
    assert rig.fabric.desired.guests() == []
