"""Many containers from many clients at once, and the bridge killed in the middle: nothing is lost, nothing is left."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import docker
import pytest
import requests
from comparison import Pair
from docker.errors import APIError, NotFound
from engines import IMAGE, TaploomLab
from machine import run, until

pytestmark = pytest.mark.system
CLIENTS = 8
CONTAINERS = 100
NETWORKS = ("scale-a", "scale-b", "scale-c")


@pytest.fixture
def lab(pair: Pair) -> TaploomLab:
    assert isinstance(pair.ours, TaploomLab)
    pair.ours.clean()
    return pair.ours


def client_of(lab: TaploomLab) -> docker.DockerClient:
    return docker.DockerClient(base_url=f"unix://{lab.socket}", version="1.41", timeout=60)


def holdings(lab: TaploomLab) -> dict[str, Any]:
    """What the lab holds that a leak would add to: descriptors, interfaces, routes, rows, namespaces, processes."""
    processes = {name: process["pid"] for name, process in lab.processes().items() if process.get("pid")}
    found: dict[str, Any] = {
        f"fds of {name}": len(list(Path(f"/proc/{processes[name]}/fd").iterdir()))
        for name in ("bridge", "helper")
        if name in processes
    }
    found["children"] = {name: len(_children(pid)) for name, pid in processes.items()}
    inside = ["nsenter", f"--target={processes['helper']}", "--net", "--"]
    links = json.loads(run([*inside, "ip", "-j", "link"]).stdout)
    # The TAP that is ready for the next endpoint is always another one.
    found["interfaces"] = sorted(re.sub(r"^tl\d+$", "tl<number>", link["ifname"]) for link in links)
    found["routes"] = sorted(run([*inside, "ip", "route"]).stdout.splitlines())
    found["namespaces"] = sorted(name for name in _namespaces(lab) if lab.lab in name)
    found["rows"] = _rows(lab)
    return found


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def _namespaces(lab: TaploomLab) -> list[str]:
    return run(lab.machine.inside("ip", "netns", "list")).stdout.split("\n")


def _rows(lab: TaploomLab) -> dict[str, int]:
    rows: dict[str, int] = {}
    for path in lab.path.rglob("*.db"):
        if path.read_bytes()[:15] != b"SQLite format 3":
            continue
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as database:
            tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            rows |= {table: database.execute(f'SELECT count(*) FROM "{table}"').fetchone()[0] for table in tables}
    assert rows, f"no database in {lab.path}"
    return rows


class Holders:
    """Which container has which address, as the clients see it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[tuple[str, str], str] = {}

    def take(self, container: str, networks: dict[str, Any]) -> None:
        with self._lock:
            for network, attached in networks.items():
                key = (network, attached["IPAddress"])
                assert attached["IPAddress"], f"{container} has no address on {network}"
                assert key not in self._held, f"{key} was given to {self._held[key]} and to {container}"
                self._held[key] = container

    def give_back(self, container: str) -> None:
        with self._lock:
            self._held = {key: holder for key, holder in self._held.items() if holder != container}


def test_a_hundred_containers_by_eight_clients(lab: TaploomLab) -> None:
    setup = client_of(lab)
    for name in NETWORKS:
        setup.networks.create(name)
    setup.containers.run(IMAGE, ["true"], remove=True)  # whatever is made once is there now
    setup.close()
    before = holdings(lab)
    holders = Holders()
    numbers = iter(range(CONTAINERS))
    lock = threading.Lock()

    def work() -> None:
        client = client_of(lab)
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                client.close()
                return
            name = f"scale-{number}"
            first, second, third = NETWORKS[number % 3 :] + NETWORKS[: number % 3]
            container = client.containers.run(IMAGE, ["sleep", "86400"], name=name, network=first, detach=True)
            for network in (second, third):
                client.api.connect_container_to_network(name, network, aliases=[f"alias-{number}"])
            attached = client.api.inspect_container(name)["NetworkSettings"]["Networks"]
            assert set(attached) == set(NETWORKS)
            holders.take(name, attached)
            if number % 10 == 0:
                holders.give_back(name)
                client.api.disconnect_container_from_network(name, second)
                client.api.connect_container_to_network(name, second)
            holders.give_back(name)
            container.remove(force=True)

    with ThreadPoolExecutor(CLIENTS) as pool:
        for future in [pool.submit(work) for _ in range(CLIENTS)]:
            future.result()
    assert lab.api("GET", "/containers/json?all=1") == []
    until(
        lambda: not differing(before, holdings(lab)),
        "what was there before is there, and no more",
        20,
        lambda: str(differing(before, holdings(lab))),
    )
    for network in NETWORKS:
        lab.must("network", "rm", network)


