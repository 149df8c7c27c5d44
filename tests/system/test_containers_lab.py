"""Containers in a lab, with the real docker command line and docker-py: processes, ports, bridges that are killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docker
import docker.errors
import pytest
import requests
from docker_cli import CLI
from fabric import Fabric, fabric, until
from runtime_client import busybox_tar

pytestmark = pytest.mark.system

SLEEP = ("sleep", "1000")


class Engine:
    """The lab's Docker API, as its users reach it."""

    def __init__(self, lab: Fabric) -> None:
        self.lab = lab
        self.socket = lab.path / "docker.sock"
        self.environment = {
            **os.environ,
            "DOCKER_HOST": f"unix://{self.socket}",
            "DOCKER_CONFIG": str(lab.path),
        }

    def __call__(self, *arguments: str, code: int = 0, text: str | None = None) -> str:
        """Runs docker; returns what it prints on both streams."""
        done = subprocess.run(
            [CLI, *arguments],
            input=text,
            stdin=subprocess.DEVNULL if text is None else None,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, f"docker {' '.join(arguments)}: {done.stdout}{self.lab.logs()}"
        return done.stdout.strip()

    def inspect(self, name: str) -> Any:
        return json.loads(self("inspect", name))[0]

    def client(self) -> docker.DockerClient:
        return docker.DockerClient(base_url=f"unix://{self.socket}", timeout=60)

    def kill(self, process: str) -> None:
        os.kill(self.lab.processes()[process]["pid"], signal.SIGKILL)

    def until_answers(self) -> None:
        def answers() -> bool:
            with contextlib.suppress(docker.errors.DockerException, requests.exceptions.RequestException):
                client = self.client()
                client.images.list()
                return True
            return False

        until(answers, "the bridge and the runtime answer")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with fabric() as lab:
        engine = Engine(lab)
        archive = tmp_path_factory.mktemp("image") / "box.tar"
        archive.write_bytes(busybox_tar())
        engine("import", str(archive), "box")
        yield engine


@pytest.fixture(autouse=True)
def clean(engine: Engine) -> Iterator[None]:
    yield
    names = engine("ps", "-aq").split()
    if names:
        engine("rm", "-f", *names)
    engine("network", "prune", "-f")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_exit_codes(engine: Engine) -> None:
    assert engine("run", "--rm", "box", "sh", "-c", "echo out; exit 7", code=7) == "out"
    assert "executable file not found in $PATH" in engine("run", "--rm", "box", "nosuch", code=127)
    assert "permission denied" in engine("run", "--rm", "box", "/tmp", code=126)
    assert "no such image" in engine("create", "--pull", "never", "none", code=1).lower()
    assert engine("run", "--rm", "-i", "box", "cat", text="hello") == "hello"
    assert engine("ps", "-aq") == ""


def test_a_server_with_published_port_aliases_exec_and_logs(engine: Engine) -> None:
    port = free_port()
    engine("network", "create", "app")
    engine(
        *("run", "-d", "--name", "web", "--network", "app", "--network-alias", "www", "-p", f"{port}:80", "box"),
        *("sh", "-c", "echo ready; while true; do echo hello | nc -l -p 80; done"),
    )

    def greeting() -> bytes:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as client:
            return client.makefile("rb").read()
        return b""

    until(lambda: greeting() == b"hello\n", "the published port answers")
    assert engine("run", "--rm", "--network", "app", "box", "ping", "-c1", "-W5", "www").count("1 packets received")
    assert engine("exec", "web", "sh", "-c", "echo $HOSTNAME; exit 5", code=5) == engine.inspect("web")["Id"][:12]
    until(lambda: engine("logs", "web") == "ready", "the log has the first line")
    assert engine("port", "web").splitlines()[0] == f"80/tcp -> 0.0.0.0:{port}"
    assert f"0.0.0.0:{port}->80/tcp" in engine("ps")
    taken = engine("run", "--name", "other", "-p", f"{port}:80", "box", "true", code=125)
    assert f"Bind for 0.0.0.0:{port} failed: port is already allocated" in taken
    engine("stop", "-t", "0", "web")
    assert engine("wait", "web") == "137"
    engine("start", "web")
    until(lambda: greeting() == b"hello\n", "the published port answers again")


def test_terminal(engine: Engine) -> None:
    engine("run", "-d", "-it", "--name", "web", "box", "sh")
    command = f"{CLI} exec -it web sh -c 'tty; exit 4'"
    done = subprocess.run(
        ["script", "-qec", command, "/dev/null"],
        capture_output=True,
        text=True,
        env=engine.environment,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 4, done
    assert "/dev/pts/" in done.stdout


def test_networks_while_it_runs_and_while_it_does_not(engine: Engine) -> None:
    engine("network", "create", "app")
    engine("network", "create", "--subnet", "10.177.0.0/24", "back")
    engine("run", "-d", "--name", "web", "box", *SLEEP)
    engine("network", "connect", "--ip", "10.177.0.7", "back", "web")
    assert "10.177.0.7/24" in engine("exec", "web", "ip", "addr")
    engine("network", "disconnect", "bridge", "web")
    engine("stop", "-t", "0", "web")
    engine("network", "connect", "app", "web")
    engine("start", "web")
    networks = engine.inspect("web")["NetworkSettings"]["Networks"]
    assert sorted(networks) == ["app", "back"]
    assert networks["back"]["IPAddress"] == "10.177.0.7"
    shown = engine("exec", "web", "ip", "addr")
    assert networks["app"]["IPAddress"] in shown
    assert "10.177.0.7/24" in shown


def test_a_killed_bridge_takes_up_what_runs(engine: Engine) -> None:
    engine("network", "create", "app")
    engine("run", "-d", "--name", "web", "--network", "app", "-p", "80", "--expose", "80", "box", *SLEEP)
    engine("run", "-d", "--name", "db", "--network", "app", "box", *SLEEP)
    before = engine.inspect("web")
    engine.kill("bridge")
    engine.until_answers()
    after = engine.inspect("web")
    assert after["NetworkSettings"] == before["NetworkSettings"]
    assert after["State"] == before["State"]
    until(
        lambda: "1 packets received" in engine("exec", "web", "sh", "-c", "ping -c1 -W1 db || true"),
        "the containers reach each other again",
    )
    port = int(after["NetworkSettings"]["Ports"]["80/tcp"][0]["HostPort"])
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        pass


def test_a_killed_runtime_ends_its_containers(engine: Engine) -> None:
    engine("run", "-d", "--name", "web", "box", *SLEEP)
    engine("run", "-d", "--name", "always", "--restart", "always", "box", *SLEEP)
    engine.kill("runtime")
    until(lambda: not engine.inspect("web")["State"]["Running"], "the bridge notices")
    assert engine.inspect("web")["State"]["ExitCode"] == 137
    until(lambda: engine.inspect("always")["State"]["Status"] == "running", "it is started again")
    assert engine("exec", "always", "echo", "here") == "here"
    engine("start", "web")


def test_bridges_killed_under_load_lose_nothing(engine: Engine) -> None:
    """Clients create, start, connect and remove; the bridge is killed again and again. What was acknowledged holds."""
    engine("network", "create", "app")
    acknowledged: dict[str, str] = {}
    stop = threading.Event()
    failures: list[str] = []

    def work(number: int) -> None:
        counter = 0
        while not stop.is_set():
            counter += 1
            name = f"c{number}-{counter}"
            try:
                client = engine.client()
                container = client.containers.create("box", list(SLEEP), name=name)
                acknowledged[name] = "created"
                # From here on a failure leaves either state.
                acknowledged[name] = "created or running"
                container.start()
                acknowledged[name] = "running"
                client.networks.get("app").connect(container)
                acknowledged[name] = "connected"
                if counter % 2:
                    acknowledged[name] = "anything"
                    container.remove(force=True)
                    acknowledged[name] = "removed"
            except (requests.exceptions.RequestException, docker.errors.DockerException) as error:
                if isinstance(error, docker.errors.APIError) and error.status_code < 500:
                    failures.append(f"{name}: {error}")
                # The bridge is away: go on when it is back.
                stop.wait(0.2)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(4):
            done = len(acknowledged)
            until(lambda done=done: len(acknowledged) >= done + 3, "the clients get on")  # type: ignore[misc]
            engine.kill("bridge")
            engine.until_answers()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    engine.until_answers()
    assert failures == []

    states = {
        "created": lambda found: found is not None,
        "created or running": lambda found: found is not None,
        "running": lambda found: found is not None and found["State"]["Running"],
        "connected": lambda found: found is not None and found["NetworkSettings"]["Networks"]["app"]["IPAddress"],
        "removed": lambda found: found is None,
        "anything": lambda found: True,
    }
    check_states(engine, acknowledged, states)


def check_states(engine: Engine, acknowledged: dict[str, str], states: dict[str, Callable[[Any], Any]]) -> None:
    def found(name: str) -> Any:
        try:
            return engine.client().api.inspect_container(name)
        except docker.errors.NotFound:
            return None

    for name, state in acknowledged.items():
        # What was begun when the bridge was killed is taken back, or finished, in the background.
        until(lambda name=name, state=state: states[state](found(name)), f"{name} is {state}")  # type: ignore[misc]
    running = engine.client().containers.list()
    addresses = [
        (name, endpoint["IPAddress"])
        for container in running
        for name, endpoint in container.attrs["NetworkSettings"]["Networks"].items()
    ]
    assert len(addresses) == len(set(addresses))
    assert all(address for _, address in addresses)
    everything = {container.id for container in engine.client().containers.list(all=True)}
    directory = Path(engine.lab.path) / "containers"
    # The runtime's directories have the first half of the ids as names.
    known = {container_id[:32] for container_id in everything}
    until(lambda: {path.name for path in directory.iterdir()} <= known, "the runtime has nothing else")
    guests = {guest["name"] for guest in engine.lab.json("guest", "ls")}
    assert guests == {container.name for container in running}
