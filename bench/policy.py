"""`python -m bench.policy`: what 500 rules and 300 endpoints cost: applying them, and connecting a guest under them.

Two labs are up at the same time: an empty one, with two guests, and one with 300 endpoints and the rules. A guest is
connected to a network of either in turn, so that a noisy moment hits both alike; a request every millisecond, from
before the call on, shows when the first reply comes. In the full lab everything is denied that no rule allows.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, field

import click
import trio
from rich.console import Console
from rich.table import Table

from bench.machine import describe
from bench.paths import PROBE_PORT
from bench.paths.taploom import PROGRAM, HotGuest, Lab, address_of
from bench.run import BenchError, Netns, Run, open_run
from taploom.address import connect, parse_address
from taploom.contracts.taploom.bridge.v1 import ConnectGuestRequest, CreateNetworkRequest
from taploom.contracts.taploom.bridge.v1.rpc import NetworkServiceClient
from taploom.rpc import open_channel

HOT = "hot"
_AT_ONCE = 8


@dataclass
class Side:
    """A lab, and what was measured in it, in milliseconds."""

    name: str
    hot: HotGuest
    first_reply_ms: list[float] = field(default_factory=list)
    returned_ms: list[float] = field(default_factory=list)


@click.command(help="Measure what rules and endpoints cost (root).")
@click.option("--rules", default=500, show_default=True)
@click.option("--endpoints", default=300, show_default=True)
@click.option("--connects", default=20, show_default=True, help="How often in each lab.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def main(rules: int, endpoints: int, connects: int, as_json: bool) -> None:
    """Measures and prints."""
    messages = Console(stderr=True)
    result: dict[str, object] = {"machine": describe(), "rules": rules, "endpoints": endpoints}
    try:
        with open_run() as run:
            networks = max(1, endpoints // 10)
            empty = _lab(run, "empty", ["client", "server"])
            full = _lab(run, "full", ["client", "server", *(f"guest{n}" for n in range(8))])
            messages.print(f"connecting {networks * 10} endpoints", markup=False)
            trio.run(_populate, full.hot.bridge, networks)
            crowded = Side(f"{networks * 10} endpoints, no rule", full.hot)
            _connects(run, [empty, crowded], connects)
            path = run.directory / "policy.yaml"
            path.write_text(json.dumps(_policy(rules, networks)))
            messages.print(f"applying {rules} rules", markup=False)
            result["apply_s"] = _timed(full.hot.lab, "policy", "apply", "-f", str(path))
            path.write_text(json.dumps(_policy(rules, networks, changed=1)))
            result["apply_changed_s"] = _timed(full.hot.lab, "policy", "apply", "-f", str(path))
            full.name = f"{networks * 10} endpoints, {rules} rules"
            empty.first_reply_ms, before = [], empty.first_reply_ms
            empty.returned_ms = []
            _connects(run, [empty, full], connects)
            result["load"] = os.getloadavg()[0]
            medians = {side.name: statistics.median(side.first_reply_ms) for side in (empty, full)}
            result["share"] = medians[full.name] / medians[empty.name]
            result["share_without_rules"] = statistics.median(crowded.first_reply_ms) / statistics.median(before)
    except BenchError as error:
        messages.print(f"bench: {error}", style="bold red", markup=False)
        sys.exit(1)
    sides = [empty, crowded, full]
    if as_json:
        click.echo(
            json.dumps(
                result
                | {
                    side.name: {"first_reply_ms": side.first_reply_ms, "returned_ms": side.returned_ms}
                    for side in sides
                },
                indent=2,
            )
        )
        return
    table = Table("hot connect by API, ms", "to the first reply", "to the call's return")
    for side in sides:
        table.add_row(side.name, _spread(side.first_reply_ms), _spread(side.returned_ms))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(
        f"applying {rules} rules: {result['apply_s']:.2f} s; some of them changed: {result['apply_changed_s']:.2f} s\n"
        f"connect: {result['share']:.2f}x of an empty fabric's ({result['share_without_rules']:.2f}x without the "
        f"rules); wanted: at most 1.30x; load {result['load']:.1f}",
        markup=False,
    )


def _lab(run: Run, name: str, guests: list[str]) -> Side:
    lab = Lab(run, f"bench{os.getpid()}{name}")
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
