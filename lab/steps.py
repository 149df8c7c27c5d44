"""Steps of a demonstration: commands as a person would type them, shown with what they print and how long they took."""

from __future__ import annotations

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


class Steps:
    """Steps in one lab.

    Args:
        lab: its name.
    """

    def __init__(self, lab: str) -> None:
        self.lab = Lab(lab)

    def environment(self) -> dict[str, str]:
        """The environment of the commands: they speak to the lab without naming it."""
        return {**os.environ, "TAPLOOM_LAB": self.lab.name, "DOCKER_HOST": self.lab.docker_host}

    def run(self, *arguments: str, timeout: float = 90, live: bool = False) -> tuple[str, float]:
        """Runs a `taploom` command and prints it as typed.

        Args:
            live: what it says on standard error is shown while it runs, not after it.

        Returns:
            Its standard output, and the seconds that it took.

        Raises:
            StepFailedError: it failed.
        """
        return self._run([TAPLOOM, *arguments], shlex.join(["taploom", *arguments]), timeout, live)

    def docker(self, *arguments: str, timeout: float = 60) -> tuple[str, float]:
        """Runs a `docker` command against the lab; otherwise as `run`."""
        return self._run(["docker", *arguments], shlex.join(["docker", *arguments]), timeout, False)

    def _run(self, command: list[str], typed: str, timeout: float, live: bool) -> tuple[str, float]:
        console.print(f"$ {typed}", style="bold", markup=False)
        began = time.monotonic()
        try:
            result = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=None if live else subprocess.PIPE,
                text=True,
                timeout=timeout,
                env=self.environment(),
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise StepFailedError(f"'{typed}' did not end within {timeout:.0f} s") from None
        took = time.monotonic() - began
        for line in (result.stdout + (result.stderr or "")).splitlines():
            console.print(f"  {line}", style="dim", markup=False)
        if result.returncode:
            raise StepFailedError(f"'{typed}' exited with {result.returncode}")
        return result.stdout, took

    def in_guest(self, guest: str, *command: str, timeout: float = 60) -> str:
        """Runs a command in a guest, printed as typed, and returns its standard output."""
        return self.run("lab", "exec", guest, "--", *command, timeout=timeout)[0]

    def succeeds_in_guest(self, guest: str, *command: str) -> bool:
        """Whether a command in a guest exits with 0; nothing is printed."""
        arguments = [TAPLOOM, "lab", "exec", guest, "--", *command]
        return subprocess.run(arguments, stdin=subprocess.DEVNULL, env=self.environment(), check=False).returncode == 0

    @contextlib.contextmanager
    def steady_ping(self, guest: str, name: str, interval: float = 0.01) -> Iterator[dict[str, float]]:
        """Pings every `interval` seconds while the block runs; the dict then has what ping counted."""
        process = subprocess.Popen(
            [TAPLOOM, "lab", "exec", guest, "--", "ping", "-i", f"{interval:g}", name],
            stdout=subprocess.PIPE,
            text=True,
            stdin=subprocess.DEVNULL,
            env=self.environment(),
        )
        console.print(f"[bold]$ taploom lab exec {guest} -- ping -i {interval:g} {name} &[/bold]")
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

    def names(self, found: list[tuple[str, tuple[str, ...]]]) -> list[Row]:
        """Pings from web by name: a row for each (what is shown, command), with the address that the name gave."""
        rows = []
        for shown, command in found:
            output = self.in_guest("web", *command)
            address = re.search(r"PING [^(]*\(([^)]*)\)", output)
            rows.append(Row(f"{shown}: ping {command[-1]}", address[1] if address else "answered", round_trip(output)))
        return rows

    def hot_plug(self, interval: float) -> list[Row]:
        """Connects web to network back and disconnects it again, while a ping on app goes on every `interval` seconds.

        Raises:
            StepFailedError: the interface stayed, or the ping lost something.
        """
        with self.steady_ping("web", "db", interval) as ping:
            began = time.monotonic()
            _, connected = self.run("network", "connect", "back", "web")
            reply = self.in_guest("web", "ping", "-n", "-c1", "-W5", "db.back")
            first = time.monotonic() - began
            _, disconnected = self.run("network", "disconnect", "back", "web")
            left = self.succeeds_in_guest("web", "test", "-e", "/sys/class/net/eth1")
        if left:
            raise StepFailedError("eth1 is still in web after the disconnect")
        if ping["received"] != ping["sent"]:
            raise StepFailedError(f"the ping on app lost {ping['sent'] - ping['received']:.0f} packets")
        return [
            Row("web hot-connected to back, by the command", "eth1", f"{connected * 1000:.0f} ms"),
            Row("... to the first reply from db.back", round_trip(reply), f"{first * 1000:.0f} ms"),
            Row("web disconnected from back again", "eth1 gone", f"{disconnected * 1000:.0f} ms"),
            Row(
                f"ping on app meanwhile, every {interval * 1000:.0f} ms",
                f"{ping['received']:.0f} of {ping['sent']:.0f} answered",
                f"{ping['average']:.2f} ms (max {ping['longest']:.1f})",
            ),
        ]

    def http(self, published: str, *, timeout: float, patience: float) -> str:
        """What a published port answers, as soon as its server does; `timeout` and `patience` are seconds.

        Raises:
            StepFailedError: it does not answer.
        """
        console.print(f"$ curl http://{published}/", style="bold", markup=False)
        began = time.monotonic()
        while True:  # the server in the container may still be starting
            try:
                with urllib.request.urlopen(f"http://{published}/", timeout=timeout) as response:
                    return f"HTTP {response.status}"
            except OSError as error:
                if time.monotonic() - began > patience:
                    raise StepFailedError(f"http://{published}/ does not answer: {error}") from error
                time.sleep(0.05)

    def iperf3(self, server: str, client: str, seconds: int = 3) -> float:
        """The rate of TCP from one guest to another by its name, in bits per second."""
        listening = subprocess.Popen(
            [TAPLOOM, "lab", "exec", server, "--", "iperf3", "--server", "--one-off", "--forceflush"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            env=self.environment(),
        )
        assert listening.stdout is not None
        for line in listening.stdout:
            if "listening" in line:
                break
        typed = ["iperf3", "--client", server, "--time", str(seconds)]
        console.print(f"[bold]$ taploom lab exec {client} -- {shlex.join(typed)}[/bold]")
        result = subprocess.run(
            [TAPLOOM, "lab", "exec", client, "--", *typed, "--json"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=self.environment(),
            check=False,
            timeout=60,
        )
        if result.returncode:
            listening.kill()
            raise StepFailedError(f"iperf3 ended with {result.returncode}: {(result.stdout + result.stderr)[-300:]}")
        listening.wait(10)
        return float(json.loads(result.stdout)["end"]["sum_received"]["bits_per_second"])

    def show_logs(self) -> None:
        """Prints the end of each of the lab's logs: the lab is about to go, and they with it."""
        for path in [*sorted(self.lab.logs.glob("*.log")), *sorted(self.lab.path.rglob("console.log"))]:
            console.print(f"[bold]{path}[/bold]")
            for line in path.read_text(errors="replace").splitlines()[-15:]:
                console.print(f"  {line}", style="dim", markup=False)


def round_trip(output: str) -> str:
    """The round-trip time that ping printed last."""
    found = re.findall(r"time=([\d.]+) ms", output)
    if not found:
        raise StepFailedError("ping printed no reply")
    return f"{found[-1]} ms"


def print_rows(title: str, rows: list[Row]) -> None:
    """The closing table."""
    table = Table("what was shown", "result", "time", title=title)
    for row in rows:
        table.add_row(row.shown, row.result, row.time)
    console.print()
    console.print(table)