def differing(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What is not as it was."""
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


def test_no_acknowledged_change_is_lost(lab: TaploomLab) -> None:
    """Eight clients change things while the bridge is killed twice. Whatever was answered is there afterwards."""
    setup = client_of(lab)
    for name in NETWORKS:
        setup.networks.create(name)
    acknowledged: dict[str, dict[str, Any]] = {}
    removed: list[str] = []
    progress = threading.Semaphore(0)

    def work(index: int) -> None:
        client = client_of(lab)
        for number in range(4):
            name = f"chaos-{index}-{number}"
            made = insist(lambda name=name: create(client, name))
            acknowledged[name] = {"id": made}
            insist(lambda name=name: client.api.start(name))
            for network in NETWORKS[1:]:
                insist(lambda name=name, network=network: connect(client, name, network))
            attached = insist(lambda name=name: client.api.inspect_container(name)["NetworkSettings"]["Networks"])
            acknowledged[name]["addresses"] = {network: each["IPAddress"] for network, each in attached.items()}
            progress.release()
            if number == 0:
                insist(lambda name=name: remove(client, name))
                del acknowledged[name]
                removed.append(name)
        client.close()

    def create(client: docker.DockerClient, name: str) -> str:
        try:
            config = client.api.create_networking_config({NETWORKS[0]: client.api.create_endpoint_config()})
            made: str = client.api.create_container(IMAGE, ["sleep", "86400"], name=name, networking_config=config)[
                "Id"
            ]
        except APIError as error:
            if error.status_code != 409:  # an earlier attempt was carried out, but its answer was lost
                raise
            made = client.api.inspect_container(name)["Id"]
        return made

    def connect(client: docker.DockerClient, name: str, network: str) -> None:
        try:
            client.api.connect_container_to_network(name, network)
        except APIError as error:
            if "already exists in network" not in str(error):
                raise

    def remove(client: docker.DockerClient, name: str) -> None:
        with suppress(NotFound):
            client.api.remove_container(name, force=True)

    with ThreadPoolExecutor(CLIENTS) as pool:
        working = [pool.submit(work, index) for index in range(CLIENTS)]
        for _ in range(2):
            for _ in range(6):
                while not progress.acquire(timeout=1):
                    failed = [future.exception() for future in working if future.done() and future.exception()]
                    assert not failed, [getattr(error, "explanation", error) for error in failed]
            kill_bridge(lab)
        for future in working:
            future.result()
    everything = {c["Names"][0][1:]: c for c in setup.api.containers(all=True)}
    assert set(everything) == set(acknowledged)
    for name, wanted in acknowledged.items():
        document = setup.api.inspect_container(name)
        assert document["Id"] == wanted["id"]
        assert document["State"]["Running"], name
        networks = document["NetworkSettings"]["Networks"]
        assert {network: each["IPAddress"] for network, each in networks.items()} == wanted["addresses"]
    given = [(network, address) for wanted in acknowledged.values() for network, address in wanted["addresses"].items()]
    assert len(given) == len(set(given)), "an address was given twice"
    first, *others = acknowledged
    for network, address in acknowledged[others[0]]["addresses"].items():
        until(lambda address=address: answers(lab, first, address), f"{address} on {network} answers\n{lab.logs()}")
    assert removed
    setup.close()
    lab.clean()


def answers(lab: TaploomLab, container: str, address: str) -> bool:
    return lab.cli("exec", container, "pings", address).returncode == 0


def insist(do: Callable[[], Any]) -> Any:
    """Does it until it is answered: while the bridge is away nobody answers."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return do()
        except (requests.ConnectionError, requests.Timeout, docker.errors.DockerException) as error:
            away = isinstance(error, requests.ConnectionError | requests.Timeout) or "Connection" in str(error)
            if isinstance(error, APIError) and error.status_code in (409, 500, 503):
                away = away or "try again" in str(error) or "unavailable" in str(error).lower()
            if not away or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def kill_bridge(lab: TaploomLab) -> None:
    """Kills the bridge and waits until it answers again."""
    pid = lab.processes()["bridge"]["pid"]
    os.kill(pid, signal.SIGKILL)

    def answers_again() -> bool:
        try:
            return lab.processes()["bridge"]["pid"] not in (None, 0, pid) and lab.request("GET", "/_ping").status == 200
        except OSError:
            return False

    until(answers_again, f"the bridge is back\n{lab.logs()}")


def test_ports_stay_when_the_bridge_restarts(lab: TaploomLab) -> None:
    options = ("-p", "80", "-p", "127.0.0.1::81", "-p", "8950:80", "-p", "8951:53/udp", "--label", "kept=yes")
    container = lab.must("run", "-d", "--name", "ported", *options, IMAGE, "serve")
    lab.must("run", "-d", "--name", "stopped", "-p", "8952:80", IMAGE, "sleep", "86400")
    lab.must("stop", "-t", "0", "stopped")
    ports = lab.must("port", "ported")
    documents = [lab.api("GET", f"/containers/{name}/json") for name in ("ported", "stopped")]
    assert served(lab, "8950")
    kill_bridge(lab)
    assert lab.must("port", "ported") == ports
    after = [lab.api("GET", f"/containers/{name}/json") for name in ("ported", "stopped")]
    for old, new in zip(documents, after, strict=True):
        assert new == old
    until(lambda: served(lab, "8950"), f"the published port serves again\n{lab.logs()}")
    assert lab.cli("run", "-d", "-p", "8950:80", IMAGE, "true").returncode == 125
    assert lab.must("inspect", "--format", "{{.Id}} {{.State.Running}}", "ported") == f"{container} true"
    lab.clean()
    assert not served(lab, "8950")


def served(lab: TaploomLab, port: str) -> bool:
    result: subprocess.CompletedProcess[str] = run(lab.on_host("get", "127.0.0.1", port))
    return result.returncode == 0
