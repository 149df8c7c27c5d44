"""GET /events: what is told, to whom, from when until when."""

from __future__ import annotations

import json
import time
import urllib.parse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import h11
import pytest
import trio
from docker_support import DockerRig, open_docker


class Listener:
    """A client of /events that reads as it comes."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._http = h11.Connection(h11.CLIENT)
        self._data = b""
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.ended = False

    async def begin(self, query: str) -> None:
        request = h11.Request(method="GET", target=f"/events?{query}", headers=[("Host", "docker")])
        await self._stream.send_all((self._http.send(request) or b"") + (self._http.send(h11.EndOfMessage()) or b""))
        while not self.status:
            await self._next()

    async def _next(self) -> None:
        event = self._http.next_event()
        if event is h11.NEED_DATA:
            self._http.receive_data(bytes(await self._stream.receive_some(65536)))
        elif isinstance(event, h11.Response):
            self.status, self.headers = event.status_code, dict(event.headers)
        elif isinstance(event, h11.Data):
            self._data += event.data
        elif isinstance(event, h11.EndOfMessage):
            self.ended = True

    async def event(self) -> Any:
        """The next event; None: the answer has ended."""
        with trio.fail_after(60):
            while b"\n" not in self._data and not self.ended:
                await self._next()
        line, _, self._data = self._data.partition(b"\n")
        return json.loads(line) if line else None


@asynccontextmanager
async def listening(rig: DockerRig, **query: str) -> AsyncIterator[Listener]:
    before = rig.api.events.listeners
    async with await trio.open_unix_socket(str(rig.docker.path)) as stream:
        listener = Listener(stream)
        await listener.begin(urllib.parse.urlencode(query))
        assert listener.status == 200
        yield listener
    with trio.fail_after(60):
        while rig.api.events.listeners != before:
            await trio.sleep(0.001)


async def test_what_happens_to_networks(tmp_path: Path) -> None:
    async with open_docker(tmp_path) as rig:
        await rig.rig.guest("web")
        guest = rig.rig.fabric.desired.find_guest("web")
        async with listening(rig) as listener:
            assert listener.headers[b"content-type"] == b"application/json"
            assert listener.headers[b"transfer-encoding"] == b"chunked"
            network_id = (await rig.docker("POST", "/networks/create", {"Name": "app"})).value["Id"]
            await rig.docker("POST", "/networks/app/connect", {"Container": "web"})
            await rig.docker("POST", "/networks/app/disconnect", {"Container": "web"})
            await rig.docker("DELETE", "/networks/app")
            await rig.docker("POST", "/networks/prune")
            events = [await listener.event() for _ in range(5)]
        attributes = {"name": "app", "type": "bridge"}
        connected = {"container": guest.id, **attributes}
        assert [(event["Action"], event["Actor"]) for event in events] == [
            ("create", {"ID": network_id, "Attributes": attributes}),
            ("connect", {"ID": network_id, "Attributes": connected}),
            ("disconnect", {"ID": network_id, "Attributes": connected}),
            ("destroy", {"ID": network_id, "Attributes": attributes}),
            ("prune", {"ID": "", "Attributes": {"reclaimed": "0"}}),
        ]
        for event in events:
            assert list(event) == ["Type", "Action", "Actor", "scope", "time", "timeNano"]
            assert (event["Type"], event["scope"]) == ("network", "local")
            assert event["timeNano"] // 10**9 == event["time"]


def told(rig: DockerRig) -> None:
    log = rig.api.events.log
    log("network", "create", "1" * 64, {"name": "app", "type": "bridge"})
    log("network", "connect", "1" * 64, {"name": "app", "type": "bridge", "container": "c" * 64})
    log("container", "start", "c" * 64, {"name": "web", "image": "repo/img:1", "tier": "front"})
    log("container", "exec_create: ls", "c" * 64, {"name": "web", "image": "repo/img:1"})
    log("image", "tag", "sha256:1", {"name": "repo/img:1"})


@pytest.mark.parametrize(
    ("filters", "actions"),
    [
        ({}, ["create", "connect", "start", "exec_create: ls", "tag"]),
        ({"type": ["network"]}, ["create", "connect"]),
        ({"type": ["network"], "event": ["connect"]}, ["connect"]),
        ({"event": ["exec_create"]}, ["exec_create: ls"]),
        ({"event": ["exec"]}, []),
        ({"network": ["app"]}, ["create", "connect"]),
        ({"network": ["1111"]}, ["create", "connect"]),
        ({"container": ["we"]}, ["start", "exec_create: ls"]),
        ({"label": ["tier=front"]}, ["start"]),
        ({"label": ["tier=back"]}, []),
        ({"image": ["repo/img"]}, ["start", "exec_create: ls", "tag"]),
        ({"scope": ["local"], "type": ["image"]}, ["tag"]),
        ({"scope": ["swarm"]}, []),
        ({"unknown": ["x"]}, ["create", "connect", "start", "exec_create: ls", "tag"]),
    ],
)
async def test_filters(tmp_path: Path, filters: dict[str, list[str]], actions: list[str]) -> None:
    async with open_docker(tmp_path) as rig:
        told(rig)
        query = urllib.parse.urlencode({"since": "0", "until": f"{time.time():.9f}", "filters": json.dumps(filters)})
        answer = await rig.docker("GET", f"/events?{query}")
        assert [json.loads(line)["Action"] for line in answer.body.splitlines()] == actions


async def test_containers_and_images_have_the_old_fields_too(tmp_path: Path) -> None:
    async with open_docker(tmp_path) as rig:
        told(rig)
        lines = (await rig.docker("GET", f"/events?since=0&until={time.time():.9f}")).body.splitlines()
        start, tag = json.loads(lines[2]), json.loads(lines[4])
        assert (start["status"], start["id"], start["from"]) == ("start", "c" * 64, "repo/img:1")
        assert (tag["status"], tag["id"]) == ("tag", "sha256:1") and "from" not in tag


async def test_since_goes_on_until_the_end(tmp_path: Path) -> None:
    async with open_docker(tmp_path) as rig:
        rig.api.events.log("network", "before", "1")
        since = time.time_ns() + 1
        while time.time_ns() <= since:
            await trio.lowlevel.checkpoint()
        rig.api.events.log("network", "past", "1")
        async with listening(
            rig, since=f"{since // 10**9}.{since % 10**9:09}", until=f"{time.time() + 1:.9f}"
        ) as listener:
            first = await listener.event()
            rig.api.events.log("network", "next", "1")
            second = await listener.event()
            assert [first["Action"], second["Action"]] == ["past", "next"]
            assert await listener.event() is None


async def test_the_last_are_kept(tmp_path: Path) -> None:
    async with open_docker(tmp_path) as rig:
        for number in range(300):
            rig.api.events.log("network", "create", str(number))
        lines = (await rig.docker("GET", f"/events?since=0&until={time.time():.9f}")).body.splitlines()
        assert [json.loads(line)["Actor"]["ID"] for line in lines] == [str(number) for number in range(44, 300)]


@pytest.mark.parametrize(
    ("query", "status", "message"),
    [
        ("since=abc", 500, 'strconv.ParseInt: parsing "abc": invalid syntax'),
        ("until=1.x", 500, 'strconv.ParseInt: parsing "x": invalid syntax'),
        ("since=5&until=1", 400, "`since` time (5) cannot be after `until` time (1)"),
        ("filters=x", 400, "invalid filter"),
    ],
)
async def test_what_cannot_be_asked(tmp_path: Path, query: str, status: int, message: str) -> None:
    async with open_docker(tmp_path) as rig:
        answer = await rig.docker("GET", f"/events?{query}")
        assert (answer.status, answer.message) == (status, message)
        assert rig.api.events.listeners == 0


async def test_a_listener_that_never_reads_holds_nobody_up(tmp_path: Path) -> None:
    async with open_docker(tmp_path) as rig, listening(rig), listening(rig) as reader:
        for number in range(20_000):
            rig.api.events.log("network", "create", str(number), {"name": "x" * 50})
            if number % 100 == 0:
                await trio.lowlevel.checkpoint()
                assert (await reader.event())["Actor"]["ID"]
        assert (await rig.docker("GET", "/_ping")).status == 200


async def test_a_client_that_half_closes_listens_no_more(tmp_path: Path) -> None:
    async with open_docker(tmp_path) as rig:
        answer = await rig.docker.raw(b"GET /events HTTP/1.1\r\nHost: docker\r\n\r\n", eof=True)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert rig.api.events.listeners == 0


async def test_the_real_cli(tmp_path: Path) -> None:
    async with open_docker(tmp_path) as rig:
        await rig.docker("POST", "/networks/create", {"Name": "app"})
        done = await rig.docker.cli(
            "events",
            "--since",
            "1h",
            "--until",
            str(int(time.time()) + 1),
            "--filter",
            "type=network",
            "--format",
            "{{.Action}} {{.Actor.ID}}",
        )
        network = (await rig.docker("GET", "/networks/app")).value
        assert done.stdout == f"create {network['Id']}"
