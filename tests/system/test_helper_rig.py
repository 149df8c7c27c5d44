"""A helper agent in a namespace of its own, and guests whose links the test holds; its own tests at the end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from agent_helper.spares import SpareTaps
from taploom.address import UnixAddress, connect
from taploom.contracts.taploom.helper.v1 import (
    ApplyEndpointRequest,
    ApplyNetworkRequest,
    AuthorizeLinkRequest,
    Daemon,
    DaemonState,
    DeleteEndpointRequest,
    DeleteNetworkRequest,
    Endpoint,
    EndpointStatus,
    GetHealthRequest,
    GetInfoRequest,
    HelperFeature,
    Network,
    Uplink,
)
from taploom.contracts.taploom.helper.v1.rpc import BalancerServiceClient, HelperServiceClient, MirrorServiceClient
from taploom.contracts.taploom.link.v1 import LinkFeature
from taploom.link import Dataplane, Tap, dial_link, new_secret, open_dataplane
from taploom.rpc import RpcError, open_channel

pytestmark = pytest.mark.system

T = TypeVar("T")
PATIENCE = 60.0  # s for what takes milliseconds on a machine that has nothing else to do
FEATURES = frozenset({LinkFeature.VNET_HDR, LinkFeature.TSO})
UPLINK = Uplink(addresses=["169.254.128.1/18", "fd00:0:0:ffff::1/64"], mac_address="02:00:00:00:ff:01")
_libc = ctypes.CDLL(None, use_errno=True)


def sh(*args: str, check: bool = True) -> str:
    """Runs a command; its standard output."""
    done = subprocess.run(args, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(args)}: {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def in_netns(name: str, function: Callable[[], T]) -> T:
    """Runs the function with this thread in a named namespace."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    inside = os.open(f"/run/netns/{name}", os.O_RDONLY)
    try:
        assert _libc.setns(inside, 0x40000000) == 0
        try:
            return function()
        finally:
            assert _libc.setns(before, 0x40000000) == 0
    finally:
        os.close(inside)
        os.close(before)


async def eventually(condition: Callable[[], object], within: float = PATIENCE) -> None:
    """Returns once the condition holds."""
    with trio.fail_after(within):
        while not condition():
            await trio.sleep(0.02)


async def answered(*questions: Callable[[], bool]) -> list[bool]:
    """The answers to questions that are asked at once: those that nobody answers take their time."""
    answers = [False] * len(questions)

    async def ask(place: int) -> None:
        answers[place] = await trio.to_thread.run_sync(questions[place], limiter=limiter)

    limiter = trio.CapacityLimiter(16)
    async with trio.open_nursery() as nursery:
        for place in range(len(questions)):
            nursery.start_soon(ask, place)
    return answers


def network(number: int, *, ipv6: bool = False, **fields: object) -> Network:
    """Network `n<number>` with subnet 10.77.<number>.0/24."""
    subnets, gateways = [f"10.77.{number}.0/24"], [f"10.77.{number}.1"]
    if ipv6:
        subnets.append(f"fd00:77:{number}::/64")
        gateways.append(f"fd00:77:{number}::1")
    values: dict[str, object] = {
        "network_id": f"n{number}",
        "name": f"net{number}",
        "subnets": subnets,
        "gateways": gateways,
        "gateway_mac": f"02:00:00:00:{number:02x}:01",
        "mtu": 1500,
        "dns_servers": [f"169.254.64.{number}"],
        "dns_mac": f"02:00:00:00:{number:02x}:fd",
    }
    return Network(**(values | fields))  # type: ignore[arg-type]


def endpoint(number: int, host: int, *names: str, ipv6: bool = False, **fields: object) -> Endpoint:
    """Endpoint `e<number>-<host>` in network `n<number>` with address 10.77.<number>.<host>."""
    addresses = [f"10.77.{number}.{host}"]
    if ipv6:
        addresses.append(f"fd00:77:{number}::{host:x}")
    values: dict[str, object] = {
        "endpoint_id": f"e{number}-{host}",
        "network_id": f"n{number}",
        "mac_address": f"02:00:00:00:{number:02x}:{host:02x}",
        "addresses": addresses,
        "names": list(names),
    }
    return Endpoint(**(values | fields))  # type: ignore[arg-type]


