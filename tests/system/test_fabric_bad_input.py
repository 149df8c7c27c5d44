"""What people and peers get wrong: a clear line, a closed connection, and nothing changed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import sqlite3
from collections.abc import Iterator

import pytest
from fabric import Fabric, fabric, until

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def lab() -> Iterator[Fabric]:
    with fabric("web", "db") as lab:
        lab.run("network", "create", "app", "--subnet", "172.30.0.0/24", "--gateway", "172.30.0.1")
        lab.run("network", "create", "tiny", "--subnet", "172.30.1.0/30")
        lab.run("network", "connect", "app", "web", "--ip", "172.30.0.10")
        yield lab


def database(lab: Fabric) -> list[str]:
    """The whole database as SQL."""
    path = lab.path / "bridge" / "bridge.db"
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return list(connection.iterdump())


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("network create other --subnet 172.30.0.128/25", "overlap"),
        ("network create other --subnet 172.30.0.0/33", "172.30.0.0/33"),
        ("network create other --subnet banana", "banana"),
        ("network create other --subnet 10.1.2.3/16", "10.1.0.0/16"),
        ("network create other --subnet 10.1.0.0/16 --gateway 10.2.0.1", "10.2.0.1"),
        ("network create other --mtu 20", "mtu"),
        ("network create other --mtu 99999", "mtu"),
        ("network create app", "app"),
        ("network create -- -bad", "-bad"),
        ("network create " + "n" * 300, "name"),
        ("network create a/b", "a/b"),
        ("network inspect nothing", "nothing"),
        ("network rm nothing", "nothing"),
        ("network rm app", "web"),
        ("network connect app nobody", "nobody"),
        ("network connect nothing web", "nothing"),
        ("network connect app web", "already"),
        ("network connect app db --ip 172.31.0.5", "172.31.0.5"),
        ("network connect app db --ip 172.30.0.10", "172.30.0.10"),
        ("network connect app db --ip 172.30.0.1", "172.30.0.1"),
        ("network connect app db --ip 172.30.0.0", "172.30.0.0"),
        ("network connect app db --ip 172.30.0.255", "172.30.0.255"),
        ("network connect app db --ip banana", "banana"),
        ("network connect app db --ip fd00::9", "fd00::9"),
        ("network connect app db --alias bad_!name", "bad_!name"),
        ("network disconnect app db", "db"),
        ("network disconnect nothing db", "nothing"),
        ("guest register web unix:/run/other/control.sock", "web"),
        ("guest register other banana:/x", "banana"),
        ("guest register other vsock:notanumber", "notanumber"),
        ("guest register x/y unix:/run/other/control.sock", "x/y"),
        ("guest rm nobody", "nobody"),
        ("guest inspect nobody", "nobody"),
        ("lab add web", "web"),
        ("lab add bad/name", "bad/name"),
        ("lab exec nobody -- true", "nobody"),
        ("network create", "NAME"),
        ("network connect app", "GUEST"),
        ("network nonsense", "nonsense"),
    ],
)
def test_one_clear_line_and_nothing_changed(lab: Fabric, command: str, says: str) -> None:
    before = database(lab)
    assert says.lower() in lab.fails(*command.split()).lower()
    assert database(lab) == before


def test_the_last_address(lab: Fabric) -> None:
    lab.run("network", "connect", "tiny", "web")
    before = database(lab)
    assert "address" in lab.fails("network", "connect", "tiny", "db")
    assert database(lab) == before
    lab.run("network", "disconnect", "tiny", "web")


@pytest.fixture
def frozen(lab: Fabric) -> Iterator[None]:
    """The agent of `db` does not answer, but its sockets are there."""
    pid = lab.processes()["guest/db"]["pid"]
    os.kill(pid, signal.SIGSTOP)
    yield
    os.kill(pid, signal.SIGCONT)
    lab.until_converged()


def test_a_guest_that_never_answers(lab: Fabric, frozen: None) -> None:
    before = database(lab)
    assert "db" in lab.fails("network", "connect", "app", "db")
    assert database(lab) == before
    # Others are not held up.
    lab.run("network", "connect", "tiny", "web")
    lab.until_answers("web", "172.30.1.1")
    lab.run("network", "disconnect", "tiny", "web")


def test_a_guest_that_was_never_there(lab: Fabric) -> None:
    lab.run("guest", "register", "ghost", "unix:/nonexistent/control.sock")
    before = database(lab)
    line = lab.fails("network", "connect", "app", "ghost")
    assert "ghost" in line
    assert "/nonexistent/control.sock" in line
    assert database(lab) == before
    lab.run("guest", "rm", "ghost")


def test_a_helper_that_is_down(lab: Fabric) -> None:
    pid = lab.processes()["helper"]["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        before = database(lab)
        assert "helper" in lab.fails("network", "create", "other")
        assert database(lab) == before
        assert "helper" in lab.fails("network", "connect", "tiny", "web")
        assert database(lab) == before
    finally:
        os.kill(pid, signal.SIGCONT)
    lab.until_converged()
    lab.run("network", "create", "other")
    lab.run("network", "rm", "other")


def test_garbage_on_every_socket(lab: Fabric) -> None:
    lab.until_converged()
    processes = lab.processes()
    pids = {name: process["pid"] for name, process in processes.items()}
    generator = random.Random(20)
    paths = [
        lab.path / "bridge.sock",
        *(lab.path / "helper" / name for name in ("control.sock", "data.sock")),
        *(guest / name for guest in (lab.path / "guests").iterdir() for name in ("control.sock", "data.sock")),
    ]
    assert len(paths) == 7
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    for path in paths:
        for data in (
            b"",
            b"GET / HTTP/1.1\r\n\r\n",
            preface[:10],
            preface + generator.randbytes(5000),
            preface + b"\0\0\0\4\0\0\0\0\0" + generator.randbytes(200),
            b"\xff\xff\xff\xff" + generator.randbytes(100),
            b"\0\0\0\0",
            b"\0\0\x0f\xff" + generator.randbytes(0xFFF),
            b"\0\0\0\x20" + generator.randbytes(10),
            *(generator.randbytes(generator.randrange(1, 3000)) for _ in range(10)),
        ):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
                client.settimeout(30)
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    client.sendall(data)
                    client.shutdown(socket.SHUT_WR)
                    while client.recv(65536):
                        pass
    lab.until_converged()
    assert {name: process["pid"] for name, process in lab.processes().items()} == pids
    assert lab.answers("web", "172.30.0.1")


def test_refused_connections_are_logged(lab: Fabric) -> None:
    def logged() -> bool:
        return any(
            "refused" in line or "malformed" in line or "closed" in line
            for line in (lab.path / "logs" / "guest-web.log").read_text().splitlines()
        )

    until(logged, "the guest agent says why it closed the garbage connections")
