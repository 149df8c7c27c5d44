"""Attach, exec and logs: hijacked connections with the real docker command line, and Docker's framing."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from containers_support import ContainerRig, open_container_rig

from taploom.rpc import RpcError, StatusCode


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[ContainerRig]:
    async with open_container_rig(tmp_path) as rig:
        yield rig


def frames(data: bytes) -> list[tuple[int, bytes]]:
    found = []
    while data:
        number, length = struct.unpack(">BxxxI", data[:8])
        found.append((number, data[8 : 8 + length]))
        data = data[8 + length :]
    return found


async def test_run_in_the_foreground(rig: ContainerRig) -> None:
    done = await rig.docker.cli("run", "--rm", "box", "echo", "a", "b")
    assert (done.stdout, done.returncode) == ("a b", 0)
    done = await rig.docker.cli("run", "--name", "three", "box", "exit", "3", check=False)
    assert done.returncode == 3
    done = await rig.docker.cli("run", "--rm", "box", "nosuch", check=False)
    assert done.returncode == 127
    assert "executable file not found in $PATH" in done.stderr
    assert (await rig.docker.cli("ps", "-aq", "--no-trunc")).stdout == rig.manager.container("three").id
    done = await rig.docker.cli("run", "none", check=False)
    assert done.returncode == 125


async def test_exec(rig: ContainerRig) -> None:
    await rig.run_container("web")
    done = await rig.docker.cli("exec", "web", "echo", "hello")
    assert done.stdout == "hello"
    assert (await rig.docker.cli("exec", "web", "exit", "5", check=False)).returncode == 5
    done = await rig.docker.cli("exec", "web", "nosuch", check=False)
    assert done.returncode == 126
    assert "OCI runtime exec failed: exec failed" in done.stdout + done.stderr
    await rig.docker.cli("exec", "-d", "web", "sleep", "9")
    (exec_id,) = (await rig.inspect("web"))["ExecIDs"]
    answer = await rig.docker("POST", f"/exec/{exec_id}/start", {"Detach": True})
    assert (answer.status, answer.message) == (409, f"Error: Exec command {exec_id} is already running")
    assert (await rig.docker("GET", "/exec/nosuch/json")).message == "No such exec instance: nosuch"
    await rig.docker("POST", "/containers/web/stop")
    assert not (await rig.docker("GET", f"/exec/{exec_id}/json")).value["Running"]
    answer = await rig.docker("POST", "/containers/web/exec", {"Cmd": ["echo"]})
    assert answer.status == 409


async def test_frames_of_an_exec(rig: ContainerRig) -> None:
    await rig.run_container("web")
    body = {"Cmd": ["echo", "x"], "AttachStdout": True}
    exec_id = (await rig.docker("POST", "/containers/web/exec", body)).value["Id"]
    head = (
        f"POST /v1.41/exec/{exec_id}/start HTTP/1.1\r\nHost: d\r\nContent-Type: application/json\r\n"
        "Connection: Upgrade\r\nUpgrade: tcp\r\nContent-Length: 16\r\n\r\n"
    )
    answer = await rig.docker.raw(head.encode() + b'{"Detach":false}')
    head_end = answer.index(b"\r\n\r\n") + 4
    assert answer.startswith(b"HTTP/1.1 101 UPGRADED\r\n")
    assert frames(answer[head_end:]) == [(1, b"x\n")]
    answer = await rig.docker.raw(head.encode() + b'{"Detach":false}')
    text = f"Error: Exec command {exec_id} has already run\r\n".encode()
    assert frames(answer[answer.index(b"\r\n\r\n") + 4 :]) == [(1, text)]


async def test_attach_carries_input_and_ends_with_the_process(rig: ContainerRig) -> None:
    await rig.create("web", "cat", OpenStdin=True, StdinOnce=True)
    head = (
        "POST /v1.42/containers/web/attach?stream=1&stdin=1&stdout=1&stderr=1 HTTP/1.1\r\nHost: d\r\n"
        "Connection: Upgrade\r\nUpgrade: tcp\r\nContent-Length: 0\r\n\r\n"
    )
    with trio.fail_after(60):
        async with await trio.open_unix_socket(str(rig.docker.path)) as stream:
            await stream.send_all(head.encode())
            received = bytes(await stream.receive_some())
            assert b"application/vnd.docker.multiplexed-stream" in received
            # Before its start: nothing of its output is missed.
            await rig.docker("POST", "/containers/web/start")
            await stream.send_all(b"hello")
            data = b""
            while len(data) < 13:
                data += bytes(await stream.receive_some())
            assert frames(data) == [(1, b"hello")]
            await stream.send_eof()
            assert await stream.receive_some() == b""
    await rig.until(lambda: not rig.manager.container("web").running)


async def test_attach_to_what_is_not_there(rig: ContainerRig) -> None:
    answer = await rig.docker("POST", "/containers/nosuch/attach?stream=1")
    assert (answer.status, answer.body) == (404, b"No such container: nosuch\r\n")


async def test_logs(rig: ContainerRig) -> None:
    container_id = await rig.run_container("web")
    answer = await rig.docker("GET", "/containers/web/logs")
    assert (answer.status, answer.message) == (400, "Bad parameters: you must choose at least one stream")
    container = rig.runtime.containers[container_id]
    rig.runtime.output(container, "", b"one\n")
    rig.runtime.output(container, "", b"two\n", error=True)
    answer = await rig.docker("GET", "/containers/web/logs?stdout=1&stderr=1")
    assert frames(answer.body) == [(1, b"one\n"), (2, b"two\n")]
    answer = await rig.docker("GET", "/containers/web/logs?stderr=1&timestamps=1")
    ((number, line),) = frames(answer.body)
    assert number == 2
    assert line.endswith(b"000Z two\n")
    answer = await rig.docker("GET", "/containers/web/logs?stdout=1&stderr=1&tail=1")
    assert frames(answer.body) == [(2, b"two\n")]
    assert (await rig.docker.cli("logs", "web")).stdout == "one"


async def test_sizes_and_top(rig: ContainerRig) -> None:
    container_id = await rig.run_container("web", Tty=True)
    assert (await rig.docker("POST", "/containers/web/resize?h=30&w=100")).status == 200
    assert rig.runtime.containers[container_id].main.size == (30, 100)
    answer = await rig.docker("POST", "/containers/web/resize?h=x&w=100")
    assert (answer.status, answer.message) == (400, 'strconv.Atoi: parsing "x": invalid syntax')
    top = (await rig.docker("GET", "/containers/web/top")).value
    assert top == {"Processes": [["1", "sleep"]], "Titles": ["PID", "CMD"]}


async def test_a_runtime_that_refuses_a_stream(rig: ContainerRig) -> None:
    await rig.run_container("web")
    rig.runtime.fail["exec"] = RpcError(StatusCode.INTERNAL, "out of pids")
    done = await rig.docker.cli("exec", "web", "echo", check=False)
    assert done.returncode != 0
    assert "out of pids" in done.stdout + done.stderr
