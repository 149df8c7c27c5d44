"""The bridge's small parts: waiting, names, descriptions, status for people, the command's look-ups, units."""

from __future__ import annotations

import ast
import configparser
import datetime
import importlib.resources
import io
import plistlib
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from host_bridge import client
from host_bridge.commands.status import render
from host_bridge.describe import bridge_endpoint, endpoint_names, guest_interface, helper_endpoint, helper_network
from host_bridge.errors import InvalidError
from host_bridge.model import EndpointRecord, GuestRecord, NetworkRecord, SubnetRecord
from host_bridge.names import check_aliases, check_mac, check_mtu, check_name, clean_text
from host_bridge.output import plain
from host_bridge.peer import rpc_reason, status_code
from host_bridge.waiting import Backoff, KeyedSignal, Signal
from taploom.contracts.taploom.bridge.v1 import Component, ComponentState, Endpoint, Link, Pending, Status
from taploom.notify import notify_ready
from taploom.patience import Patience
from taploom.rpc import RpcError, StatusCode

NOW = datetime.datetime(2026, 11, 21, 12, 0, tzinfo=datetime.UTC)
NETWORK = NetworkRecord(
    id="a" * 64,
    name="app",
    internal=False,
    mtu=1400,
    created_at=NOW,
    active=True,
    dns_server="169.254.64.1",
    gateway_mac="02:00:00:00:00:01",
    dns_mac="02:00:00:00:00:02",
    subnets=(SubnetRecord(4, "10.1.0.0/24", "10.1.0.1"), SubnetRecord(6, "fd00::/64", "fd00::1")),
)
GUEST = GuestRecord("b" * 64, "web", "vsock:3:5555", "vsock:3:5556", NOW)
ENDPOINT = EndpointRecord(
    id="c" * 64,
    network_id=NETWORK.id,
    guest_id=GUEST.id,
    interface_name="eth0",
    mac_address="02:00:00:00:00:03",
    gateway_priority=5,
    created_at=NOW,
    active=True,
    addresses=("10.1.0.2", "fd00::2"),
    aliases=("WEB", "www"),
)


# Waiting


async def test_signal_wakes_all_waiters() -> None:
    signal, value, woken = Signal(), [0], []

    async def wait(target: int) -> None:
        await signal.until(lambda: value[0] >= target)
        woken.append(target)

    async with trio.open_nursery() as nursery:
        for target in (1, 2, 2):
            nursery.start_soon(wait, target)
        await trio.testing.wait_all_tasks_blocked()
        value[0] = 1
        signal.notify()
        await trio.testing.wait_all_tasks_blocked()
        assert woken == [1]
        value[0] = 2
        signal.notify()


async def test_keyed_signal_wakes_its_key_and_forgets_keys_nobody_waits_for() -> None:
    signal, looked = KeyedSignal(), {"a": 0, "b": 0}
    done = False

    async def wait(key: str) -> None:
        def condition() -> bool:
            looked[key] += 1
            return done

        await signal.until(key, condition)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, "a")
        nursery.start_soon(wait, "b")
        await trio.testing.wait_all_tasks_blocked()
        signal.notify("a")
        await trio.testing.wait_all_tasks_blocked()
        assert looked == {"a": 2, "b": 1}
        with trio.move_on_after(0):
            await signal.until("c", lambda: False)
        done = True
        signal.notify_all()
    assert not signal._lots


@given(st.floats(0.001, 1), st.integers(1, 60))
@settings(deadline=None)
def test_backoff_grows_to_its_caps(first: float, count: int) -> None:
    backoff = Backoff(first=first, early_cap=max(first, 0.2), cap=2.0, patience=10)
    now, delays = 100.0, []
    for _ in range(count):
        delays.append(backoff.next(now))
        limit = max(first, 0.2) if now - 100 < 10 else 2.0
        assert 0 < delays[-1] <= limit * 1.2
        now += delays[-1]
    assert delays[0] <= first * 1.2
    backoff.reset()
    assert backoff.next(now) <= first * 1.2


