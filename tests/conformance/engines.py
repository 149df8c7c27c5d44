"""The two sides: Debian's dockerd, and a taploom lab. Both are machines of their own with the same image."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import image
from docker_cli import CACHE, CLI
from machine import HOST_ADDRESS, HOST_ADDRESS6, INTERNET_ADDRESS, INTERNET_ADDRESS6, Machine, check, run, until

IMAGE = "box"
COMPOSE = f"{CACHE}/trixie/usr/libexec/docker/cli-plugins/docker-compose"
# Where another dockerd, its containerd and docker-proxy are, to see what a later version does; else Debian's.
_PROGRAMS = os.environ.get("TAPLOOM_CONFORMANCE_DOCKER", "/usr/sbin")
_CGROUPS = Path("/sys/fs/cgroup")
TAPLOOM = str(Path(sys.executable).with_name("taploom"))
_POOLS = ("172.17.0.0/16", "172.18.0.0/15", "172.20.0.0/14", "172.24.0.0/13", "10.128.0.0/9")


@dataclass(frozen=True)
class Answer:
    """An HTTP response."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("docker", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Engine:
    """One side."""

    label: str
    machine: Machine
    socket: Path

    def __init__(self) -> None:
        self.machine = Machine()

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of Docker's clients; the user's own configuration stays out of it."""
        kept = {key: os.environ[key] for key in ("PATH", "LANG", "LC_ALL") if key in os.environ}
        config = self.machine.directory / "client"
        config.mkdir(exist_ok=True)
        return {
            **kept,
            "DOCKER_HOST": f"unix://{self.socket}",
            "DOCKER_CONFIG": str(config),
            "HOME": str(config),
            **more,
        }

    def cli(self, *argv: str, input: str = "", timeout: float = 40, **more: str) -> subprocess.CompletedProcess[str]:
        """Runs docker, whatever it exits with."""
        return run([CLI, *argv], environment=self.environment(**more), input=input, timeout=timeout)

    def must(self, *argv: str) -> str:
        """Runs docker, which must succeed; returns what it printed."""
        result = self.cli(*argv)
        assert result.returncode == 0, f"{self.label}: docker {' '.join(argv)}: {result.stderr}\n{self.logs()}"
        return result.stdout.strip()

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        timeout: float = 40,
    ) -> Answer:
        """One request on a connection of its own."""
        connection = _Connection(self.socket, timeout)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            data = response.read()
            return Answer(response.status, {key.lower(): value for key, value in response.getheaders()}, data)
        finally:
            connection.close()

    def api(self, method: str, path: str, body: object = None) -> Any:
        """One request that must succeed; returns the JSON answer or None."""
        data = None if body is None else json.dumps(body).encode()
        answer = self.request(method, path, data, {"Content-Type": "application/json"} if data else {})
        assert answer.status < 400, f"{self.label}: {method} {path}: {answer.status} {answer.body!r}\n{self.logs()}"
        return answer.json() if answer.body[:1] in (b"{", b"[") else None

    def symbols(self) -> dict[str, str]:
        """What steps name as <NAME>, which may differ between the sides."""
        return {
            "host": HOST_ADDRESS,
            "host6": HOST_ADDRESS6,
            "internet": INTERNET_ADDRESS,
            "internet6": INTERNET_ADDRESS6,
        }

    def on_host(self, *command: str) -> list[str]:
        """The command of the image, run where published ports are."""
        return self.machine.inside("chroot", str(self.root), *command)

    def on_internet(self, *command: str) -> list[str]:
        """The command of the image, run on the internet."""
        return self.machine.on_the_internet("chroot", str(self.root), *command)

    def beyond(self, *command: str) -> list[str]:
        """The command of the image, run on the internet that containers reach."""
        return self.on_internet(*command)

    def clean(self) -> None:
        """Removes every container and network that a scenario made."""
        for container in self.api("GET", "/containers/json?all=1"):
            self.request("DELETE", f"/containers/{container['Id']}?force=1")
        for _ in range(2):  # a network whose configuration others use goes after them
            for network in self.api("GET", "/networks"):
                if network["Name"] not in ("bridge", "host", "none"):
                    self.request("DELETE", f"/networks/{network['Id']}")

    def logs(self) -> str:
        """The end of every log, for a failing assertion."""
        return ""

    def close(self) -> None:
        self.machine.close()

    def _ready(self) -> None:
        def answers() -> bool:
            with suppress(OSError):
                return self.request("GET", "/_ping").status == 200
            return False

        until(answers, f"{self.label} answers\n{self.logs()}")
        self.root = self.machine.directory / "image"
        image.build(self.root)
        self.must("import", str(self.root.with_suffix(".tar")), IMAGE)


class Dockerd(Engine):
    """Debian's dockerd."""

    label = "dockerd"

    def __init__(self) -> None:
        super().__init__()
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        directory = self.machine.directory
        self.socket = directory / "docker.sock"
        self.machine.stack.callback(_remove_cgroups, self.machine.name)
        self._process = self.machine.spawn(
            *self.machine.inside("unshare", "--pid", "--mount", "--fork", "--kill-child=KILL", "--mount-proc"),
            # A tmpfs over /run hides a containerd of the machine, which dockerd would use. As the first process of its
            # PID namespace, dockerd would have to reap what its shims leave.
            *("sh", "-c", 'mount -t tmpfs tmpfs /run && exec tini -s -- "$@"', "sh"),
            *(f"{_PROGRAMS}/dockerd", "--host", f"unix://{self.socket}", "--cgroup-parent", f"/{self.machine.name}"),
            *("--data-root", str(directory / "data"), "--exec-root", str(directory / "run")),
            *("--pidfile", str(directory / "docker.pid")),
            # Docker's own default pools with more after them. It takes the next one, even if an earlier one is free
            # again, and its own run out and become smaller ones.
            *(f"--default-address-pool=base={base},size=16" for base in _POOLS),
            log="dockerd.log",
            env={**os.environ, "PATH": f"{_PROGRAMS}:/usr/sbin:/usr/bin:/sbin:/bin"},
        )
        self._ready()

    def logs(self) -> str:
        return "\n".join((self.machine.directory / "dockerd.log").read_text(errors="replace").splitlines()[-12:])

    def close(self) -> None:
        self.machine.close()


