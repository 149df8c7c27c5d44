"""Policies in a lab, by the commands that people type: what passes, what ends, what comes back; nothing stays."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fabric import Fabric, fabric, until
from test_lab_docker import Docker

pytestmark = pytest.mark.system

POLICY = """
networks:
  app: deny
groups:
  web:
    members: [{guest: web}]
    out:
      - {name: to-db, to: {group: db}, protocol: tcp, ports: [5432, 5433]}
  db:
    members: [{alias: postgres}]
    in:
      - {name: from-web, from: {group: web}, protocol: tcp, ports: 5432}
      - {name: for-now, from: {guest: web}, protocol: tcp, ports: 5433}
      - {name: rest, action: reject, priority: 0, log: true}
"""

SERVER = """
import socket, sys, threading
def serve(port):
    server = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    while True:
        connection, _ = server.accept()
        threading.Thread(target=echo, args=(connection,), daemon=True).start()
def echo(connection):
    while data := connection.recv(65536):
        connection.sendall(data)
for port in map(int, sys.argv[1:]):
    threading.Thread(target=serve, args=(port,)).start()
print("ready", flush=True)
"""
# One connection; each line of input is sent through it, and answered by yes once it came back, or by no.
CLIENT = """
import socket, sys
try:
    connection = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=3)
except OSError as error:
    print(type(error).__name__, flush=True)
    sys.exit()
print("connected", flush=True)
for line in sys.stdin:
    connection.settimeout(float(line))
    try:
        connection.sendall(b"x")
        print("yes" if connection.recv(100) else "no", flush=True)
    except OSError:
        print("no", flush=True)
"""


# Connects again and again, twenty times a second, and waits three seconds for each; answers a line of input by what
# came of those that were not left alone, and how many have been begun. That nobody is there (ARP) is no answer.
KNOCKER = """
import collections, errno, json, os, selectors, socket, sys, time
address, port, outcomes, begun, waiting = sys.argv[1], int(sys.argv[2]), collections.Counter(), 0, collections.deque()
selector = selectors.DefaultSelector()
selector.register(0, selectors.EVENT_READ)
due = time.monotonic()
while True:
    while time.monotonic() >= due:
        due += 0.05
        sock = socket.socket()
        sock.setblocking(False)
        try: sock.connect((address, port))
        except BlockingIOError: pass
        except OSError as error: outcomes[type(error).__name__] += 1
        selector.register(sock, selectors.EVENT_WRITE)
        waiting.append((time.monotonic() + 3, sock))
        begun += 1
    while waiting and waiting[0][0] < time.monotonic():
        sock = waiting.popleft()[1]
        if sock.fileno() >= 0:
            selector.unregister(sock)
            sock.close()
    for key, _ in selector.select(max(0, due - time.monotonic())):
        if key.fd == 0:
            if not os.read(0, 100): sys.exit()
            print(json.dumps([outcomes, begun]), flush=True)
            continue
        error = key.fileobj.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error != errno.EHOSTUNREACH: outcomes[os.strerror(error) if error else "connected"] += 1
        selector.unregister(key.fileobj)
        key.fileobj.close()
"""


class Knocker:
    """A guest that never stops trying to connect."""

    def __init__(self, lab: Fabric, guest: str, address: str, port: int) -> None:
        self._process = lab.start_in_guest(
            guest, sys.executable, "-c", KNOCKER, address, str(port), stdin=subprocess.PIPE, stderr=None
        )

    def result(self) -> tuple[dict[str, int], int]:
        """What came of the attempts that were not left alone, and how many have been begun."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        outcomes, begun = json.loads(self._process.stdout.readline())
        return outcomes, begun

    def until_more(self, count: int) -> None:
        """Waits until so many more attempts have been begun; none may have been answered."""
        enough = self.result()[1] + count
        until(lambda: self.result()[1] >= enough, "more attempts")
        assert self.result()[0] == {}

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class Connection:
    """A TCP connection from a guest."""

    def __init__(self, lab: Fabric, guest: str, address: str, port: int) -> None:
        self._process = lab.start_in_guest(
            guest, sys.executable, "-c", CLIENT, address, str(port), stdin=subprocess.PIPE, stderr=None
        )
        assert self._process.stdout is not None
        self.outcome = self._process.stdout.readline().strip()

    def lives(self, within: float = 5.0) -> bool:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{within}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip() == "yes"

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def outcome(lab: Fabric, guest: str, address: str, port: int) -> str:
    """What becomes of a connection: connected, TimeoutError, ConnectionRefusedError."""
    connection = Connection(lab, guest, address, port)
    connection.close()
    return connection.outcome


