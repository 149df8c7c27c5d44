"""`python -m bench.connects`: `docker network connect` and `disconnect` at taploom and at dockerd, in pairs.

The same docker client does the same to the same-named container and network of both, one after the other, the first
one in turn, so that a noisy moment hits both alike. After each connect one ping, with a second for its answer, shows
whether the interface carried traffic when the command returned.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field

import click
from rich.console import Console
from rich.table import Table

from bench.machine import describe
from bench.paths import docker, taploom
from bench.run import BenchError, Netns, Run, open_run

NETWORK, CONTAINER = "hot", "client"


@dataclass
class Side:
    """A daemon, and what has been measured of it, in milliseconds around the command.

    Attributes:
        host: DOCKER_HOST.
        client: the container that is connected.
        address: a peer's on the network.
        unanswered: how often the first ping after a connect had no answer within a second.
    """

    name: str
    host: str
    client: Netns
    address: str
    connect_ms: list[float] = field(default_factory=list)
    disconnect_ms: list[float] = field(default_factory=list)
    unanswered: int = 0


@click.command(help="Measure docker network connect and disconnect at taploom and dockerd, in pairs (root).")
@click.option("--pairs", default=30, show_default=True, help="How often at each.")
@click.option("--client", default=docker.CLIENT, show_default=True, help="The docker command.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def main(pairs: int, client: str, as_json: bool) -> None:
    """Measures and prints."""
    messages = Console(stderr=True)
    try:
        with open_run() as run:
            sides = [_dockerd(run), _taploom(run)]
            for number in range(-2, pairs):  # the first two make what is made once
                for side in sides if number % 2 else reversed(sides):
                    _once(run, client, side, counts=number >= 0)
    except BenchError as error:
        messages.print(f"bench: {error}", style="bold red", markup=False)
        sys.exit(1)
    if as_json:
        print(
            json.dumps({"machine": describe(), "sides": [vars(side) | {"client": client} for side in sides]}, indent=2)
        )
        return
    table = Table("", *(f"{side.name}, ms" for side in sides), "taploom in % of dockerd, pair by pair")
    for what in ("connect", "disconnect"):
        columns = [getattr(side, f"{what}_ms") for side in sides]
        shares = [100 * ours / theirs for theirs, ours in zip(*columns, strict=True)]
        table.add_row(f"docker network {what}", *map(_spread, columns), _spread(shares))
    table.add_row("first ping unanswered", *(str(side.unanswered) for side in sides), "")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _dockerd(run: Run) -> Side:
    path = docker.build(run, [1500])
    assert path.hot is not None
    return Side("dockerd", f"unix://{run.directory}/docker/docker.sock", path.hot.client, path.hot.address)


def _taploom(run: Run) -> Side:
    path = taploom.build(run, [1500])
    assert isinstance(path.hot, taploom.HotGuest)
    return Side("taploom", path.hot.lab.status()["docker_host"], path.hot.client, path.hot.address)


def _once(run: Run, client: str, side: Side, *, counts: bool) -> None:
    environment = {**os.environ, "DOCKER_HOST": side.host, "DOCKER_CONFIG": str(run.directory), "DOCKER_CONTEXT": ""}

    def timed(what: str) -> float:
        start = time.monotonic()
        run.check(client, "network", what, NETWORK, CONTAINER, env=environment)
        return (time.monotonic() - start) * 1000

    connected = timed("connect")
    ping = side.client.command("ping", "-n", "-c1", "-W1", side.address)
    answered = subprocess.run(ping, stdout=subprocess.DEVNULL, check=False).returncode == 0
    disconnected = timed("disconnect")
    if counts:
        side.connect_ms.append(connected)
        side.disconnect_ms.append(disconnected)
        side.unanswered += not answered


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f}-{max(values):.0f})"


if __name__ == "__main__":
    main()
