"""The lab with the docker command: containers in a lab, what survives what, and that nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from docker_cli import CLI
from fabric import Fabric, fabric, until
from runtime_client import busybox_tar

pytestmark = pytest.mark.system


class Docker:
    """The docker command on a lab."""

    def __init__(self, lab: Fabric) -> None:
        self._environment = {
            **os.environ,
            "DOCKER_HOST": lab.json("lab", "status")["docker_host"],
            "DOCKER_CONFIG": str(lab.path),
        }

    def __call__(self, *arguments: str, stdin: bytes = b"", timeout: float = 60) -> str:
        """Runs a command that must succeed; returns its standard output."""
        result = self.command(*arguments, stdin=stdin, timeout=timeout)
        assert result.returncode == 0, f"docker {' '.join(arguments)}: {result}"
        return result.stdout.decode().strip()

    def command(self, *arguments: str, stdin: bytes = b"", timeout: float = 60) -> subprocess.CompletedProcess[bytes]:
        """Runs a command, whatever it exits with."""
        return subprocess.run(
            [CLI, *arguments], input=stdin, capture_output=True, env=self._environment, timeout=timeout, check=False
        )


@pytest.fixture
def lab() -> Iterator[Fabric]:
    with fabric() as lab:
        yield lab


@pytest.fixture
def docker(lab: Fabric) -> Docker:
    docker = Docker(lab)
    docker("import", "-", "box", stdin=busybox_tar())
    return docker


def containers_of(path: Path) -> list[int]:
    """The processes that have a container's root of the lab in that directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f"upperdir={path}/" in (entry / "mountinfo").read_text():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def _start(docker: Docker) -> None:
    docker("run", "-d", "--name", "one", "box", "sh", "-c", "sleep 1000 & sleep 1000")
    docker("run", "-d", "--name", "two", "box", "sleep", "1000")
    docker("exec", "-d", "two", "sleep", "1000")


def test_a_container_beside_a_guest(lab: Fabric, docker: Docker) -> None:
    lab.run("lab", "add", "web")
    docker("network", "create", "app")
    docker("network", "connect", "app", "web")
    docker("run", "-d", "--name", "db", "--network", "app", "--network-alias", "pg", "box", "sleep", "1000")
    lab.until_answers("web", "pg")
    docker("exec", "db", "ping", "-c1", "-W5", "web")
    shown = {row["name"]: row["state"] for row in lab.json("lab", "status")["containers"]}
    assert shown == {"db": "running"}
    assert "db" in lab.run("lab", "status")


def test_prune(docker: Docker) -> None:
    docker("import", "-", "other", stdin=busybox_tar())
    docker("tag", "box", "kept")
    docker("run", "-d", "--name", "one", "kept", "sleep", "1000")
    docker("import", "--change", "LABEL other=1", "-", stdin=busybox_tar())  # has no name: goes first
    assert "deleted: sha256:" in docker("image", "prune", "-f")
    docker("image", "prune", "-af")
    assert "other" not in docker("images")
    assert "kept" in docker("images")
    assert "host" in docker("images")
    docker("system", "prune", "-f")
    docker("exec", "one", "true")


def test_the_internet(lab: Fabric, docker: Docker) -> None:
    assert "198.51.100.1" in lab.run("lab", "exec", "--internet", "--", "ip", "address", "show", "dev", "lo")
    docker("network", "create", "--ipv6", "app")
    for address in ("198.51.100.1", "2001:db8:1::1"):
        docker("run", "--rm", "--network", "app", "box", "ping", "-c1", "-W5", address)


def test_the_bridge_may_go(lab: Fabric, docker: Docker) -> None:
    _start(docker)

    def pids() -> list[str]:
        return docker("inspect", "--format", "{{.State.Pid}} {{.State.Running}}", "one", "two").splitlines()

    before = pids()
    lab.kill_and_wait("bridge")
    until(lambda: docker.command("ps").returncode == 0, "it answers")
    assert pids() == before
    assert docker("exec", "one", "echo", "still") == "still"


def test_a_runtime_that_is_killed(lab: Fabric, docker: Docker) -> None:
    _start(docker)
    os.kill(lab.processes()["runtime"]["pid"], signal.SIGKILL)
    until(lambda: docker("ps", "-q") == "", "the bridge knows that the containers have ended")
    until(lambda: docker.command("start", "one").returncode == 0, "the runtime is back")
    assert docker("exec", "one", "echo", "back") == "back"


def test_down_with_containers(lab: Fabric, docker: Docker) -> None:
    _start(docker)
    assert len(containers_of(lab.path)) > 5
    lab.down()
    assert containers_of(lab.path) == []
    assert not lab.path.exists()
    assert str(lab.path) not in Path("/proc/self/mountinfo").read_text()


def test_down_after_the_supervisor_was_killed(lab: Fabric, docker: Docker) -> None:
    _start(docker)
    os.kill(lab.json("lab", "status")["supervisor_pid"], signal.SIGKILL)
    lab.down()
    assert containers_of(lab.path) == []
    assert not lab.path.exists()
    assert not list(Path("/run/netns").glob(f"taploom.{lab.name}.*"))
