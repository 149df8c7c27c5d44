"""Docker's API of the real process: options, permissions, restart, and an end that lets requests finish."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from bridge_support import FakeHelper
from docker_support import Answer, Client

from taploom.address import UnixAddress, connect, open_listener


class Bridge:
    """A bridge process that serves Docker's API."""

    def __init__(self, directory: Path, helper: str, *options: str) -> None:
        self.docker = Client(directory / "run" / "docker.sock")
        self.log = directory / "bridge.log"
        self.command = [
            *(sys.executable, "-m", "host_bridge", "--socket", f"unix:{directory}/run/bridge.sock"),
            *("--state-dir", str(directory / "state"), "--helper", helper),
            *("--docker-socket", f"unix:{self.docker.path}", *options),
        ]
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stderr=log)
        with trio.fail_after(60):
            while True:
                assert self.process.poll() is None, self.log.read_text()
                with contextlib.suppress(OSError):
                    assert (await self.docker("GET", "/_ping")).status == 200
                    return
                await trio.sleep(0.01)

    async def kill(self, number: signal.Signals = signal.SIGKILL) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        with trio.fail_after(60):
            return await trio.to_thread.run_sync(self.process.wait, abandon_on_cancel=True)


@pytest.fixture
async def helper(tmp_path: Path, nursery: trio.Nursery) -> FakeHelper:
    agent = FakeHelper(tmp_path / "helper")
    await nursery.start(agent.run)
    return agent


@pytest.fixture
async def bridge(tmp_path: Path, helper: FakeHelper) -> AsyncIterator[Bridge]:
    process = Bridge(tmp_path, helper.control, "--docker-group", str(os.getegid()))
    try:
        await process.start()
        yield process
    finally:
        if process.process is not None:
            process.process.kill()
            process.process.wait()


async def test_a_killed_bridge_keeps_what_it_acknowledged(bridge: Bridge) -> None:
    body = {
        "Name": "app",
        "Labels": {"a": "b"},
        "Options": {"com.docker.network.driver.mtu": "1400"},
        "IPAM": {"Config": [{"Subnet": "10.9.0.0/24", "IPRange": "10.9.0.128/25"}]},
    }
    assert (await bridge.docker("POST", "/networks/create", body)).status == 201
    before = (await bridge.docker("GET", "/networks")).value
    await bridge.kill()
    await bridge.start()
    assert (await bridge.docker("GET", "/networks")).value == before
    assert len(before) == 4


async def test_the_group_may_use_the_socket(bridge: Bridge) -> None:
    info = bridge.docker.path.stat()
    assert (stat.S_IMODE(info.st_mode), info.st_gid) == (0o660, os.getegid())


async def test_only_the_groups_members(tmp_path: Path) -> None:
    directory = tmp_path / "s"
    directory.mkdir(mode=0o700)
    address = UnixAddress(str(directory / "docker.sock"))
    async with await open_listener(address, allowed_uids=frozenset(), allowed_gid=os.getegid()) as listener:
        client = await connect(address)
        await (await listener.accept()).aclose()
        await client.aclose()
    # A process may give its files to its own groups only; the check is of the peer, whatever the file says.
    async with await open_listener(address, allowed_uids=frozenset()) as listener, trio.open_nursery() as nursery:
        nursery.start_soon(listener.accept)
        client = await connect(address)
        with trio.fail_after(60):
            assert await client.receive_some(1) == b""
        await client.aclose()
        nursery.cancel_scope.cancel()


async def test_a_request_under_way_is_answered_at_the_end(bridge: Bridge, helper: FakeHelper) -> None:
    # Once a network is there, the bridge and the helper are connected: the next one is a call, not part of a Sync.
    assert (await bridge.docker("POST", "/networks/create", {"Name": "first"})).status == 201
    helper.hang.add("ApplyNetwork")
    answers: list[Answer] = []

    async def create() -> None:
        answers.append(await bridge.docker("POST", "/networks/create", {"Name": "app"}))

    async with trio.open_nursery() as nursery:
        before = helper.calls.count("ApplyNetwork")
        nursery.start_soon(create)
        with trio.fail_after(60):
            await helper.until(lambda: helper.calls.count("ApplyNetwork") > before)
        nursery.start_soon(bridge.kill, signal.SIGTERM)
        with trio.fail_after(60):
            while b"ending" not in bridge.log.read_bytes():
                await trio.sleep(0.01)
        helper.hang.clear()
        # Its connection is what ends the call that hangs.
        await helper.stop()
        nursery.start_soon(helper.run)
        with trio.fail_after(60):
            while not answers:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert answers[0].status == 201


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--docker-group", "0"], "--docker-group is of no use without --docker-socket"),
        (["--docker-socket", "unix:/tmp/x", "--docker-group", "no-such-group"], "there is no group 'no-such-group'"),
        (["--docker-socket", "tcp:1"], "is not one of"),
    ],
)
async def test_options_that_make_no_sense(tmp_path: Path, options: list[str], message: str) -> None:
    command = [sys.executable, "-m", "host_bridge", "--socket", f"unix:{tmp_path}/b.sock", "--state-dir", str(tmp_path)]
    done = await trio.run_process(
        [*command, "--helper", f"unix:{tmp_path}/h.sock", *options], check=False, capture_stderr=True
    )
    assert done.returncode == 2 and message in done.stderr.decode()