class TaploomLab(Engine):
    """A lab."""

    label = "taploom"

    def __init__(self) -> None:
        super().__init__()
        self.lab = "t" + secrets.token_hex(5)
        self.path = Path("/run/taploom") / self.lab
        self.socket = self.path / "docker.sock"
        try:
            self.taploom("lab", "up")
            self._ready()
            self.machine.serve_names(self._in_internet)
        except BaseException:
            self.close()
            raise

    def taploom(self, *argv: str) -> str:
        """Runs a `taploom` command on the machine that must succeed."""
        environment = {**os.environ, "TAPLOOM_LAB": self.lab, "COLUMNS": "200"}
        environment.pop("TAPLOOM_BRIDGE", None)
        return check(*self.machine.inside(TAPLOOM, *argv), environment=environment, timeout=120)

    def beyond(self, *command: str) -> list[str]:
        # The lab's containers leave through the helper, to an internet of the lab's own with the same address.
        return self._in_internet("chroot", str(self.root), *command)

    def _in_internet(self, *command: str) -> list[str]:
        return self.machine.inside("nsenter", f"--net=/run/netns/taploom.{self.lab}.internet", "--", *command)

    def processes(self) -> dict[str, dict[str, Any]]:
        """The lab's processes by name."""
        status = json.loads(self.taploom("lab", "status", "--json"))
        return {process["name"]: process for process in status["processes"]}

    def logs(self) -> str:
        text = ""
        for path in sorted((self.path / "logs").glob("*.log")):
            text += f"\n--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-12:])
        return text

    def close(self) -> None:
        keep = os.environ.get("TAPLOOM_KEEP_LOGS")
        if keep and (self.path / "logs").is_dir():
            shutil.copytree(self.path / "logs", Path(keep) / self.lab)
        try:
            with suppress(AssertionError):
                self.taploom("lab", "down")
        finally:
            self.machine.close()


def _remove_cgroups(name: str) -> None:
    """Removes the control group in every hierarchy, children first; cgroups(7)."""
    for top in [_CGROUPS / name, *_CGROUPS.glob(f"*/{name}")]:
        for directory, _, _ in os.walk(top, topdown=False):
            # Processes that have been killed leave their group a moment later.
            until(lambda path=Path(directory): _rmdir(path), directory, timeout=5)  # type: ignore[misc]


def _rmdir(path: Path) -> bool:
    try:
        path.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