@pytest.fixture(scope="module")
def lab() -> Iterator[Fabric]:
    with fabric("web", "db", "mal") as lab:
        lab.run("network", "create", "app", "--ipv6")
        for guest, *options in (("web",), ("mal",), ("db", "--alias", "postgres")):
            lab.run("network", "connect", "app", guest, *options)
        server = lab.start_in_guest("db", sys.executable, "-c", SERVER, "5432", "5433")
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        yield lab
        server.kill()


@pytest.fixture
def policy(lab: Fabric) -> Iterator[Path]:
    path = lab.path / "policy.yaml"
    path.write_text(POLICY)
    yield path
    path.write_text("networks: {app: allow}\n")
    lab.run("policy", "apply", "--prune", "-f", str(path))


def rows(lab: Fabric) -> list[str]:
    """The rows of the northbound database."""
    socket = lab.path / "helper" / "state" / "run" / "db.sock"
    dump = subprocess.run(
        ["ovsdb-client", "dump", "--format=json", f"unix:{socket}", "OVN_Northbound"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    hidden = {"nb_cfg", "sb_cfg", "hv_cfg", "nb_cfg_timestamp", "sb_cfg_timestamp", "hv_cfg_timestamp"}
    found = []
    for table in map(json.loads, filter(None, dump.splitlines())):
        shown = [n for n, heading in enumerate(table["headings"]) if heading not in hidden]
        found += sorted(json.dumps([table["caption"], *(row[n] for n in shown)]) for row in table["data"])
    return found


def test_a_policy_and_its_change(lab: Fabric, policy: Path) -> None:
    before = rows(lab)
    db, db6 = lab.address("db", "app"), lab.address("db", "app", 6)
    assert outcome(lab, "mal", db, 5432) == "connected"
    done = lab.json("policy", "apply", "-f", str(policy))
    assert (done["created"], done["pending"]) == (["db", "web"], "")
    kept, going = Connection(lab, "web", db6, 5432), Connection(lab, "web", db, 5433)
    try:
        assert (kept.outcome, going.outcome) == ("connected", "connected")
        # To the name, as programs do: the resolver works though nothing else may go out.
        assert outcome(lab, "web", "postgres", 5432) == "connected"
        assert outcome(lab, "mal", "db", 5432) == "TimeoutError", "it may not go out"
        assert not lab.answers("web", db)
        assert not lab.answers("db", lab.address("web", "app"))
        for gateway in lab.json("network", "inspect", "app")["gateways"]:
            assert lab.answers("web", gateway)
            assert lab.answers("mal", gateway)
        text = policy.read_text()
        policy.write_text(text.replace("      - {name: for-now, from: {guest: web}, protocol: tcp, ports: 5433}\n", ""))
        assert lab.json("policy", "apply", "-f", str(policy))["updated"] == ["db"]
        assert not going.lives(2.0)
        assert kept.lives()
        assert outcome(lab, "web", db, 5433) == "ConnectionRefusedError", "rejected"
        shown = lab.json("policy", "show", "db")
        assert shown["incoming"][0]["packets"] >= 1
        line = until(lambda: lab.run("policy", "log"), "a line of the log").splitlines()[-1]
        assert f"reject web {lab.address('web', 'app')}:" in line
        assert line.endswith(f"> db {db}:5433 tcp by db in rest")
        assert "db@app" in lab.run("policy", "ls")
        assert "from-web" in lab.run("policy", "show", "db")
        # Down to what there was, row for row.
        assert "group web names group db" in lab.fails("policy", "rm", "db")
        lab.run("policy", "rm", "web", "db")
        lab.run("policy", "apply", "-f", _written(lab, "networks: {app: allow}\n"))
        assert rows(lab) == before
        assert kept.lives()
        assert outcome(lab, "mal", db, 5432) == "connected"
    finally:
        kept.close()
        going.close()


def _written(lab: Fabric, text: str) -> str:
    path = lab.path / "other.yaml"
    path.write_text(text)
    return str(path)


def test_refusals(lab: Fabric) -> None:
    before = rows(lab)
    path = _written(lab, "groups:\n  a:\n    in:\n      - {protocol: tcp, ports: [1-10, 5]}\n")
    assert (
        lab.fails("policy", "apply", "-f", path) == f"taploom: {path}:4: ports 1-10 and 5 overlap: write each port once"
    )
    path = _written(lab, "groups:\n  a:\n    inn: []\n")
    assert lab.fails("policy", "apply", "-f", path) == (
        f"taploom: {path}:3: 'inn' is not a key of group a: use members, in or out"
    )
    path = _written(lab, "groups:\n  good: {in: []}\n  bad:\n    members: [{group: nosuch}]\n")
    assert f"{path}:4: group bad names group 'nosuch'" in lab.fails("policy", "apply", "-f", path)
    assert "cannot read /nowhere" in lab.fails("policy", "apply", "-f", "/nowhere")
    assert "'good' not found" in lab.fails("policy", "show", "good")
    assert lab.json("policy", "ls")["groups"] == []
    assert rows(lab) == before


def test_kill_everything(lab: Fabric, policy: Path) -> None:
    lab.run("policy", "apply", "-f", str(policy))
    db = lab.address("db", "app")
    kept, knocker = Connection(lab, "web", db, 5432), Knocker(lab, "mal", db, 5432)
    pings = lab.start_in_guest("web", "ping", "-n", "-i0.1", db)
    try:
        for victim in ("bridge", "ovsdb-server", "ovs-vswitchd", "ovn-northd", "ovn-controller", "helper", "disk"):
            lab.kill_and_wait(victim)
            until(lambda: outcome(lab, "web", db, 5432) == "connected", f"as it was after {victim} was killed", 60)
            # At no time may anybody in whom the rules keep out: also not while things are put back.
            knocker.until_more(20)
            assert kept.lives(20.0), victim
        pings.send_signal(signal.SIGINT)
        assert " 0 received" in pings.communicate(timeout=20)[0]
        assert outcome(lab, "mal", db, 5432) == "TimeoutError"
        assert knocker.result()[0] == {}
    finally:
        for one in (kept, knocker):
            one.close()
        pings.kill()
        pings.wait()


def http(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=3) as response:
            return bool(response.status == 200)
    except OSError:
        return False


@pytest.fixture
def docker(lab: Fabric) -> Docker:
    return Docker(lab)


def test_docker_users(lab: Fabric, docker: Docker) -> None:
    """Labels, the network's option, published ports, the way out and the host."""
    docker("network", "create", "-o", "taploom.policy=deny", "locked")
    refused = docker.command("network", "create", "-o", "taploom.policy=nothing", "odd")
    assert b"use allow, deny, deny-in or deny-out" in refused.stderr
    serve = ("python3", "-m", "http.server", "80")
    docker("run", "-d", "--name", "shop", "--network", "locked", "-p", "127.0.0.1::80", "host", *serve)
    docker(
        *("run", "-d", "--name", "client", "--network", "locked", "--label", "taploom.groups=clients,unknown"),
        *("host", "sleep", "1000"),
    )
    published = docker("port", "shop", "80").splitlines()[0]
    curl = ("exec", "client", "curl", "-s", "-o", "/dev/null", "-m", "2")

    def reached(url: str) -> bool:
        return docker.command(*curl, url).returncode == 0

    # What is published is published; among themselves, out and to the host nothing passes.
    until(lambda: http(f"http://{published}/"), "the published port")
    assert docker("exec", "client", "getent", "hosts", "shop")
    assert not reached("http://shop/")
    assert docker.command("exec", "client", "ping", "-c1", "-W1", "198.51.100.1").returncode != 0
    listed = {group["name"]: group for group in lab.json("policy", "ls")["groups"]}
    assert listed["unknown"]["missing"]
    assert lab.json("policy", "ls")["networks"] == [{"network": "locked", "default": "deny", "line": 0}]

    text = """
groups:
  clients:
    out:
      - {to: {guest: shop}, protocol: tcp, ports: 80}
      - {to: {cidr: 198.51.100.0/24}, protocol: icmp}
      - {to: host, protocol: tcp, ports: PORT}
  shops:
    members: [{guest: shop, network: locked}]
    in:
      - {name: clients, from: {group: clients}}
      - {name: no-host, from: host, action: drop, priority: PRIORITY}
"""
    server = subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=lab.path,
    )
    try:
        assert server.stdout is not None
        port = server.stdout.readline().split("port ")[1].split()[0]
        host = f"http://host.docker.internal:{port}/"
        add_host = ("--add-host", "host.docker.internal:host-gateway")
        docker("rm", "-f", "client")
        docker(
            *("run", "-d", "--name", "client", "--network", "locked", "--label", "taploom.groups=clients", *add_host),
            *("host", "sleep", "1000"),
        )
        assert not reached(host)
        path = _written(lab, text.replace("PORT", port).replace("PRIORITY", "100"))
        lab.run("policy", "apply", "-f", path)
        assert reached("http://shop/")
        assert reached(host)
        docker("exec", "client", "ping", "-c1", "-W5", "198.51.100.1")
        assert not reached("http://198.51.100.1/")
        assert not http(f"http://{published}/"), "a rule says so"
        lab.run("policy", "apply", "-f", _written(lab, text.replace("PORT", "1").replace("PRIORITY", "0")))
        # It says what it said, but for anybody else a higher rule would come first: there is none.
        assert not http(f"http://{published}/")
        assert not reached(host)
        lab.run("policy", "rm", "clients", "shops")
        until(lambda: http(f"http://{published}/"), "the published port again")
    finally:
        server.kill()
        server.wait()
        docker("rm", "-f", "shop", "client")
        docker("network", "rm", "locked")


def test_a_new_endpoint_is_never_open(lab: Fabric, policy: Path) -> None:
    """Datagrams to an address that is about to have a guest: none comes in before the rules are there."""
    lab.run("policy", "apply", "-f", str(policy))
    lab.run("lab", "add", "late")
    sender: Any = None
    try:
        flood = (
            "import socket, sys, time\n"
            "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
            "while True:\n"
            "    try: s.sendto(b'x', (sys.argv[1], 9))\n"
            "    except OSError: pass\n"
            "    time.sleep(0.001)\n"
        )
        lab.run("policy", "apply", "-f", _written(lab, "networks: {app: deny-in}\ngroups: {web: {members: []}}\n"))
        lab.run("network", "connect", "app", "late")
        address = lab.address("late", "app")
        lab.run("network", "disconnect", "app", "late")
        sender = lab.start_in_guest("mal", sys.executable, "-c", flood, address)
        for _ in range(3):
            lab.run("network", "connect", "app", "late")
            assert lab.address("late", "app") == address
            counted = lab.in_guest("late", "sh", "-c", "sleep 0.3; grep ^Udp: /proc/net/snmp | tail -1").split()
            # InDatagrams and NoPorts: what the kernel got, whether or not anybody listened.
            assert int(counted[2]) == 0, counted
            lab.run("network", "disconnect", "app", "late")
    finally:
        if sender is not None:
            sender.kill()
            sender.wait()
        lab.command("lab", "rm", "late")