def outgoing(number: int, **fields: object) -> Network:
    """Network `n<number>` of both families, with a leg on the uplink."""
    values: dict[str, object] = {
        "uplink_addresses": [f"169.254.128.{number + 1}/18", f"fd00:0:0:ffff::{number + 1:x}/64"],
        "uplink_mac": f"02:00:00:00:ff:{number + 1:02x}",
    }
    return network(number, ipv6=True, **(values | fields))


def listen(netns: str, address: str, port: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    """A server's socket in a namespace."""

    def make() -> socket.socket:
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        sock.settimeout(10)
        if kind == socket.SOCK_STREAM:
            sock.listen()
        return sock

    return in_netns(netns, make)


def dial(netns: str, address: str, port: int, within: float = 10) -> socket.socket:
    """A connection from a namespace."""
    return in_netns(netns, lambda: socket.create_connection((address, port), within))


@dataclass
class Guest:
    """A namespace with one interface, whose link the test's own data plane carries."""

    netns: str
    interface: str
    tap: Tap
    link_id: str

    def run(self, *args: str, check: bool = True) -> str:
        return sh("ip", "netns", "exec", self.netns, *args, check=check)

    def ping(self, address: str, count: int = 1, wait: int = 10) -> bool:
        return " 0% packet loss" in self.run("ping", "-n", f"-c{count}", "-i0.1", f"-W{wait}", address, check=False)

    def dig(self, server: str, *question: str) -> str:
        return self.run("dig", f"@{server}", "+tries=1", "+time=5", *question, check=False).strip()

    def raw(self) -> socket.socket:
        """A packet socket on the interface: sends and receives whole frames."""

        def make() -> socket.socket:
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            sock.bind((self.interface, 0))
            sock.setblocking(False)
            return sock

        return in_netns(self.netns, make)


@dataclass
class Rig:
    """A running helper agent."""

    netns: str
    folder: Path
    dataplane: Dataplane
    nursery: trio.Nursery
    process: subprocess.Popen[bytes] | None = None
    client: HelperServiceClient = field(init=False)
    balancers: BalancerServiceClient = field(init=False)
    mirrors: MirrorServiceClient = field(init=False)
    guests: list[Guest] = field(default_factory=list)
    _channel_scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def data(self) -> UnixAddress:
        return UnixAddress(str(self.folder / "data.sock"))

    async def start(self) -> None:
        """Starts the agent and waits until it is ready."""
        argv = [
            *("ip", "netns", "exec", self.netns, sys.executable, "-m", "agent_helper"),
            *("--control", f"unix:{self.folder}/control.sock", "--data", str(self.data)),
            *("--state-dir", str(self.state), "--log-level", "debug" if os.environ.get("TLT_DEBUG") else "info"),
        ]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(argv, stdout=log, stderr=log, cwd=Path(__file__).parents[2])
        with trio.fail_after(PATIENCE):
            while True:
                try:
                    stream = await connect(UnixAddress(str(self.folder / "control.sock")))
                    # What an agent that was killed had just forked may still listen, and end.
                    await self.nursery.start(self._hold_channel, stream)
                except (OSError, RpcError):
                    assert self.process.poll() is None, self.log()
                    await trio.sleep(0.01)
                else:
                    break
            while not (await self.client.get_health(GetHealthRequest())).ready:
                assert self.process.poll() is None, self.log()
                await trio.sleep(0.01)

    async def _hold_channel(self, stream: trio.SocketStream, task_status: trio.TaskStatus[None]) -> None:
        with trio.CancelScope() as self._channel_scope:
            async with open_channel(stream) as channel:
                self.client = HelperServiceClient(channel)
                self.balancers = BalancerServiceClient(channel)
                self.mirrors = MirrorServiceClient(channel)
                task_status.started()
                await channel.wait_closed()

    async def stop(self, signum: signal.Signals = signal.SIGTERM) -> None:
        """Ends the agent and waits until it has ended."""
        with trio.CancelScope(shield=True):
            self._channel_scope.cancel()
            if self.process is not None:
                self.process.send_signal(signum)
                with trio.fail_after(PATIENCE):
                    while self.process.poll() is None:
                        await trio.sleep(0.01)
                self.process = None

    def log(self) -> str:
        return (self.folder / "log").read_text()

    async def daemons(self) -> dict[str, Daemon]:
        daemons = (await self.client.get_health(GetHealthRequest())).daemons
        return {daemon.name + (f"/{daemon.network_id}" if daemon.network_id else ""): daemon for daemon in daemons}

    async def apply(self, *messages: Network | Endpoint) -> list[EndpointStatus]:
        """Applies one after the other; the statuses of the endpoints among them."""
        statuses = []
        for message in messages:
            if isinstance(message, Network):
                await self.client.apply_network(ApplyNetworkRequest(network=message), timeout=PATIENCE)
            else:
                response = await self.client.apply_endpoint(ApplyEndpointRequest(endpoint=message), timeout=PATIENCE)
                assert response.status is not None
                statuses.append(response.status)
        return statuses

    async def delete_endpoint(self, endpoint_id: str) -> None:
        await self.client.delete_endpoint(DeleteEndpointRequest(endpoint_id=endpoint_id), timeout=PATIENCE)

    async def delete_network(self, network_id: str) -> None:
        await self.client.delete_network(DeleteNetworkRequest(network_id=network_id), timeout=PATIENCE)

    async def guest(self, message: Endpoint, *, mtu: int = 1500, gateway: str = "", dns: str = "") -> Guest:
        """Applies the endpoint and makes a guest with its interface up and its link joined."""
        await self.apply(message)
        name = f"tltg{secrets.token_hex(4)}"
        sh("ip", "netns", "add", name)
        tap = await trio.to_thread.run_sync(in_netns, name, lambda: Tap.open("eth0"))
        guest = Guest(name, "eth0", tap, f"{message.endpoint_id}-{name}")
        self.guests.append(guest)
        sh("ip", "-n", name, "link", "set", "lo", "up")
        sh("ip", "-n", name, "link", "set", "eth0", "address", message.mac_address, "mtu", str(mtu), "up")
        for address in message.addresses:
            length, nodad = ("64", ["nodad"]) if ":" in address else ("24", [])
            sh("ip", "-n", name, "addr", "add", f"{address}/{length}", "dev", "eth0", *nodad)
        if gateway:
            sh("ip", "-n", name, "route", "add", "default", "via", gateway)
        if dns:
            sh("ip", "-n", name, "route", "add", f"{dns}/32", "dev", "eth0", "scope", "link")
        await self.link(guest, message.endpoint_id)
        return guest

    async def link(self, guest: Guest, endpoint_id: str) -> None:
        """Joins the guest's interface with the helper's endpoint by a data link."""
        secret = new_secret()
        await self.client.authorize_link(AuthorizeLinkRequest(endpoint_id=endpoint_id, secret=secret))
        stream, features = await dial_link(self.data, endpoint_id=endpoint_id, secret=secret, features=FEATURES)
        await self.dataplane.stop(guest.link_id)
        guest.tap.set_offloads(features)
        self.dataplane.attach_pump(guest.link_id, guest.tap.fileno(), stream, features, lambda reason: None)
        guest.tap.set_carrier(True)

    async def drop(self, guest: Guest) -> None:
        """Removes the guest and its side of the link."""
        await self.dataplane.detach(guest.link_id)
        guest.tap.close()
        sh("ip", "netns", "del", guest.netns, check=False)
        self.guests.remove(guest)

    def db(self, database: str, *args: str) -> str:
        """What a database has: `ovn-nbctl` or `ovs-vsctl` and the like."""
        program = {"nb": "ovn-nbctl", "sb": "ovn-sbctl", "conf": "ovs-vsctl"}[database]
        return sh(program, f"--db=unix:{self.state}/run/db.sock", "--timeout=5", *args)

    def count(self) -> dict[str, int]:
        """How much of everything there is: to compare before and after."""
        assert self.process is not None
        pid = self.process.pid
        counts = {
            "interfaces": len(sh("ip", "-n", self.netns, "-o", "link").splitlines()),
            "fds": len(list(Path(f"/proc/{pid}/fd").iterdir())),
            "children": len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()),
            "names": len(list((self.state / "run" / "dns").glob("*"))) if (self.state / "run" / "dns").exists() else 0,
        }
        for table in ("Port", "Interface"):
            counts[table] = len(self.db("conf", "--bare", "--columns=_uuid", "list", table).split())
        for table in ("Logical_Switch", "Logical_Router", "Logical_Switch_Port", "Logical_Router_Port"):
            counts[table] = len(self.db("nb", "--bare", "--columns=_uuid", "list", table).split())
        for table in ("Port_Binding", "Datapath_Binding"):
            counts[table] = len(self.db("sb", "--bare", "--columns=_uuid", "list", table).split())
        return counts

    def spares(self) -> set[str]:
        """The TAPs that are plugged for nobody yet."""
        found = self.db("conf", "--bare", "--columns=name", "find", "Interface", "external_ids:taploom-spare=true")
        return set(found.split())

    async def counted(self) -> dict[str, int]:
        """As `count`, once no spare TAP is missing and what has been removed is gone."""
        spares = SpareTaps.COUNT

        def settled() -> bool:
            found = self.count(), self.spares(), self.count()
            return found[0] == found[2] and len(found[1]) == spares

        await eventually(settled)
        return self.count()


