"""`python -m bench --vm`: guest VM to guest VM, beside what the same VMs' vsock can carry at best.

Three paths between the same two VMs, with the same vhost-device-vsock and QEMU processes, measured in turn:

- raw: bytes from a C program in one VM to one in the other, through a relay on the host: the vsock's limit for two VMs;
- raw, helper: the same through a C program in the helper VM as well, which is where the fabric's frames have to go;
- taploom: TCP and ICMP through the whole fabric.

All write as much at once as taploom does (28 KiB), and the relay on the host is taploom's on every path.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from bench.machine import describe
from bench.report import Grid
from bench.run import BenchError, Run
from bench.vsockpeer import PORT, Operation, Result, compile_static, open_stream, result
from taploom.address import Address, parse_address
from taploom.link.dataplane import Dataplane, open_dataplane

__all__ = ["measure"]

PROGRAM = str(Path(sys.executable).with_name("taploom"))
WRITE = 28 * 1024
WANTED = 0.6
_MTUS = (1500, 65520)
_PEER = "/run/vsockpeer"
_TIMEOUT = 900.0
_TRIES = 10


@dataclass(frozen=True)
class Plan:
    """How much is measured: rounds; seconds of iperf3, and those before that do not count, in which TCP finds its rate
    (its round trips here are of 100 ms and more); bytes of a raw stream; round trips."""

    rounds: int
    seconds: int
    start_seconds: int
    raw_bytes: int
    pings: int


FULL = Plan(rounds=5, seconds=6, start_seconds=3, raw_bytes=192 << 20, pings=400)
QUICK = Plan(rounds=1, seconds=2, start_seconds=2, raw_bytes=32 << 20, pings=50)


@dataclass
class Figures:
    """What was measured, by path, one value a round: Gb/s; processor time in ms per MB, of everything that carries the
    bytes; round trips in ms (p50, p99)."""

    gbps: dict[str, list[float]] = field(default_factory=dict)
    cpu_ms: dict[str, list[float]] = field(default_factory=dict)
    p50_ms: dict[str, list[float]] = field(default_factory=dict)
    p99_ms: dict[str, list[float]] = field(default_factory=dict)
    load: list[float] = field(default_factory=list)

    def ratio(self, path: str, against: str) -> float | None:
        """The median of the rounds' ratios: the two paths of a round were measured within seconds of each other."""
        pairs = zip(self.gbps.get(path, []), self.gbps.get(against, []), strict=False)
        ratios = [mine / theirs for mine, theirs in pairs]
        return statistics.median(ratios) if ratios else None


