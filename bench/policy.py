"""`python -m bench.policy`: what 500 rules and 300 endpoints cost: applying them, and connecting a guest under them.

Two labs are up at the same time: an empty one, with two guests, and one with 300 endpoints and the rules. A guest is
connected to a network of either in turn, so that a noisy moment hits both alike; each connect begins at rest, not in
what the one before has left to do. A request every millisecond, from before the call on, shows when the first reply
comes. In the full lab everything is denied that no rule allows.

All of it is measured with this machine's OVN, and then with the one of the helper's image, which bench/setup.sh keeps
in the cache: what OVN does for each change depends on its release.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import click
import trio
from rich.console import Console

from bench import report
from bench.machine import describe, version_of
from bench.paths import PROBE_PORT
from bench.paths.taploom import PROGRAM, HotGuest, Lab, address_of
from bench.processes import CpuTimes, wait_at_rest
from bench.run import CACHE, BenchError, Netns, Run, open_run
from taploom.address import connect, parse_address
from taploom.contracts.taploom.bridge.v1 import ConnectGuestRequest, CreateNetworkRequest
from taploom.contracts.taploom.bridge.v1.rpc import NetworkServiceClient
from taploom.rpc import open_channel

HOT = "hot"
RESULTS = Path(__file__).parent / "results"
IMAGE_OVN = CACHE / "ovn" / "bin"
WANTED = 1.3  # of an empty fabric's connect time, at most
_AT_ONCE = 8
_REST = 5.0  # s, at most


@dataclass
class Side:
    """A lab, and what was measured in it, in milliseconds."""

    name: str
    hot: HotGuest
    first_reply_ms: list[float] = field(default_factory=list)
    returned_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Size:
    rules: int
    networks: int
    connects: int

    @property
    def endpoints(self) -> int:
        return 10 * self.networks


@dataclass
class Figures:
    """What was measured with one release of OVN; times in milliseconds, of applying in seconds.

    Attributes:
        connects: by what the fabric has, to the first reply and to the call's return.
        shares: medians to the first reply in parts of the empty fabric's, measured in turn with it.
        stolen: the part of the processors' time that the hypervisor gave to others meanwhile.
    """

    ovn: str
    ovs: str
    apply_s: float = 0.0
    apply_changed_s: float = 0.0
    connects: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    stolen: float = 0.0

    def add(self, empty: Side, full: Side) -> None:
        """Takes what was measured in the two labs in turn."""
        for side in (empty, full):
            both = self.connects.setdefault(side.name, {"first_reply_ms": [], "returned_ms": []})
            both["first_reply_ms"] += side.first_reply_ms
            both["returned_ms"] += side.returned_ms
        self.shares[full.name] = statistics.median(full.first_reply_ms) / statistics.median(empty.first_reply_ms)
        for side in (empty, full):
            side.first_reply_ms, side.returned_ms = [], []


@click.command(help="Measure what rules and endpoints cost, with each OVN that there is (root).")
@click.option("--rules", default=500, show_default=True)
@click.option("--endpoints", default=300, show_default=True)
@click.option("--connects", default=20, show_default=True, help="How often in each lab.")
@click.option("--quick", is_flag=True, help="40 rules, 40 endpoints, 3 connects: shows that it works.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    show_default=True,
    help="Where policy.json and policy.md are written.",
)
def main(*, rules: int, endpoints: int, connects: int, quick: bool, as_json: bool, output: Path) -> None:
    """Measures, prints and writes the figures."""
    messages = Console(stderr=True)
    machine = describe()
    machine["kind"] = "quick: not a measurement" if quick else "full"
    size = Size(40, 4, 3) if quick else Size(rules, max(1, endpoints // 10), connects)
    measured: list[Figures] = []
    try:
        for number, programs in enumerate((None, IMAGE_OVN)):
            if programs is not None and not (programs / "ovn-northd").exists():
                messages.print("the OVN of the helper's image is not there: run bench/setup.sh", markup=False)
                continue
            with open_run() as run:
                measured.append(_measure(run, number, programs, size, messages))
    except BenchError as error:
        messages.print(f"bench: {error}", style="bold red", markup=False)
        sys.exit(1)
    document = {
        "machine": machine,
        **dataclasses.asdict(size),
        "figures": [dataclasses.asdict(one) for one in measured],
    }
    tables = _tables(machine, size, measured)
    report.publish(document, tables, as_json=as_json, output=output, name="policy")


def _measure(run: Run, number: int, programs: Path | None, size: Size, messages: Console) -> Figures:
    figures = Figures(_version(programs, "ovn-northd"), _version(programs, "ovs-vswitchd"))
    times = CpuTimes.now()
    empty = _lab(run, f"empty{number}", ["client", "server"], programs)
    full = _lab(run, f"full{number}", ["client", "server", *(f"guest{n}" for n in range(8))], programs)
    empty.name = "empty"
    messages.print(f"OVN {figures.ovn}: connecting {size.endpoints} endpoints", markup=False)
    trio.run(_populate, full.hot.bridge, size.networks)
    full.name = f"{size.endpoints} endpoints"
    _connects(run, [empty, full], size.connects)
    figures.add(empty, full)
    path = run.directory / "policy.yaml"
    path.write_text(json.dumps(_policy(size.rules, size.networks)))
    messages.print(f"applying {size.rules} rules", markup=False)
    figures.apply_s = _timed(full.hot.lab, "policy", "apply", "-f", str(path))
    path.write_text(json.dumps(_policy(size.rules, size.networks, changed=1)))
    figures.apply_changed_s = _timed(full.hot.lab, "policy", "apply", "-f", str(path))
    full.name = f"{size.endpoints} endpoints, {size.rules} rules"
    _connects(run, [empty, full], size.connects)
    figures.add(empty, full)
    figures.stolen = times.stolen_since()
    return figures


def _version(programs: Path | None, program: str) -> str:
    where = program if programs is None else str(programs / program)
    return version_of(where, "--version")


def _tables(machine: dict[str, str], size: Size, measured: list[Figures]) -> list[report.Grid]:
    connects: list[tuple[str, ...]] = []
    wanted: list[tuple[str, ...]] = []
    for one in measured:
        for name, times in one.connects.items():
            share = f"{one.shares[name]:.2f}x" if name in one.shares else "1"
            connects.append((one.ovn, name, _spread(times["first_reply_ms"]), _spread(times["returned_ms"]), share))
        for name, value in one.shares.items():
            reached = "reached" if value <= WANTED else "NOT reached"
            wanted.append((f"OVN {one.ovn}, {name}", f"at most {WANTED:.2f}x", f"{value:.2f}x", reached))
    return [
        report.Grid("Machine", ("", ""), list(machine.items())),
        report.Grid(
            "Hot connect by API, ms: median (least to most)",
            ("OVN", "fabric", "call to first reply", "call to return", "of an empty fabric's"),
            connects,
        ),
        report.Grid(
            f"Applying {size.rules} rules to {size.endpoints} endpoints, s, until they are in force",
            ("OVN", "Open vSwitch", "at first", "some of them changed", "stolen time"),
            [
                (one.ovn, one.ovs, f"{one.apply_s:.2f}", f"{one.apply_changed_s:.2f}", f"{one.stolen:.0%}")
                for one in measured
            ],
        ),
        report.Grid("Wanted of connecting", ("with", "wanted", "measured", "reached"), wanted),
    ]


def _lab(run: Run, name: str, guests: list[str], programs: Path | None) -> Side:
    lab = Lab(run, f"bench{os.getpid()}{name}", programs)
    run.guard(PROGRAM, "--lab", lab.name, "lab", "down")
    run.stack.callback(lab.command, "lab", "down")
    lab.command("lab", "up", *(part for guest in guests for part in ("--guest", guest)))
    lab.command("network", "create", HOT)
    lab.command("network", "connect", HOT, "server")
    address = address_of(json.loads(lab.command("network", "inspect", HOT, "--json")), "server")
    status = lab.status()
    client, server = (
        Netns(f"/run/netns/{guest['netns']}")
        for wanted in ("client", "server")
        for guest in status["guests"]
        if guest["name"] == wanted
    )
    run.spawn_ready(*server.command(*run.netprobe("serve", PROBE_PORT)), name="netprobe")
    return Side(name, HotGuest(lab, status["bridge"], client, server, address, HOT, "client"))


async def _populate(bridge: str, networks: int) -> None:
    """Ten guests on each of so many networks."""
    guests = ["client", "server", *(f"guest{n}" for n in range(8))]
    limit = trio.CapacityLimiter(_AT_ONCE)
    async with open_channel(await connect(parse_address(bridge))) as channel:
        client = NetworkServiceClient(channel)

        async def join(network: str, guest: str) -> None:
            async with limit:
                await client.connect_guest(ConnectGuestRequest(network=network, guest=guest), timeout=60)

        for number in range(networks):
            # There are fewer default subnets than that.
            request = CreateNetworkRequest(name=f"net{number}", subnets=[f"10.200.{number}.0/24"])
            await client.create_network(request, timeout=60)
            async with trio.open_nursery() as nursery:
                for guest in guests:
                    nursery.start_soon(join, f"net{number}", guest)


def _policy(rules: int, networks: int, *, changed: int = 0) -> dict[str, object]:
    """Ten rules a group, each group with four guests of one network; everything is denied by default.

    Args:
        changed: added to a port of one group.
    """
    groups: dict[str, object] = {}
    count = max(2, rules // 10)
    for number in range(1, count):
        network = f"net{number % networks}"
        other = (number + networks) % count or 1
        incoming = [
            {"group": f"group{other}"},
            {"guest": "client", "network": network},
            {"cidr": f"10.{number}.0.0/16"},
        ]
        groups[f"group{number}"] = {
            "members": [{"guest": f"guest{(number + n) % 8}", "network": network} for n in range(4)],
            "in": [
                {
                    "name": f"rule{n}",
                    "protocol": "tcp",
                    "ports": [8000 + n + changed * (number == 1), f"{9000 + 10 * n}-{9009 + 10 * n}"],
                    "from": [incoming[n % 3]],
                }
                for n in range(5)
            ],
            "out": [
                {"name": f"rule{n}", "protocol": "udp", "ports": 9000 + n, "to": [{"group": f"group{number}"}]}
                for n in range(5)
            ],
        }
    # What the measurement itself needs.
    probes = [{"name": f"probe{n}", "protocol": "udp", "ports": int(PROBE_PORT) + n} for n in range(5)]
    groups["group0"] = {
        "members": [{"guest": "client", "network": HOT}, {"guest": "server", "network": HOT}],
        "in": probes,
        "out": probes,
    }
    return {
        "networks": dict.fromkeys((HOT, *(f"net{number}" for number in range(networks))), "deny"),
        "groups": groups,
    }


def _timed(lab: Lab, *argv: str) -> float:
    start = time.monotonic()
    lab.command(*argv)
    return time.monotonic() - start


def _connects(run: Run, sides: list[Side], times: int) -> None:
    for number in range(-1, times):  # the first makes what is made once
        for side in sides if number % 2 else reversed(sides):
            _once(run, side, counts=number >= 0)


def _once(run: Run, side: Side, *, counts: bool) -> None:
    wait_at_rest(_REST)
    probe = run.spawn_ready(
        *side.hot.client.command(*run.netprobe("first", side.hot.address, PROBE_PORT, "10000", "1000")), name="first"
    )
    start, returned = side.hot.connect("API")
    output, _ = probe.communicate(timeout=60)
    if probe.returncode != 0:
        raise BenchError(f"no reply in 10 s in the lab with {side.name}")
    side.hot.disconnect()
    if counts:
        side.first_reply_ms.append((json.loads(output)["first_ns"] - start) / 1e6)
        side.returned_ms.append((returned - start) / 1e6)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f}-{max(values):.0f})"


if __name__ == "__main__":
    main()
