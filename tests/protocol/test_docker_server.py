"""The server itself: HTTP, versions, errors, and the real docker CLI."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trio
from docker_support import open_docker

from host_bridge.docker_api.absent import NO_SWARM
from host_bridge.docker_api.http import RAW_STREAM, Hijack, Request, Response


async def test_ping_says_what_clients_negotiate_with(tmp_path: Path) -> None:
    async with open_docker(tmp_path) as rig:
        for path in ("/_ping", "/v1.24/_ping", "/v1.51/_ping"):
            answer = await rig.docker("GET", path)
            assert (answer.status, answer.body) == (200, b"OK")
            assert answer.headers["api-version"] == "1.51"
            assert answer.headers["ostype"] == "linux"
            assert answer.headers["server"].startswith("Docker/")
            assert answer.headers["swarm"] == "inactive"
            assert answer.headers["cache-control"] == "no-cache, no-store, must-revalidate"
        head = await rig.docker("HEAD", "/_ping")
        assert (head.status, head.body, head.headers["content-length"]) == (200, b"", "0")


async def test_version_and_info(tmp_path: Path) -> None:
    async with open_docker(tmp_path) as rig:
        version = (await rig.docker("GET", "/version")).value
        assert (version["ApiVersion"], version["MinAPIVersion"], version["Os"]) == ("1.51", "1.24", "linux")
        info = (await rig.docker("GET", "/info")).value
        assert info["OSType"] == "linux" and info["Swarm"]["LocalNodeState"] == "inactive"
        assert "BridgeNfIptables" in (await rig.docker("GET", "/v1.41/info")).value
        assert "BridgeNfIptables" not in info


async def test_disk_usage(tmp_path: Path) -> None:
    async with open_docker(tmp_path) as rig:
        await rig.rig.guest("web")
        value = (await rig.docker("GET", "/system/df")).value
        assert [one["Names"] for one in value["Containers"]] == [["/web"]]
        assert (value["Images"], value["Volumes"], value["LayersSize"]) == ([], [], 0)
        assert (await rig.docker("GET", "/system/df?type=image")).value["Containers"] is None
        assert (await rig.docker("GET", "/system/df?type=x")).message == "unknown object type: x"
        assert "web" not in (await rig.docker.cli("system", "df", "-v")).stderr


@pytest.mark.parametrize("version", ["1.10", "1.23", "1", "0.9"])
async def test_old_clients_are_told_in_plain_text(tmp_path: Path, version: str) -> None:
    async with open_docker(tmp_path) as rig:
        answer = await rig.docker("GET", f"/v{version}/version")
        assert answer.status == 400
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
        assert answer.body.decode() == (
            f"client version {version} is too old. Minimum supported API version is 1.24, "
            "please upgrade your client to a newer version\n"
        )


@pytest.mark.parametrize("version", ["1.52", "2.0", "1.51.1"])
async def test_new_clients_are_told_in_json(tmp_path: Path, version: str) -> None:
    async with open_docker(tmp_path) as rig:
        answer = await rig.docker("GET", f"/v{version}/version")
        assert answer.status == 400
        assert answer.message == f"client version {version} is too new. Maximum supported API version is 1.51"


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/nowhere"), ("GET", "/v1.41/nowhere"), ("GET", "/_ping/"), ("PUT", "/version"), ("GET", "/v/version")],
)
async def test_unknown_routes(tmp_path: Path, method: str, path: str) -> None:
    async with open_docker(tmp_path) as rig:
        answer = await rig.docker(method, path)
        assert (answer.status, answer.message) == (404, "page not found")


@pytest.mark.parametrize(("path", "clean"), [("//version", "/version"), ("/v1.41//version/../info", "/v1.41/info")])
async def test_paths_are_cleaned_by_redirection(tmp_path: Path, path: str, clean: str) -> None:
    async with open_docker(tmp_path) as rig:
        answer = await rig.docker("GET", path)
        assert (answer.status, answer.headers["location"]) == (301, clean)


async def test_the_real_cli(tmp_path: Path) -> None:
    async with open_docker(tmp_path) as rig:
        version = await rig.docker.cli("version", "--format", "{{.Server.APIVersion}} {{.Client.APIVersion}}")
        assert version.stdout.split()[0] == "1.51"
        info = await rig.docker.cli("info", "--format", "{{json .}}")
        assert json.loads(info.stdout)["OSType"] == "linux"


@pytest.mark.parametrize(
    ("method", "path", "status", "told"),
    [
        ("GET", "/volumes", 200, {"Volumes": [], "Warnings": None}),
        ("GET", "/volumes/x", 404, {"message": "get x: no such volume"}),
        ("POST", "/volumes/prune", 200, {"VolumesDeleted": [], "SpaceReclaimed": 0}),
        ("GET", "/plugins", 200, []),
        ("POST", "/build/prune", 200, {"CachesDeleted": None, "SpaceReclaimed": 0}),
        ("GET", "/nodes", 503, {"message": NO_SWARM}),
        ("GET", "/services/x", 503, {"message": NO_SWARM}),
        ("POST", "/swarm/leave", 503, {"message": "This node is not part of a swarm"}),
    ],
)
async def test_what_there_is_none_of(tmp_path: Path, method: str, path: str, status: int, told: object) -> None:
    async with open_docker(tmp_path) as rig:
        answer = await rig.docker(method, path)
        assert (answer.status, answer.value) == (status, told)


async def _echo(stream: trio.abc.HalfCloseableStream) -> None:
    async for chunk in stream:
        await stream.send_all(chunk.upper())
    await stream.send_all(b"<end>")


async def test_hijack_with_and_without_upgrade(tmp_path: Path) -> None:
    async with open_docker(tmp_path) as rig:

        async def attach(request: Request) -> Hijack:
            assert await request.read() == b"{}"
            return Hijack(_echo)

        rig.api.router.add("POST", "/echo", attach)
        for upgrade, first in (
            ("Connection: Upgrade\r\nUpgrade: tcp\r\n", b"HTTP/1.1 101 UPGRADED\r\n"),
            ("", b"HTTP/1.1 200 OK\r\n"),
        ):
            head = f"POST /v1.41/echo HTTP/1.1\r\nHost: docker\r\nContent-Length: 2\r\n{upgrade}\r\n{{}}early "
            answer = await rig.docker.raw(head.encode(), eof=True)
            start, _, rest = answer.partition(b"\r\n\r\n")
            assert answer.startswith(first)
            assert f"Content-Type: {RAW_STREAM}".encode() in start
            assert rest == b"EARLY <end>"


async def test_pipelined_and_kept_connections(tmp_path: Path) -> None:
    async with open_docker(tmp_path) as rig:
        one = b"GET /_ping HTTP/1.1\r\nHost: docker\r\n\r\n"
        last = b"GET /_ping HTTP/1.1\r\nHost: docker\r\nConnection: close\r\n\r\n"
        answer = await rig.docker.raw(one * 50 + last)
        assert answer.count(b"HTTP/1.1 200 ") == 51


async def test_a_half_closed_connection_gets_its_answer(tmp_path: Path) -> None:
    async with open_docker(tmp_path) as rig:
        answer = await rig.docker.raw(b"GET /_ping HTTP/1.1\r\nHost: docker\r\n\r\n", eof=True)
        assert answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"OK")


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n\0\0",
        b"NOT HTTP\r\n\r\n",
        b"GET /%zz HTTP/1.1\r\nHost: docker\r\n\r\n",
        b"GET /_ping HTTP/1.1\r\n\r\n",
        b"GET /_ping HTTP/1.1\r\nHost: docker\r\nContent-Length: x\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: d\r\nTransfer-Encoding: gzip\r\n\r\n",
    ],
)
async def test_what_is_no_http_is_refused_and_closed(tmp_path: Path, data: bytes) -> None:
    async with open_docker(tmp_path) as rig:
        answer = await rig.docker.raw(data, eof=True)
        assert answer.split(b" ")[1] in (b"400", b"501")
        assert b"Connection: close" in answer
        assert (await rig.docker("GET", "/_ping")).status == 200


async def test_a_body_that_ends_early_hurts_nobody(tmp_path: Path) -> None:
    async with open_docker(tmp_path) as rig:

        async def reads(request: Request) -> Response:
            return Response(200, await request.read())

        rig.api.router.add("POST", "/read", reads)
        head = b"POST /read HTTP/1.1\r\nHost: docker\r\nContent-Length: 100\r\n\r\nshort"
        assert await rig.docker.raw(head, eof=True) == b""
        assert (await rig.docker("POST", "/read", raw=b"whole")).body == b"whole"


async def test_bodies_have_a_limit(tmp_path: Path) -> None:
    async with open_docker(tmp_path) as rig:

        async def reads(request: Request) -> Response:
            return Response(200, str(len(await request.read(1000))).encode())

        rig.api.router.add("POST", "/read", reads)
        assert (await rig.docker("POST", "/read", raw=b"x" * 1000)).body == b"1000"
        assert (await rig.docker("POST", "/read", raw=b"x" * 2000)).status == 413
        large = b"POST /read HTTP/1.1\r\nHost: docker\r\nContent-Length: 10000000\r\n\r\n" + b"x" * 300_000
        assert (await rig.docker.raw(large)).startswith(b"HTTP/1.1 413 ")


async def test_a_client_that_waits_for_100(tmp_path: Path) -> None:
    async with open_docker(tmp_path) as rig:

        async def reads(request: Request) -> Response:
            return Response(200, await request.read())

        rig.api.router.add("POST", "/read", reads)
        with trio.fail_after(60):
            async with await trio.open_unix_socket(str(rig.docker.path)) as stream:
                head = b"POST /read HTTP/1.1\r\nHost: d\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n"
                await stream.send_all(head)
                assert (await stream.receive_some()).startswith(b"HTTP/1.1 100 ")
                await stream.send_all(b"body")
                assert (await stream.receive_some()).endswith(b"body")


async def test_a_handler_that_fails_is_an_error_and_nothing_else(tmp_path: Path) -> None:
    async with open_docker(tmp_path) as rig:

        async def fails(request: Request) -> Response:
            raise RuntimeError("oops")

        rig.api.router.add("GET", "/fails", fails)
        answer = await rig.docker("GET", "/fails")
        assert answer.status == 500 and "oops" in answer.message