def test_patience_grows_while_time_is_what_lacks() -> None:
    patience = Patience(10.0, 80.0)
    patience.failed(10.0, 0.5)  # refused
    assert patience.seconds == 10
    for allowed in (10.0, 10.0, 10.0):  # at one time
        patience.failed(allowed, allowed)
    assert patience.seconds == 20
    patience.failed(20.0, 18.0)  # the agent has said why before its time was up
    assert patience.seconds == 40
    for _ in range(3):
        patience.failed(patience.seconds, patience.seconds)
    assert patience.seconds == 80
    patience.succeeded(35.0)
    assert patience.seconds == 70
    patience.succeeded(60.0)
    assert patience.seconds == 70
    patience.succeeded(0.1)
    assert patience.seconds == 56
    for _ in range(10):
        with patience.attempt(ValueError):
            pass
    assert patience.seconds == 10
    with pytest.raises(ValueError), patience.attempt(ValueError) as allowed:
        raise ValueError
    assert allowed == patience.seconds == 10


# Names


@given(st.text(max_size=80))
@settings(deadline=None)
def test_names_are_what_the_contract_says(name: str) -> None:
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")
    good = 1 <= len(name) <= 63 and set(name) <= allowed and name[0] not in "_.-"
    try:
        assert check_name("network", name) == name
        assert good
    except InvalidError as error:
        assert not good
        assert str(error).isprintable()


@given(st.lists(st.text(max_size=70), max_size=5))
@settings(deadline=None)
def test_aliases_are_dns_names(aliases: list[str]) -> None:
    try:
        kept = check_aliases(aliases)
    except InvalidError as error:
        assert str(error).isprintable()
        return
    assert len({alias.lower() for alias in kept}) == len(kept)
    for alias in kept:
        assert all(1 <= len(label) <= 63 and label.isascii() for label in alias.split("."))


@given(st.text())
@settings(deadline=None)
def test_text_of_peers_is_safe_for_a_terminal(text: str) -> None:
    cleaned = clean_text(text, 50)
    assert cleaned.isprintable()
    assert len(cleaned) <= 53


def test_macs_and_mtus() -> None:
    assert check_mac("02-42-AC-12-00-02") == "02:42:ac:12:00:02"
    for mac in ("", "02:42", "02:42:ac:12:00:0g", "03:00:00:00:00:00", "00:00:00:00:00:00", "ff:ff:ff:ff:ff:ff"):
        with pytest.raises(InvalidError):
            check_mac(mac)
    assert check_mtu(0, ipv6=True) == 1500
    assert check_mtu(1280, ipv6=True) == 1280
    assert check_mtu(68, ipv6=False) == 68


# Descriptions


def test_descriptions() -> None:
    interface = guest_interface(ENDPOINT, NETWORK)
    assert interface.addresses == ["10.1.0.2/24", "fd00::2/64"]
    assert interface.gateways == ["10.1.0.1", "fd00::1"]
    assert (interface.mtu, interface.gateway_priority, interface.network_name) == (1400, 11, "app")
    assert endpoint_names(ENDPOINT, GUEST, NETWORK) == ["web", "b" * 12, "www"]
    assert helper_endpoint(ENDPOINT, GUEST, NETWORK).addresses == ["10.1.0.2", "fd00::2"]
    network = helper_network(NETWORK)
    assert network.subnets == ["10.1.0.0/24", "fd00::/64"]
    assert network.dns_mac == "02:00:00:00:00:02"


def test_statuses_of_peers() -> None:
    assert status_code(5) is StatusCode.NOT_FOUND
    assert status_code(0) is status_code(99) is status_code(-1) is StatusCode.UNKNOWN
    assert rpc_reason(RpcError(StatusCode.DEADLINE_EXCEEDED, "x")) == "no answer in time"
    assert rpc_reason(RpcError(StatusCode.INTERNAL)) == "INTERNAL"


# Status for people


def _status(seconds: int, count: int) -> Status:
    endpoint = bridge_endpoint(ENDPOINT, NETWORK, GUEST, link_up=True)
    return Status(
        time=NOW + datetime.timedelta(seconds=seconds),
        components=[
            Component(name="bridge", state=ComponentState.OK, version="1", since=NOW),
            Component(name="guest/web", state=ComponentState.DOWN, problem="[red]not markup[/red]", since=NOW),
            Component(name="new", state=ComponentState(77)),
        ],
        links=[
            Link(endpoint=endpoint, up=True, tx_bytes=count * 1_000_000, rx_bytes=5, tx_frames=count),
            Link(endpoint=Endpoint(id="other"), problem="no answer"),
        ],
        pending=[Pending(subject="guest web", reason="no answer", since=NOW)],
    )


def _text(status: Status, before: Status | None = None) -> str:
    from rich.console import Console

    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render(status, before))
    return console.export_text()


