"""`make demo`: shows the fabric working on this machine, step by step, as a person would type it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lab.state import Lab

LAB = "demo"
TAPLOOM = str(Path(sys.executable).with_name("taploom"))
console = Console(highlight=False)


class StepFailedError(Exception):
    """A step did not show what it was to show."""


@dataclass
class Row:
    """A line of the closing table."""

    shown: str
    result: str
    time: str = ""


def run(*arguments: str, timeout: float = 90) -> tuple[str, float]:
    """Runs a `taploom` command and prints it as typed.

    Returns:
        Its standard output, and the seconds that it took.

    Raises:
        StepFailedError: it failed.
    """
    return _run([TAPLOOM, *arguments], shlex.join(["taploom", *arguments]), timeout)


def docker(*arguments: str, timeout: float = 60) -> tuple[str, float]:
    """Runs a `docker` command against the lab; otherwise as `run`."""
    return _run(["docker", *arguments], shlex.join(["docker", *arguments]), timeout)


def _run(command: list[str], typed: str, timeout: float) -> tuple[str, float]:
    console.print(f"$ {typed}", style="bold", markup=False)
    began = time.monotonic()
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=environment(), check=False
        )
    except subprocess.TimeoutExpired:
        raise StepFailedError(f"'{typed}' did not end within {timeout:.0f} s") from None
    took = time.monotonic() - began
    for line in (result.stdout + result.stderr).splitlines():
        console.print(f"  {line}", style="dim", markup=False)
    if result.returncode:
        raise StepFailedError(f"'{typed}' exited with {result.returncode}")
    return result.stdout, took


def in_guest(guest: str, *command: str, timeout: float = 60) -> str:
    """Runs a command in a guest, printed as typed, and returns its standard output."""
    return run("lab", "exec", guest, "--", *command, timeout=timeout)[0]


def environment() -> dict[str, str]:
    return {**os.environ, "TAPLOOM_LAB": LAB, "DOCKER_HOST": f"unix://{Lab(LAB).path}/docker.sock"}


def round_trip(output: str) -> str:
    """The round-trip time that ping printed last."""
    found = re.findall(r"time=([\d.]+) ms", output)
    if not found:
        raise StepFailedError("ping printed no reply")
    return f"{found[-1]} ms"


@contextlib.contextmanager
def steady_ping(guest: str, name: str) -> Iterator[dict[str, float]]:
    """Pings every 10 ms while the block runs; the dict then has what ping counted."""
    process = subprocess.Popen(
        [TAPLOOM, "lab", "exec", guest, "--", "ping", "-i", "0.01", name],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    console.print(f"[bold]$ taploom lab exec {guest} -- ping -i 0.01 {name} &[/bold]")
    counted: dict[str, float] = {}
    assert process.stdout is not None
    output = ""
    try:
        for line in process.stdout:  # from the first reply on
            output += line
            if "bytes from" in line:
                break
        yield counted
    finally:
        process.send_signal(signal.SIGINT)
        output += process.stdout.read()
        process.wait(10)
    # Up to the last one that was answered: the one after that may have been under way when ping was stopped.
    answered = {int(number) for number in re.findall(r"icmp_seq=(\d+) ttl", output)}
    times = re.search(r"= [\d.]+/([\d.]+)/([\d.]+)/", output)
    if not answered or times is None:
        raise StepFailedError("the steady ping printed no summary")
    counted["sent"], counted["received"] = float(max(answered)), float(len(answered))
    counted["average"], counted["longest"] = float(times[1]), float(times[2])


def show_logs() -> None:
    """Prints the end of each of the lab's logs: the lab is about to go, and they with it."""
    for path in sorted(Lab(LAB).logs.glob("*.log")):
        console.print(f"[bold]{path}[/bold]")
        for line in path.read_text(errors="replace").splitlines()[-15:]:
            console.print(f"  {line}", style="dim", markup=False)


def show_docker() -> list[Row]:
    """Containers through Docker's own command, on the same networks.

    Raises:
        StepFailedError: something did not work.
    """
    page = "import http.server; http.server.test(http.server.SimpleHTTPRequestHandler, port=80)"
    docker("network", "create", "shop")
    python = os.path.realpath(sys.executable)
    _, started = docker(
        *("run", "-d", "--name", "api", "--network", "shop", "--network-alias", "backend"),
        *("-p", "127.0.0.1::80", "host", python, "-c", page),
    )
    rows = [Row("docker run: a container with the machine's own files", "started", f"{started * 1000:.0f} ms")]
    answer, _ = docker("run", "--rm", "--network", "shop", "host", "getent", "hosts", "backend")
    rows.append(Row("another one finds it by its alias", answer.split()[0]))
    published = docker("port", "api", "80")[0].strip()
    console.print(f"$ curl http://{published}/", style="bold", markup=False)
    began = time.monotonic()
    while True:  # the server in the container may still be starting
        try:
            with urllib.request.urlopen(f"http://{published}/", timeout=5) as response:
                rows.append(Row("its published port, from the machine", f"HTTP {response.status}"))
            break
        except OSError as error:
            if time.monotonic() - began > 20:
                raise StepFailedError(f"http://{published}/ does not answer: {error}") from error
            time.sleep(0.05)
    _, connected = docker("network", "connect", "app", "api")
    reply = in_guest("web", "ping", "-n", "-c1", "-W5", "api")
    rows.append(Row("docker network connect: pinged from web", round_trip(reply), f"{connected * 1000:.0f} ms"))
    docker("rm", "-f", "api")
    docker("network", "rm", "shop")
    return rows


