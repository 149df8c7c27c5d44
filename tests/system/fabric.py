"""A lab of its own for a test module, driven by the commands that people type."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import command_server

from lab.state import Lab, enter_guest

T = TypeVar("T")
TAPLOOM = str(Path(sys.executable).with_name("taploom"))


def until(condition: Callable[[], Any], what: str | Callable[[], str], timeout: float = 60, pause: float = 0.02) -> Any:
    """Waits for a condition and returns its first true value; fails with `what` after `timeout` seconds. It is looked
    at every `pause` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"still waiting after {timeout:.0f} s: {what if isinstance(what, str) else what()}")
        time.sleep(pause)


def at_once(*actions: Callable[[], T]) -> list[T]:
    """Does things at once, each in a thread, and returns what they return: what goes unanswered is waited for once."""
    with ThreadPoolExecutor(len(actions)) as threads:
        return [running.result() for running in [threads.submit(action) for action in actions]]


class Fabric:
    """One lab."""

    def __init__(self) -> None:
        self.name = "t" + secrets.token_hex(5)
        self.path = Path("/run/taploom") / self.name
        self.environment = {**os.environ, "TAPLOOM_LAB": self.name, "COLUMNS": "200"}
        self.environment.pop("TAPLOOM_BRIDGE", None)

    def command(self, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Runs a `taploom` command, whatever it exits with."""
        if arguments[:2] not in (("lab", "up"), ("lab", "down")):
            return command_server.run(arguments, self.environment, timeout)
        # These two start as people start them.
        return subprocess.run(
            [TAPLOOM, *arguments],
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=timeout,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def run(self, *arguments: str, timeout: float = 120) -> str:
        """Runs a `taploom` command that must succeed; returns its standard output."""
        result = self.command(*arguments, timeout=timeout)
        assert result.returncode == 0, f"taploom {' '.join(arguments)}: {result.stdout}{result.stderr}{self.logs()}"
        return result.stdout

    def fails(self, *arguments: str) -> str:
        """Runs a `taploom` command that must fail with one line; returns the line."""
        result = self.command(*arguments)
        assert result.returncode in (1, 2), f"taploom {' '.join(arguments)} exited with {result.returncode}: {result}"
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
        if result.returncode == 1:
            assert len(result.stderr.strip().splitlines()) == 1, result.stderr
            assert result.stderr.startswith("taploom: "), result.stderr
        return result.stderr.strip()

    def json(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json"))

    def guest(self, name: str, *command: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Runs a command in a guest, whatever it exits with."""
        return subprocess.run(
            self.entering(name, *command),
            capture_output=True,
            text=True,
            env=self.guest_environment(),
            timeout=timeout,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def in_guest(self, name: str, *command: str, timeout: float = 60) -> str:
        """Runs a command in a guest that must succeed; returns its standard output."""
        result = self.guest(name, *command, timeout=timeout)
        assert result.returncode == 0, f"in {name}: {' '.join(command)}: {result.stdout}{result.stderr}{self.logs()}"
        return result.stdout

    def start_in_guest(self, name: str, *command: str, **options: Any) -> subprocess.Popen[str]:
        """Starts a command in a guest (its pid is the command's)."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options}
        return subprocess.Popen(self.entering(name, *command), text=True, env=self.guest_environment(), **options)

    def guest_environment(self) -> dict[str, str]:
        return {**Lab(self.name).environment(), **self.environment}

    def entering(self, name: str, *command: str) -> list[str]:
        """What runs a command in a guest: for a namespace, what `taploom lab exec` becomes."""
        lab = Lab(self.name)
        return [TAPLOOM, "lab", "exec", name, "--", *command] if lab.on_vms() else [*enter_guest(lab, name), *command]

    def answers(self, guest: str, target: str, *options: str) -> bool:
        """True when one ping is answered."""
        return self.guest(guest, "ping", "-n", "-c1", "-W1", *options, target).returncode == 0

    def until_answers(self, guest: str, target: str, *options: str) -> None:
        until(lambda: self.answers(guest, target, *options), f"{target} answers {guest}\n{self.logs()}")

    def address(self, guest: str, network: str, family: int = 4) -> str:
        """A guest's address on a network, without prefix length."""
        endpoint = self.endpoint(guest, network)
        return next(a.partition("/")[0] for a in endpoint["addresses"] if (":" in a) == (family == 6))

    def endpoint(self, guest: str, network: str) -> dict[str, Any]:
        document = self.json("network", "inspect", network)
        return next(e for e in document["endpoints"] if camel(e, "guest_name") == guest)

    def processes(self) -> dict[str, dict[str, Any]]:
        """The lab's processes by name, from where `taploom lab status` has them too."""
        document = json.loads((self.path / "status.json").read_bytes())
        return {process["name"]: process for process in document["processes"]}

    def daemons(self) -> dict[str, list[int]]:
        """The pids of the helper agent's daemons by program, from /proc: children of the helper agent."""
        helper = self.processes()["helper"]["pid"]
        found: dict[str, list[int]] = {}
        for pid in children(helper):
            try:
                found.setdefault(Path(f"/proc/{pid}/comm").read_text().strip(), []).append(pid)
            except OSError:
                continue
        return found

    def kill(self, victim: str) -> None:
        """kill -9 of the bridge, the helper, one of its daemons that there is one of, or `disk`: of the helper together
        with all that it keeps."""
        (pid,) = self._incarnation(victim)
        os.kill(pid, signal.SIGKILL)
        if victim == "disk":
            shutil.rmtree(self.path / "helper" / "state", ignore_errors=True)

    def kill_and_wait(self, victim: str) -> None:
        """As `kill`; returns when another process has its place and the fabric has converged."""
        before = self._incarnation(victim)
        self.kill(victim)
        until(
            lambda: self._incarnation(victim) not in ([], before), f"{victim} is there again\n{self.logs()}", pause=0.05
        )
        self.until_converged()

    def _incarnation(self, victim: str) -> list[int]:
        """The pids of what `kill` kills; none while there is none."""
        if victim in ("bridge", "helper", "disk"):
            pid = self.processes()["helper" if victim == "disk" else victim]["pid"]
            return [pid] if pid else []
        return self.daemons().get(victim, [])

    def status(self) -> dict[str, Any]:
        return self.json("status")

    def until_converged(self, timeout: float = 60, pause: float = 0.1) -> None:
        def converged() -> bool:
            result = self.command("status", "--json")
            return result.returncode == 0 and json.loads(result.stdout).get("converged", False)

        def otherwise() -> str:
            return f"the fabric converges\n{self.command('status').stdout}\n{self.logs()}"

        until(converged, otherwise, timeout, pause)

    def logs(self) -> str:
        """The end of every log, for a failing assertion."""
        text = ""
        for path in sorted((self.path / "logs").glob("*.log")):
            lines = path.read_text(errors="replace").splitlines()
            text += f"\n--- {path.name}\n" + "\n".join(lines[-12:])
        return text

    def down(self) -> None:
        self.run("lab", "down")


def camel(document: dict[str, Any], key: str) -> Any:
    """A field of a JSON document under its protobuf name or its JSON name."""
    if key in document:
        return document[key]
    head, *tail = key.split("_")
    return document.get(head + "".join(part.title() for part in tail))


def children(pid: int) -> list[int]:
    """The pids of a process's descendants."""
    found: list[int] = []
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
    except FileNotFoundError:
        return found
    for task in tasks:
        try:
            direct = [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
        for child in direct:
            found += [child, *children(child)]
    return found


@contextmanager
def fabric(*guests: str) -> Iterator[Fabric]:
    """A lab with these guests, removed at the end; its logs are kept when TAPLOOM_KEEP_LOGS names a directory."""
    lab = Fabric()
    try:
        lab.run("lab", "up", *(part for guest in guests for part in ("--guest", guest)))
        yield lab
    finally:
        keep = os.environ.get("TAPLOOM_KEEP_LOGS")
        if keep and (lab.path / "logs").is_dir():
            shutil.copytree(lab.path / "logs", Path(keep) / lab.name)
        lab.command("lab", "down")