def test_status_totals_and_rates() -> None:
    text = _text(_status(90, 3))
    assert "3.0 MB" in text
    assert "[red]not markup[/red]" in text
    assert "not converged" in text
    assert "1m" in text
    rates = _text(_status(92, 5), _status(90, 3))
    assert "8.0 Mbit/s" in rates
    # The agent was started again, so its counters are lower.
    assert "0 bit/s" in _text(_status(92, 1), _status(90, 3))


def test_json_has_every_field() -> None:
    document = plain(_status(0, 1))
    assert document["components"][1]["state"] == "down"
    assert document["components"][0]["problem"] == ""
    assert document["time"] == "2026-11-21T12:00:00Z"
    assert document["links"][0]["endpoint"]["addresses"] == ["10.1.0.2/24", "fd00::2/64"]
    assert not any(key.startswith("_") for key in document)


# The command


def test_where_the_bridge_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TAPLOOM_BRIDGE", "TAPLOOM_LAB"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(client, "RUN_DIRECTORY", tmp_path)
    assert client.find_bridge() == f"unix:{tmp_path}/default/bridge.sock"
    (tmp_path / "bridge.sock").touch()
    assert client.find_bridge() == f"unix:{tmp_path}/bridge.sock"
    monkeypatch.setenv("TAPLOOM_LAB", "one")
    assert client.find_bridge() == f"unix:{tmp_path}/one/bridge.sock"
    monkeypatch.setenv("TAPLOOM_BRIDGE", "unix:/two")
    assert client.find_bridge() == "unix:/two"
    assert client.find_bridge(lab="three") == f"unix:{tmp_path}/three/bridge.sock"
    assert client.find_bridge("unix:/four", "three") == "unix:/four"


_LIGHT = """
import sys
from host_bridge.cli import main
try:
    main({arguments!r})
except SystemExit:
    pass
print([name for name in {forbidden!r} if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "forbidden"),
    [
        (["--help"], ["trio", "rich", "lab", "betterproto2", "h2"]),
        (["network", "ls", "--help"], ["trio", "rich", "lab", "betterproto2", "h2"]),
        (
            ["network", "ls", "--bridge", "unix:/nowhere"],
            ["trio", "taploom.rpc", "rich", "lab", "sqlite3", "host_bridge.fabric"],
        ),
    ],
)
def test_commands_import_only_what_they_use(arguments: list[str], forbidden: list[str]) -> None:
    script = _LIGHT.format(arguments=arguments, forbidden=forbidden)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ast.literal_eval(result.stderr.splitlines()[-1]) == []


_FOREIGN = """
import select, socket, sys
for module, names in ((socket, ("AF_VSOCK", "VMADDR_CID_ANY", "AF_NETLINK")), (select, ("epoll",))):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
sys.modules["pyroute2"] = None
sys.modules["trio"]  # imported before: trio itself chooses its poller by the platform
import host_bridge.__main__, host_bridge.cli, host_bridge.commands.status
"""


def test_imports_without_linux() -> None:
    subprocess.run([sys.executable, "-c", "import trio\n" + _FOREIGN], check=True)


# The service manager


def test_readiness_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(path)
        receiver.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        notify_ready()
        assert receiver.recv(100) == b"READY=1"
    notify_ready()  # nobody there: no error
    monkeypatch.setenv("NOTIFY_SOCKET", "vsock:2:1")
    notify_ready()
    monkeypatch.delenv("NOTIFY_SOCKET")
    notify_ready()


def test_units_start_the_bridge_as_it_is() -> None:
    from host_bridge.__main__ import build_parser

    units = importlib.resources.files("host_bridge") / "units"
    plist = plistlib.loads((units / "org.taploom.bridge.plist").read_bytes())
    assert build_parser().parse_args(plist["ProgramArguments"][1:]).socket.startswith("unix:")
    assert plist["KeepAlive"]
    service = configparser.ConfigParser(strict=False, interpolation=None)
    service.optionxform = str  # type: ignore[assignment, method-assign]
    service.read_string((units / "taploom-bridge.service").read_text())
    # systemd puts any number of arguments in the place of a variable without braces; the unit's own are none.
    command = [word for word in service["Service"]["ExecStart"].split() if word != "$TAPLOOM_OPTIONS"]
    arguments = build_parser().parse_args(command[1:])
    assert arguments.socket == "fd:3"
    assert arguments.docker_socket == f"unix:/run/{service['Service']['RuntimeDirectory']}/docker.sock"
    listen = configparser.ConfigParser(interpolation=None)
    listen.read_string((units / "taploom-bridge.socket").read_text())
    assert listen["Socket"]["ListenStream"] == str(client.RUN_DIRECTORY / "bridge.sock")