def show() -> list[Row]:
    """Runs the demonstration.

    Raises:
        StepFailedError: something did not work.
    """
    rows: list[Row] = []
    _, took = run("lab", "up", "--guest", "web", "--guest", "db")
    rows.append(Row("the whole fabric started: OVS, OVN, helper, bridge, two guests", "ready", f"{took:.2f} s"))
    _, took = run("network", "create", "app", "--ipv6")
    rows.append(Row("network app created (IPv4 and IPv6)", "ready", f"{took * 1000:.0f} ms"))
    run("network", "create", "back")
    _, took = run("network", "connect", "app", "web")
    rows.append(Row("running guest web connected to app", "eth0", f"{took * 1000:.0f} ms"))
    run("network", "connect", "app", "db", "--alias", "postgres")
    run("network", "connect", "back", "db")

    in_guest("web", "ip", "-brief", "address")
    for shown, command in (
        ("db found by its name", ("ping", "-n", "-c2", "-i0.2", "db")),
        ("... by its alias", ("ping", "-n", "-c2", "-i0.2", "postgres")),
        ("... by its name on the network", ("ping", "-n", "-c2", "-i0.2", "db.app")),
        ("... over IPv6", ("ping", "-6", "-n", "-c2", "-i0.2", "db")),
    ):
        output = in_guest("web", *command)
        address = re.search(r"PING [^(]*\(([^)]*)\)", output)
        rows.append(Row(f"{shown}: ping {command[-1]}", address[1] if address else "answered", round_trip(output)))

    with steady_ping("web", "db") as ping:
        began = time.monotonic()
        _, connected = run("network", "connect", "back", "web")
        reply = in_guest("web", "ping", "-n", "-c1", "-W5", "db.back")
        first = time.monotonic() - began
        _, disconnected = run("network", "disconnect", "back", "web")
        left = subprocess.run(
            [TAPLOOM, "lab", "exec", "web", "--", "test", "-e", "/sys/class/net/eth1"], env=environment(), check=False
        )
    rows += [
        Row("web hot-connected to back, by the command", "eth1", f"{connected * 1000:.0f} ms"),
        Row("... to the first reply from db.back", round_trip(reply), f"{first * 1000:.0f} ms"),
        Row("web disconnected from back again", "eth1 gone", f"{disconnected * 1000:.0f} ms"),
        Row(
            "ping on app meanwhile, every 10 ms",
            f"{ping['received']:.0f} of {ping['sent']:.0f} answered",
            f"{ping['average']:.2f} ms (max {ping['longest']:.1f})",
        ),
    ]
    if left.returncode == 0:
        raise StepFailedError("eth1 is still in web after the disconnect")
    if ping["received"] != ping["sent"]:
        raise StepFailedError(f"the ping on app lost {ping['sent'] - ping['received']:.0f} packets")

    server = subprocess.Popen(
        [TAPLOOM, "lab", "exec", "db", "--", "iperf3", "--server", "--one-off", "--forceflush"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert server.stdout is not None
    for line in server.stdout:
        if "listening" in line:
            break
    console.print("[bold]$ taploom lab exec web -- iperf3 --client db --time 3[/bold]")
    client = subprocess.run(
        [TAPLOOM, "lab", "exec", "web", "--", "iperf3", "--client", "db", "--time", "3", "--json"],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
        timeout=60,
    )
    server.wait(10)
    if client.returncode:
        raise StepFailedError(f"iperf3 failed: {client.stdout[-300:]}")
    rate = json.loads(client.stdout)["end"]["sum_received"]["bits_per_second"] / 1e9
    rows.append(Row("TCP from web to db (iperf3, MTU 1500)", f"{rate:.2f} Gb/s", "3 s"))
    rows += show_docker()
    run("status")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Shows the whole fabric working on this machine.")
    parser.add_argument("--keep", action="store_true", help="leave the lab up at the end")
    keep = parser.parse_args().keep
    failure = ""
    rows: list[Row] = []
    try:
        rows = show()
    except StepFailedError as error:
        failure = str(error)
        show_logs()
    except KeyboardInterrupt:
        failure = "interrupted"
    finally:
        if not keep:
            with contextlib.suppress(StepFailedError):
                run("lab", "down")
    if failure:
        console.print(f"\n[red]demo: FAILED: {failure}[/red]")
        sys.exit(1)
    table = Table("what was shown", "result", "time", title="taploom on this machine")
    for row in rows:
        table.add_row(row.shown, row.result, row.time)
    console.print()
    console.print(table)
    if keep:
        console.print("The lab is still up. Try: [bold]. .venv/bin/activate; export TAPLOOM_LAB=demo[/bold], then")
        console.print(
            "[bold]taploom lab exec web -- ping db[/bold]; [bold]taploom lab down[/bold] ends it. For docker:"
        )
        console.print(f"[bold]export DOCKER_HOST={environment()['DOCKER_HOST']}[/bold]")
    console.print(
        "[green]demo: everything worked; " + ("the lab is up[/green]" if keep else "nothing is left behind[/green]")
    )


if __name__ == "__main__":
    main()
