"""Docker's API in this process, over a fabric with fake agents; and clients for it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h11
import trio
from bridge_support import Rig, open_rig
from docker_cli import CLI

from host_bridge.containers import ContainerManager
from host_bridge.docker_api import containers
from host_bridge.docker_api.app import DockerApi
from host_bridge.docker_api.server import serve_docker
from host_bridge.ports import PortPublisher
from taploom.address import UnixAddress, open_listener
from taploom.link import open_dataplane


@dataclass
class Answer:
    """A response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def value(self) -> Any:
        return json.loads(self.body)

    @property
    def message(self) -> str:
        return str(self.value["message"])


class Client:
    """One HTTP request per connection, over the API's socket."""

    def __init__(self, path: Path) -> None:
        self.path = path

    async def __call__(
        self,
        method: str,
        target: str,
        body: object = None,
        *,
        raw: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        data = raw if raw is not None else (b"" if body is None else json.dumps(body).encode())
        sent = {"Host": "docker", "Content-Type": "application/json"} | (headers or {})
        if data or method == "POST":
            sent.setdefault("Content-Length", str(len(data)))
        with trio.fail_after(60):
            async with await trio.open_unix_socket(str(self.path)) as stream:
                connection = h11.Connection(h11.CLIENT)
                request = h11.Request(method=method, target=target, headers=list(sent.items()))
                out = connection.send(request) or b""
                if data:
                    out += connection.send(h11.Data(data=data)) or b""
                await stream.send_all(out + (connection.send(h11.EndOfMessage()) or b""))
                status, received, content = 0, {}, b""
                while True:
                    event = connection.next_event()
                    if event is h11.NEED_DATA:
                        connection.receive_data(bytes(await stream.receive_some(65536)))
                    elif isinstance(event, h11.Response):
                        status = event.status_code
                        received = {n.decode(): v.decode() for n, v in event.headers}
                    elif isinstance(event, h11.Data):
                        content += bytes(event.data)
                    elif isinstance(event, h11.EndOfMessage):
                        return Answer(status, received, content)

    async def raw(self, data: bytes, *, eof: bool = False) -> bytes:
        """Sends bytes and reads until the server closes."""
        with trio.fail_after(60):
            async with await trio.open_unix_socket(str(self.path)) as stream:
                await stream.send_all(data)
                if eof:
                    await stream.send_eof()
                answer = b""
                with contextlib.suppress(trio.BrokenResourceError):
                    while chunk := await stream.receive_some(65536):
                        answer += chunk
                return answer

    async def cli(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs the real docker CLI against the API."""
        environment = {**os.environ, "DOCKER_HOST": f"unix://{self.path}", "DOCKER_CONFIG": str(self.path.parent)}
        environment.pop("DOCKER_CONTEXT", None)
        with trio.fail_after(60):
            done = await trio.run_process(
                [CLI, *arguments], capture_stdout=True, capture_stderr=True, check=False, env=environment
            )
        result = subprocess.CompletedProcess(
            arguments, done.returncode, done.stdout.decode().strip(), done.stderr.decode().strip()
        )
        assert not check or result.returncode == 0, f"docker {' '.join(arguments)}: {result.stderr}"
        return result


@dataclass
class DockerRig:
    """A fabric with a fake helper, and the API over it."""

    rig: Rig
    api: DockerApi
    docker: Client


@contextlib.asynccontextmanager
async def open_docker(directory: Path) -> AsyncIterator[DockerRig]:
    """Everything of a bridge but its process: a helper, a fabric and the API on a socket."""
    async with open_dataplane() as dataplane, open_rig(directory) as rig:
        publisher = PortPublisher(rig.fabric.helper, dataplane, is_gateway=lambda _: False)
        manager = ContainerManager(rig.fabric, publisher, None)
        api = DockerApi(rig.fabric, manager)
        containers.register(api, manager)
        listener = await open_listener(UnixAddress(f"{directory}/docker.sock"))
        async with trio.open_nursery() as nursery:
            await nursery.start(manager.run)
            await nursery.start(serve_docker, listener, api)
            yield DockerRig(rig, api, Client(directory / "docker.sock"))
            nursery.cancel_scope.cancel()


__all__ = ["Answer", "Client", "DockerRig", "open_docker"]
