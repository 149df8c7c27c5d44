"""The bridge as a process, and the `taploom` command against it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import command_server
import grpc
import pytest
import trio
import trio.lowlevel
from bridge_support import FakeGuest, FakeHelper
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from host_bridge.store import DATABASE, Store
from taploom.address import connect as connect_address
from taploom.address import parse_address

TAPLOOM = [sys.executable, "-m", "host_bridge.cli"]


class Bridge:
    """A bridge process; `socket` is its API's address."""

    def __init__(self, directory: Path, helper: str) -> None:
        self.directory = directory
        self.socket = f"unix:{directory}/run/bridge.sock"
        self.log = directory / "bridge.log"
        self.command = [
            *(sys.executable, "-m", "host_bridge", "--socket", self.socket),
            *("--state-dir", str(directory / "state"), "--helper", helper),
        ]
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stderr=log)
        with trio.fail_after(60):
            while True:
                assert self.process.poll() is None, self.log.read_text()
                with contextlib.suppress(OSError):
                    await (await connect_address(parse_address(self.socket))).aclose()
                    return
                await trio.sleep(0.01)

    async def kill(self, number: signal.Signals = signal.SIGKILL) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return await trio.to_thread.run_sync(self.process.wait)

    async def taploom(self, *arguments: str, code: int = 0) -> str:
        """Runs the command; its standard output, or standard error when it is to fail."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TAPLOOM_")}
        environment |= {"TAPLOOM_BRIDGE": self.socket, "COLUMNS": "200"}
        result = await trio.to_thread.run_sync(command_server.run, arguments, environment, 120.0)
        output = result.stderr if code else result.stdout
        assert result.returncode == code, (result.stdout, result.stderr)
        return output.rstrip("\n")


PREDEFINED = ["bridge", "host", "none"]


@pytest.fixture
async def helper(tmp_path: Path, nursery: trio.Nursery) -> FakeHelper:
    agent = FakeHelper(tmp_path / "helper")
    await nursery.start(agent.run)
    return agent


@pytest.fixture
async def web(tmp_path: Path, nursery: trio.Nursery) -> FakeGuest:
    agent = FakeGuest(tmp_path / "guests" / "web")
    await nursery.start(agent.run)
    return agent


@pytest.fixture
async def bridge(tmp_path: Path, helper: FakeHelper) -> AsyncIterator[Bridge]:
    process = Bridge(tmp_path, helper.control)
    await process.start()
    yield process
    assert process.process is not None
    process.process.kill()
    process.process.wait()


async def test_dockers_options_with_the_command(bridge: Bridge, helper: FakeHelper, web: FakeGuest) -> None:
    create = ["network", "create", "app", "--subnet", "10.1.0.0/16", "--ip-range", "10.1.5.0/24", "--json"]
    create += ["--aux-address", "router=10.1.5.1", "--label", "tier=front", "--label", "lone"]
    create += ["-o", "com.docker.network.bridge.enable_icc=false", "-o", "com.docker.network.driver.mtu=1400"]
    network = json.loads(await bridge.taploom(*create))
    assert (network["driver"], network["predefined"], network["mtu"]) == ("bridge", False, 1400)
    assert network["gateways"] == ["10.1.5.0"]
    assert network["ip_ranges"] == ["10.1.5.0/24"]
    assert network["auxiliary_addresses"] == {"router": "10.1.5.1"}
    assert network["labels"] == {"lone": "", "tier": "front"}
    assert helper.networks[network["id"]].endpoints_isolated
    shown = await bridge.taploom("network", "inspect", "app")
    for text in ("10.1.5.0/24", "router=10.1.5.1", "tier=front", "com.docker.network.bridge.enable_icc=false"):
        assert text in shown
    six = json.loads(await bridge.taploom("network", "create", "six", "--ipv6", "--no-ipv4", "--json"))
    assert len(six["subnets"]) == 1 and ":" in six["subnets"][0]
    await bridge.taploom("guest", "register", "web", web.control)
    connect = ["network", "connect", "app", "web", "--link", "database=db", "--driver-opt", "a=b", "--json"]
    endpoint = json.loads(await bridge.taploom(*connect))
    assert (endpoint["addresses"], endpoint["links"]) == (["10.1.5.2/16"], {"database": "db"})
    assert endpoint["driver_options"] == {"a": "b"}
    (interface,) = web.interfaces.values()
    assert [(link.alias, link.target) for link in interface.name_links] == [("database", "db")]
    for arguments, text in (
        (("network", "create", "x", "-o", "com.docker.network.bridge.enable_icc=maybe"), "use true or false"),
        (("network", "create", "x", "--ip-range", "10.2.0.0/24"), "no IPv4 subnet"),
        (("network", "create", "bridge"), "predefined"),
        (("network", "rm", "none"), "cannot be removed"),
        (("network", "connect", "six", "web", "--ip", "10.9.0.5"), "--subnet"),
        (("network", "connect", "bridge", "web", "--alias", "x"), "has no names"),
    ):
        message = await bridge.taploom(*arguments, code=1)
        assert text in message and message.startswith("taploom: ") and "\n" not in message
    for arguments in (("network", "create", "x", "-o", "a"), ("network", "create", "x", "--aux-address", "=1")):
        assert "is malformed: write it as" in await bridge.taploom(*arguments, code=2)


async def test_a_day_with_the_command(bridge: Bridge, helper: FakeHelper, web: FakeGuest) -> None:
    network_id = await bridge.taploom("network", "create", "app", "--ipv6", "--subnet", "10.1.0.0/24", "--mtu", "9000")
    assert len(network_id) == 64
    assert helper.networks[network_id].mtu == 9000
    guest_id = await bridge.taploom("guest", "register", "web", web.control)
    assert len(guest_id) == 64
    command = ["network", "connect", "app", "web", "--ip", "10.1.0.7", "--alias", "www", "--priority", "-3"]
    assert await bridge.taploom(*command) == ""
    assert next(iter(web.interfaces.values())).addresses[0] == "10.1.0.7/24"

    network, *predefined = json.loads(await bridge.taploom("network", "ls", "--json"))
    assert [one["name"] for one in predefined] == PREDEFINED
    assert (network["id"], network["name"], network["internal"]) == (network_id, "app", False)
    inspected = json.loads(await bridge.taploom("network", "inspect", network_id[:8], "--json"))
    assert inspected["endpoints"][0]["guest_name"] == "web"
    assert inspected["endpoints"][0]["aliases"] == ["www"]
    assert inspected["endpoints"][0]["gateway_priority"] == -3
    assert inspected["created_at"].endswith("Z")
    guest = json.loads(await bridge.taploom("guest", "inspect", "web", "--json"))
    assert guest["connected"] is True
    assert "10.1.0.7/24" in await bridge.taploom("network", "inspect", "app")
    assert "10.1.0.7/24" in await bridge.taploom("guest", "inspect", "web")
    assert (await bridge.taploom("network", "ls")).splitlines()[1].split()[:2] == [network_id[:12], "app"]
    assert (await bridge.taploom("guest", "ls")).splitlines()[1].split()[:2] == [guest_id[:12], "web"]

    status = json.loads(await bridge.taploom("status", "--json"))
    assert status["converged"] is True
    assert {c["name"]: c["state"] for c in status["components"]}["guest/web"] == "ok"
    shown = await bridge.taploom("status")
    assert "web on app" in shown
    assert "everything has converged" in shown

    message = await bridge.taploom("network", "rm", "app", code=1)
    assert message.startswith("taploom: network app is in use by guest web: disconnect first")
    assert "\n" not in message
    await bridge.taploom("network", "disconnect", "app", "web")
    assert not web.interfaces
    assert await bridge.taploom("network", "rm", "app") == "app"
    assert await bridge.taploom("guest", "rm", "web") == "web"
    assert json.loads(await bridge.taploom("guest", "ls", "--json")) == []


async def test_shell_completion(bridge: Bridge, web: FakeGuest) -> None:
    await bridge.taploom("network", "create", "application")
    await bridge.taploom("guest", "register", "webserver", web.control)

    async def complete(words: str, number: int) -> str:
        environment = {"_TAPLOOM_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(number)}
        os.environ |= environment
        try:
            return await bridge.taploom()
        finally:
            for name in environment:
                del os.environ[name]

    assert "network" in await complete("taploom ne", 1)
    assert await complete("taploom network connect app", 3) == "plain,application"
    assert await complete("taploom network connect application w", 4) == "plain,webserver"
    assert await complete("taploom network connect --bridge unix:/nowhere app", 5) == ""


async def test_command_errors_are_one_line(bridge: Bridge) -> None:
    for arguments, code, text in (
        (("network", "create", "bad name"), 1, "network name 'bad name' is not allowed"),
        (("network", "inspect", "nope"), 1, "network nope not found"),
        (("network", "connect", "app"), 2, "Missing argument 'GUEST'. See 'taploom network connect --help'."),
        (("network", "create", "x", "--mtu", "many"), 2, "--mtu"),
        (("network", "create", "x", "--mtu", "-1"), 2, "--mtu"),
        (("network", "connect", "a", "b", "--priority", str(2**40)), 2, "--priority"),
        (("nonsense",), 2, "No such command 'nonsense'"),
        (("--nonsense",), 2, "No such option"),
        (("guest", "register", "web", "tcp:1"), 1, "is not one of vsock:CID:PORT"),
        (
            ("network", "ls", "--bridge", "unix:/nowhere/bridge.sock"),
            1,
            "no bridge answers at unix:/nowhere/bridge.sock",
        ),
        (("network", "ls", "--bridge", "nonsense"), 1, "bridge address"),
        (("network", "ls", "--lab", "../x"), 1, "lab name"),
        (
            ("--lab", "none-such", "network", "ls"),
            1,
            "/run/taploom/none-such/bridge.sock; start one with 'taploom lab up",
        ),
    ):
        message = await bridge.taploom(*arguments, code=code)
        assert message.startswith("taploom: "), message
        assert text in message
        assert "\n" not in message, message


async def test_status_watch_streams_json_lines(bridge: Bridge) -> None:
    command = [*TAPLOOM, "--bridge", bridge.socket, "status", "--watch", "--json", "--interval", "0.1"]
    process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    data = b""
    with trio.fail_after(60):
        while data.count(b"\n") < 3:
            data += bytes(await process.stdout.receive_some())
    process.send_signal(signal.SIGINT)
    assert await process.wait() == 130
    for line in data.splitlines()[:3]:
        assert json.loads(line)["components"][0]["name"] == "bridge"


async def test_status_watch_into_a_pipe_that_closes(bridge: Bridge) -> None:
    command = f"{' '.join(TAPLOOM)} --bridge {bridge.socket} status --watch --json --interval 0.1 | head -n 1"
    with trio.fail_after(60):
        result = await trio.run_process(["sh", "-c", command], capture_stdout=True, capture_stderr=True)
    assert json.loads(result.stdout)["components"]
    assert result.stderr == b""


async def test_status_watch_for_people(bridge: Bridge) -> None:
    command = [*TAPLOOM, "--bridge", bridge.socket, "status", "--watch", "--interval", "0.1"]
    process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with trio.fail_after(60):
        # Not a terminal: rich writes the last picture when it ends.
        while b"watch" not in Path(f"/proc/{process.pid}/cmdline").read_bytes():
            await trio.sleep(0.01)
    await bridge.kill()
    with trio.fail_after(60):
        assert await process.wait() == 1
    assert process.stderr is not None
    message = bytes(await process.stderr.receive_some())
    assert message.startswith(b"taploom: ")
    assert message.count(b"\n") == 1


async def test_sigterm_ends_cleanly(bridge: Bridge) -> None:
    assert await bridge.kill(signal.SIGTERM) == 0
    assert "Traceback" not in bridge.log.read_text()


async def test_socket_is_private(bridge: Bridge) -> None:
    path = Path(bridge.socket.removeprefix("unix:"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


async def test_kill_9_in_the_middle_of_a_connect(bridge: Bridge, helper: FakeHelper, web: FakeGuest) -> None:
    await bridge.taploom("network", "create", "app")
    await bridge.taploom("network", "create", "back")
    await bridge.taploom("guest", "register", "web", web.control)
    await bridge.taploom("network", "connect", "app", "web")
    before = await bridge.taploom("network", "ls", "--json")
    kept = set(web.interfaces)
    helper.hang.add("ApplyEndpoint")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: bridge.taploom("network", "connect", "back", "web", code=1))
        await web.until(lambda: web.calls.count("ApplyInterface") == 2)
        await bridge.kill()
    helper.hang.clear()
    await bridge.start()
    assert json.loads(await bridge.taploom("network", "ls", "--json")) != []
    await web.until(lambda: set(web.interfaces) == kept)
    await web.until(lambda: set(web.links) == kept)
    await helper.until(lambda: set(helper.links) == kept)
    with trio.fail_after(60):
        while await bridge.taploom("network", "ls", "--json") != before:
            await trio.sleep(0.01)
    endpoint = json.loads(await bridge.taploom("network", "connect", "back", "web", "--json"))
    assert endpoint["interface_name"] == "eth1"


async def test_second_bridge_and_damaged_state(bridge: Bridge, tmp_path: Path) -> None:
    second = [*bridge.command]
    second[second.index("--socket") + 1] = f"unix:{tmp_path}/run/other.sock"
    with trio.fail_after(60):
        result = await trio.run_process(second, capture_stderr=True, check=False)
    assert result.returncode == 1
    assert b"taploom-bridge: another bridge (process" in result.stderr
    assert result.stderr.count(b"\n") == 1
    await bridge.kill()
    # The log of a killed bridge holds the pages as well; without it the damage shows.
    for path in (tmp_path / "state").glob(f"{DATABASE}-*"):
        path.unlink()
    (tmp_path / "state" / DATABASE).write_bytes(b"garbage" * 1000)
    with trio.fail_after(60):
        result = await trio.run_process(bridge.command, capture_stderr=True, check=False)
    assert result.returncode == 1
    assert b"is damaged" in result.stderr
    assert result.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"--socket": "tcp:1"}, b"is not one of"),
        ({"--helper": "nonsense"}, b"is not one of"),
        ({"--dns": "1.2.3"}, b"DNS server"),
        ({"--dns": "192.0.2.1:99999"}, b"impossible port"),
        ({"--log-level": "loud"}, b"--log-level"),
        ({"--helper": "fd:3"}, b"data address"),
    ],
)
def test_bad_arguments(tmp_path: Path, change: dict[str, str], text: bytes) -> None:
    options = {
        "--socket": f"unix:{tmp_path}/b.sock",
        "--state-dir": str(tmp_path / "s"),
        "--helper": "vsock:3",
    } | change
    command = [sys.executable, "-m", "host_bridge", *(part for item in options.items() for part in item)]
    result = subprocess.run(command, capture_output=True, check=False)
    assert result.returncode == 2
    assert text in result.stderr
    assert not (tmp_path / "s").exists()


def test_socket_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "host_bridge", "--socket", f"unix:{tmp_path}/file/b.sock"]
    command += ["--state-dir", str(tmp_path / "s"), "--helper", "vsock:3"]
    result = subprocess.run(command, capture_output=True, check=False)
    assert result.returncode == 1
    assert b"taploom-bridge: cannot serve at" in result.stderr
    with Store(tmp_path / "s"):
        pass


def test_help_and_version() -> None:
    for command in ([*TAPLOOM, "--help"], [*TAPLOOM, "network", "connect", "--help"], [*TAPLOOM, "status", "-h"]):
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "Example:" in result.stdout
    for command in ([*TAPLOOM, "--version"], [sys.executable, "-m", "host_bridge", "--version"]):
        assert "0." in subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def channel(bridge: Bridge) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(bridge.socket) as channel:
        yield channel


async def test_reflection_and_health_as_grpcurl_asks(channel: grpc.Channel) -> None:
    def ask() -> tuple[set[str], int]:
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]))
        names = {service.name for service in answer.list_services_response.service}
        health = health_pb2_grpc.HealthStub(channel)
        checked = health.Check(health_pb2.HealthCheckRequest(service="taploom.bridge.v1.NetworkService"))
        return names, checked.status

    names, serving = await trio.to_thread.run_sync(ask)
    assert {f"taploom.bridge.v1.{kind}Service" for kind in ("Network", "Guest", "Status")} <= names
    assert serving == health_pb2.HealthCheckResponse.SERVING


async def test_garbage_on_the_api_socket(bridge: Bridge) -> None:
    for garbage in (
        b"\x00" * 10_000,
        b"GET / HTTP/1.1\r\n\r\n",
        os.urandom(5000),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff" * 50,
    ):
        stream = await connect_address(parse_address(bridge.socket))
        with contextlib.suppress(trio.BrokenResourceError), trio.move_on_after(20):
            await stream.send_all(garbage)
            await stream.send_eof()
            while await stream.receive_some(65536):
                pass
        await stream.aclose()
    assert [one["name"] for one in json.loads(await bridge.taploom("network", "ls", "--json"))] == PREDEFINED


async def test_socket_from_the_service_manager(tmp_path: Path, helper: FakeHelper) -> None:
    """The listening socket is inherited: callers that come before the bridge is up wait for it."""
    path = str(tmp_path / "activated.sock")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        bridge = Bridge(tmp_path, helper.control)
        bridge.socket = f"unix:{path}"
        bridge.command[bridge.command.index("--socket") + 1] = f"fd:{listening.fileno()}"
        outputs: list[str] = []

        async def ask() -> None:
            outputs.append(await bridge.taploom("guest", "ls", "--json"))

        for _ in range(2):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask)
                with bridge.log.open("ab") as log:
                    bridge.process = subprocess.Popen(bridge.command, stderr=log, pass_fds=[listening.fileno()])
            await bridge.kill()
        assert outputs == ["[]", "[]"]