@contextlib.asynccontextmanager
async def helper() -> AsyncIterator[Rig]:
    """A helper agent that is ready; everything of it is gone at the end."""
    name = f"tlth{secrets.token_hex(4)}"
    folder = Path(tempfile.mkdtemp(prefix="tlt"))
    sh("ip", "netns", "add", name)
    async with open_dataplane() as dataplane, trio.open_nursery() as nursery:
        rig = Rig(name, folder, dataplane, nursery)
        try:
            await rig.start()
            yield rig
        except BaseException:
            # An agent that is ending by an error has yet to say which.
            with trio.move_on_after(5) as patience, contextlib.suppress(AttributeError):
                patience.shield = True
                while rig.process.poll() is None:
                    await trio.sleep(0.05)
            sys.stderr.write(rig.log()[-20000:])
            raise
        finally:
            with trio.CancelScope(shield=True):
                for guest in list(rig.guests):
                    await rig.drop(guest)
                try:
                    await rig.stop()
                finally:
                    sh("ip", "netns", "del", name, check=False)
                    shutil.rmtree(folder, ignore_errors=True)


def received(sock: socket.socket) -> list[bytes]:
    """The frames that have arrived at a packet socket."""
    frames = []
    while True:
        try:
            frames.append(sock.recv(65535))
        except BlockingIOError:
            return frames