class _Lab:
    """A lab of two guest VMs and the helper VM."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.name = f"benchvm{os.getpid()}"
        self.path = Path("/run/taploom") / self.name
        self._numbers = itertools.count(1)

    def command(self, *argv: str, timeout: float = _TIMEOUT) -> str:
        """Runs a command of taploom's; what the bridge gives up on is asked for again: emulated VMs may be slow."""
        given_up = 0
        while True:
            try:
                return self.run.check(PROGRAM, "--lab", self.name, *argv, timeout=timeout)
            except BenchError as error:
                if given_up and "already" in str(error):
                    return ""
                given_up += 1
                if "given up after" not in str(error) or given_up == _TRIES:
                    raise

    def up(self) -> None:
        self.run.guard(PROGRAM, "--lab", self.name, "lab", "down")
        self.run.stack.callback(self.command, "lab", "down")
        self.command("lab", "up", "--vm", "--guest", "client", "--guest", "server")
        program = compile_static(self.run.directory / "vsockpeer")
        for vm in ("client", "server", "helper"):
            self._start_peer(vm, program)
        for mtu in _MTUS:
            self.command("network", "create", f"mtu{mtu}", "--mtu", str(mtu))
            for guest in ("client", "server"):
                self.command("network", "connect", f"mtu{mtu}", guest)

    def _start_peer(self, vm: str, program: Path) -> None:
        script = f"cat >{_PEER} && chmod 755 {_PEER} && {{ {_PEER} </dev/null >/dev/null 2>&1 & }}"
        with program.open("rb") as source:
            subprocess.run(
                [PROGRAM, "--lab", self.name, "lab", "exec", vm, "--", "sh", "-c", script],
                stdin=source,
                check=True,
                timeout=120,
            )

    def processor_seconds(self) -> float:
        """What the lab's VMs, their vsock devices and the bridge have used so far, and we, the raw paths' relay.

        /proc/PID/task/TID/schedstat has it to the nanosecond (Documentation/scheduler/sched-stats.rst).
        """
        used = time.process_time()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (process / "cmdline").read_bytes()
                if not words.startswith(sys.executable.encode()) and b"qemu" not in words and b"vhost" not in words:
                    continue
                if f"{self.path}/".encode() in words:
                    tasks = (process / "task").glob("[0-9]*/schedstat")
                    used += sum(int(task.read_text().split()[0]) for task in tasks) / 1e9
        return used

    def peer(self, vm: str) -> Address:
        directory = self._directories()[vm]
        return parse_address(f"hybrid:{directory}/vsock.sock:{PORT}")

    def _directories(self) -> dict[str, Path]:
        return {socket.parent.name: socket.parent for socket in self.path.rglob("vsock.sock")}

    def in_guest(self, guest: str, *argv: str) -> str:
        return self.command("lab", "exec", guest, "--", *argv)

    def address(self, guest: str, network: str) -> str:
        document = json.loads(self.command("network", "inspect", network, "--json"))
        for endpoint in document["endpoints"]:
            if guest in (endpoint.get("guest_name"), endpoint.get("guestName")):
                return str(next(a.partition("/")[0] for a in endpoint["addresses"] if ":" not in a))
        raise BenchError(f"{guest} is not on {network}")

    # raw

    async def raw(self, plan: Plan, *, helper: bool) -> tuple[float, float]:
        """Gb/s of one raw stream from client to server, and the processor time in ms per MB."""
        number = next(self._numbers)
        async with open_dataplane() as plane:
            sender = await open_stream(self.peer("client"), Operation.STREAM, number, size=WRITE, send=plan.raw_bytes)
            receiver = await open_stream(
                self.peer("server"), Operation.STREAM, number, size=WRITE, receive=plan.raw_bytes
            )
            began, used = time.monotonic(), self.processor_seconds()
            await self._join(plane, number, sender, receiver, helper=helper)
            seen = await self._result("server", number)
            took, used = time.monotonic() - began, self.processor_seconds() - used
        if seen.received != plan.raw_bytes or seen.wrong is not None:
            raise BenchError(f"the raw stream broke: {seen}")
        return plan.raw_bytes * 8 / took / 1e9, used * 1e9 / plan.raw_bytes

    async def raw_pings(self, plan: Plan, *, helper: bool) -> Result:
        """Round trips of 64 bytes, one after the other."""
        number = next(self._numbers)
        async with open_dataplane() as plane:
            echo = await open_stream(self.peer("server"), Operation.ECHO, number)
            ping = await open_stream(self.peer("client"), Operation.PING, number, size=64, send=plan.pings)
            await self._join(plane, number, ping, echo, helper=helper)
            return await self._result("client", number)

    async def _result(self, vm: str, number: int) -> Result:
        with trio.move_on_after(300):
            return await result(self.peer(vm), number)
        raise BenchError(f"the raw stream {number} stalled")

    async def _join(
        self, plane: Dataplane, number: int, one: trio.SocketStream, other: trio.SocketStream, *, helper: bool
    ) -> None:
        def down(_reason: str) -> None:
            pass

        if not helper:
            plane.attach_relay(f"{number}", one, other, down)
            return
        ends = [await open_stream(self.peer("helper"), Operation.JOIN, number) for _ in range(2)]
        plane.attach_relay(f"{number} out", one, ends[0], down)
        plane.attach_relay(f"{number} in", ends[1], other, down)

    # the fabric

    def tcp(self, plan: Plan, mtu: int) -> tuple[float, float]:
        """As `raw`, of one TCP connection. Gb/s are what the receiver counts; the first seconds are left out."""
        server = self.run.spawn(
            *(PROGRAM, "--lab", self.name, "lab", "exec", "server", "--", "iperf3", "-s", "-1", "--forceflush"),
            name="iperf3-server",
        )
        assert server.stdout is not None
        while "listening" not in (line := server.stdout.readline()):
            if not line:
                raise BenchError(f"iperf3 did not start: {self.run.log_of(server)}")
        address = self.address("server", f"mtu{mtu}")
        used = self.processor_seconds()
        text = self.in_guest(
            *("client", "iperf3", "-c", address, "-t", str(plan.seconds), "-O", str(plan.start_seconds), "-J")
        )
        used = self.processor_seconds() - used
        server.wait(30)
        document = json.loads(text)
        sent = sum(int(interval["sum"]["bytes"]) for interval in document["intervals"])  # the first seconds' too
        return float(document["end"]["sum_received"]["bits_per_second"]) / 1e9, used * 1e9 / sent

    def icmp(self, plan: Plan) -> list[float]:
        """Round trips in ms."""
        address = self.address("server", f"mtu{_MTUS[0]}")
        text = self.in_guest("client", "ping", "-n", "-c", str(plan.pings), "-i", "0.01", "-s", "22", address)
        return sorted(float(value) for value in re.findall(r"time=([\d.]+) ms", text))