async def rpc_status(call: Callable[[], object]) -> str:
    """The name of the status that the call fails with."""
    try:
        await call()  # type: ignore[misc]
    except RpcError as exc:
        assert exc.message
        return exc.code.name
    return "OK"


async def test_two_endpoints_reach_each_other() -> None:
    async with helper() as rig:
        info = await rig.client.get_info(GetInfoRequest())
        assert HelperFeature.EVENTS in info.features
        assert info.ovs_version[0].isdigit()
        assert info.ovn_version[0].isdigit()
        await rig.apply(network(1))
        a = await rig.guest(endpoint(1, 2, "web"), dns="169.254.64.1")
        b = await rig.guest(endpoint(1, 3, "db", "postgres"))
        assert a.ping("10.77.1.3"), rig.log()
        assert b.ping("10.77.1.2")
        assert a.ping("10.77.1.1"), "gateway"
        assert a.dig("169.254.64.1", "+short", "db.net1") == "10.77.1.3"
        daemons = await rig.daemons()
        assert {"ovsdb-server", "ovs-vswitchd", "ovn-northd", "ovn-controller", "dnsmasq/n1"} == set(daemons)
        assert all(daemon.state == DaemonState.RUNNING for daemon in daemons.values())
        for name in ("ovs-vswitchd", "ovn-northd", "ovn-controller"):
            assert "/libjemalloc.so" in Path(f"/proc/{daemons[name].pid}/maps").read_text()