def measure(run: Run, *, quick: bool, say: Callable[[str], None]) -> tuple[dict[str, str], Figures]:
    """Brings up a lab on VMs and measures. Raises BenchError."""
    plan = QUICK if quick else FULL
    machine = describe()
    lab = _Lab(run)
    say("bringing up two guest VMs and the helper VM")
    lab.up()
    machine["accelerator"] = _accelerator(lab)
    figures = Figures()

    def add(table: dict[str, list[float]], path: str, value: float, unit: str) -> None:
        table.setdefault(path, []).append(value)
        say(f"  {path}: {value:.3f} {unit}")

    def add_stream(path: str, measured: tuple[float, float]) -> None:
        add(figures.gbps, path, measured[0], "Gb/s")
        figures.cpu_ms.setdefault(path, []).append(measured[1])

    for number in range(plan.rounds):
        figures.load.append(os.getloadavg()[0])
        say(f"round {number + 1} of {plan.rounds} (load {figures.load[-1]:.1f})")
        add_stream("raw", trio.run(_call(lab.raw, plan, helper=False)))
        for mtu in _MTUS:
            add_stream(f"taploom, MTU {mtu}", lab.tcp(plan, mtu))
        add_stream("raw, helper", trio.run(_call(lab.raw, plan, helper=True)))
        for path, helper in (("raw", False), ("raw, helper", True)):
            seen: Result = trio.run(_call(lab.raw_pings, plan, helper=helper))
            add(figures.p50_ms, path, seen.p50 * 1e3, "ms")
            figures.p99_ms.setdefault(path, []).append(seen.p99 * 1e3)
        samples = lab.icmp(plan)
        if not samples:
            raise BenchError("no ping was answered")
        add(figures.p50_ms, "taploom", samples[len(samples) // 2], "ms")
        figures.p99_ms.setdefault("taploom", []).append(samples[len(samples) * 99 // 100])
    return machine, figures


def _call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[[], Any]:
    async def call() -> Any:
        return await function(*arguments, **options)

    return call


def _accelerator(lab: _Lab) -> str:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"-accel" in words and any(lab.name.encode() in word for word in words):
            return words[words.index(b"-accel") + 1].decode().partition(",")[0]
    return "unknown"


def grids(machine: dict[str, str], figures: Figures) -> list[Grid]:
    """The figures as tables."""

    def spread(values: list[float], digits: int) -> str:
        if not values:
            return "-"
        middle, least, most = statistics.median(values), min(values), max(values)
        return f"{middle:.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"

    def ratio(path: str, against: str) -> str:
        value = figures.ratio(path, against)
        return "-" if value is None else f"{value:.2f}"

    rows: list[tuple[str, ...]] = [
        (
            path,
            spread(values, 3),
            ratio(path, "raw"),
            ratio(path, "raw, helper"),
            spread(figures.cpu_ms.get(path, []), 0),
        )
        for path, values in figures.gbps.items()
    ]
    trips: list[tuple[str, ...]] = [
        (path, spread(values, 2), spread(figures.p99_ms.get(path, []), 2)) for path, values in figures.p50_ms.items()
    ]
    best = {
        against: max((figures.ratio(f"taploom, MTU {mtu}", against) or 0 for mtu in _MTUS), default=0)
        for against in ("raw", "raw, helper")
    }
    wanted: list[tuple[str, ...]] = [
        (
            f"throughput at the best MTU against {against}",
            f"at least {WANTED}",
            f"{value:.2f}",
            "reached" if value >= WANTED else "NOT reached",
        )
        for against, value in best.items()
    ]
    return [
        Grid("Machine", ("what", "value"), [*machine.items(), ("load in each round", _loads(figures))]),
        Grid(
            "Guest VM to guest VM, one stream: median (least to most)",
            ("path", "Gb/s", "of raw", "of raw through the helper VM", "processor ms per MB"),
            rows,
        ),
        Grid("Round trip, 64 bytes: median of the rounds' (least to most)", ("path", "p50 ms", "p99 ms"), trips),
        Grid("Wanted", ("what", "wanted", "measured", "reached"), wanted),
    ]


def _loads(figures: Figures) -> str:
    return ", ".join(f"{load:.1f}" for load in figures.load)
