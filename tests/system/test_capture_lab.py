"""Captures in a lab, by the command that people type: what tcpdump reads of them, filters, ends, and what they cost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fabric import TAPLOOM, Fabric, children, fabric, until

from taploom.pcapng import INBOUND, OUTBOUND, Interface, Packet, Reader, Statistics

pytestmark = pytest.mark.system

# Sends numbered datagrams of some size for some seconds, some 20,000 in each: a TAP's queue has room for them, whatever
# else the machine does.
FLOOD = """
import socket, sys, time
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
end, number = time.monotonic() + float(sys.argv[2]), 0
while time.monotonic() < end:
    try: sock.sendto(b"%08d" % number + bytes(int(sys.argv[3])), (sys.argv[1], 9))
    except OSError: pass
    number += 1
    if not number % 20: time.sleep(0.001)
print(number)
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Fabric]:
    with fabric("web", "db") as lab:
        for network, *options in (("app", "--ipv6"), ("back",)):
            lab.run("network", "create", network, *options)
            for guest in ("web", "db"):
                lab.run("network", "connect", network, guest)
        yield lab


class Capture:
    """A capture that is under way."""

    def __init__(self, lab: Fabric, *arguments: str, **options: Any) -> None:
        before = workers(lab)
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        self.process = subprocess.Popen([TAPLOOM, "capture", *arguments], env=lab.environment, **options)
        until(lambda: workers(lab) - before or self.process.poll() is not None, "the capture begins")
        self.worker = next(iter(workers(lab) - before), 0)
        # Its sockets are there once it has said what its interfaces are.
        until(lambda: not self.worker or packet_sockets(self.worker) or self.process.poll() is not None, "it is open")

    def end(self, signum: signal.Signals | None = signal.SIGINT) -> tuple[bytes, str]:
        """What it has written, and what it says at the end; it must end well."""
        if signum is not None:
            self.process.send_signal(signum)
        out, err = self.process.communicate(timeout=30)
        assert self.process.returncode == 0, err
        return out, err.decode()


def workers(lab: Fabric) -> set[int]:
    """The processes of captures."""
    found = set()
    for pid in children(lab.processes()["helper"]["pid"]):
        try:
            if b"capture_worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.add(pid)
        except OSError:
            continue
    return found


def packet_sockets(pid: int) -> int:
    """How many packet sockets a process has bound."""
    try:
        inodes = {str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()}
        lines = Path(f"/proc/{pid}/net/packet").read_text().splitlines()[1:]
    except OSError:
        return 0
    return sum(f"socket:[{line.split()[-1]}]" in inodes and line.split()[4] != "0" for line in lines)


def blocks(data: bytes) -> list[Any]:
    return list(Reader().feed(data))


def tcpdump(data: bytes, *arguments: str) -> list[str]:
    """What Debian's tcpdump reads of a capture."""
    done = subprocess.run(
        ["tcpdump", "-n", *arguments, "-r", "-"], input=data, capture_output=True, check=False, timeout=30
    )
    assert done.returncode == 0, done.stderr
    assert b"truncated" not in done.stderr, done.stderr
    return done.stdout.decode().splitlines()


def test_what_passes(lab: Fabric) -> None:
    """Each packet once, in the right direction, with its time; and nothing of other guests or networks."""
    web, db = lab.address("web", "app"), lab.address("db", "app")
    capture = Capture(lab, "web", "--network", "app", "--filter", "icmp or icmp6", "-w", "-")
    began = time.time_ns()
    lab.in_guest("web", "ping", "-n", "-c3", "-i0.1", db)
    lab.in_guest("db", "ping", "-n", "-c2", "-i0.1", lab.address("web", "app", 6))
    lab.in_guest("web", "ping", "-n", "-c1", lab.address("db", "back"))
    data, said = capture.end()
    found = blocks(data)
    assert [block.name for block in found if isinstance(block, Interface)] == ["web@app"]
    packets = [block for block in found if isinstance(block, Packet)]
    echoes = [one for one in packets if one.data[12:14] == b"\x08\x00"]
    assert [one.direction for one in echoes] == [OUTBOUND, INBOUND] * 3
    assert all(began <= one.time_ns <= time.time_ns() for one in packets)
    assert [one.time_ns for one in packets] == sorted(one.time_ns for one in packets)
    (statistics,) = [block for block in found if isinstance(block, Statistics)]
    assert (statistics.accepted, statistics.dropped) == (len(packets), 0)
    assert said == f"{len(packets)} packets captured\n"
    lines = tcpdump(data, "icmp")
    assert len(lines) == 6
    assert f"IP {web} > {db}: ICMP echo request" in lines[0]
    assert len(tcpdump(data, "icmp6 and (ip6[40] == 128 or ip6[40] == 129)")) == 4
    until(lambda: not workers(lab), "nothing is left of it")


def test_filters_cuts_and_ends(lab: Fabric, tmp_path: Path) -> None:
    db = lab.address("db", "app")
    # A number of packets, of one direction, cut off, in a file.
    path = tmp_path / "web.pcapng"
    options = ("--filter", f"icmp and dst host {db}", "--count", "2", "--snaplen", "60", "--direction", "out")
    capture = Capture(lab, "web", "--network", "app", *options, "-w", str(path))
    lab.in_guest("web", "ping", "-n", "-c3", "-i0.1", db)
    _, said = capture.end(None)
    assert said == "2 packets captured\n"
    packets = [block for block in blocks(path.read_bytes()) if isinstance(block, Packet)]
    assert [(len(one.data), one.length, one.direction) for one in packets] == [(60, 98, OUTBOUND)] * 2
    assert len(tcpdump(path.read_bytes())) == 2
    # What comes in; all networks of the guest, each an interface; lines, and documents.
    capture = Capture(lab, "web", "--filter", "icmp", "--direction", "in")
    lab.in_guest("web", "ping", "-n", "-c1", db)
    lab.in_guest("web", "ping", "-n", "-c1", lab.address("db", "back"))
    out, said = capture.end(signal.SIGTERM)
    first, second = out.decode().splitlines()
    assert f"web@app < {db} > {lab.address('web', 'app')} icmp echo reply" in first
    assert "web@back < " in second
    capture = Capture(lab, "web", "--network", "app", "--filter", "icmp", "--count", "1", "--json")
    lab.in_guest("web", "ping", "-n", "-c1", db)
    document = json.loads(capture.end(None)[0])
    assert (document["interface"], document["direction"], document["length"]) == ("web@app", "out", 98)
    # Nothing at all, for a time.
    out, said = Capture(lab, "web", "--duration", "0.3", "--filter", "vlan 7", "-w", "-").end(None)
    assert said == "0 packets captured\n"
    assert [type(block) for block in blocks(out)] == [Interface, Interface, Statistics, Statistics]


def test_large_segments(lab: Fabric) -> None:
    """A TCP segment of up to 64 KiB is one frame, and is in the capture as it is."""
    server = lab.start_in_guest("db", "iperf3", "-s", "-1", "--forceflush")
    assert server.stdout is not None
    until(lambda: "listening" in (server.stdout.readline() if server.stdout else ""), "iperf3 listens")
    capture = Capture(lab, "web", "--network", "app", "--filter", "tcp port 5201", "-w", "-", "--snaplen", "200")
    lab.in_guest("web", "iperf3", "-n", "20M", "-c", lab.address("db", "app"))
    data, _ = capture.end()
    packets = [block for block in blocks(data) if isinstance(block, Packet)]
    assert max(one.length for one in packets) > 10_000
    assert max(len(one.data) for one in packets) == 200
    assert tcpdump(data)
    server.wait(timeout=10)


def test_a_slow_reader_loses_packets_and_traffic_does_not_wait(lab: Fabric) -> None:
    db = lab.address("db", "app")
    capture = Capture(lab, "web", "--network", "app", "--filter", "udp port 9", "-w", "-")
    # Nobody reads what it writes: all buffers on the way fill up.
    sent = int(lab.in_guest("web", sys.executable, "-c", FLOOD, db, "6", "1400"))
    received = lab.in_guest("db", "sh", "-c", "grep ^Udp: /proc/net/snmp | tail -1").split()
    assert lab.answers("web", db), "other traffic passes meanwhile"
    assert int(received[1]) + int(received[2]) > sent * 0.2, "what was sent has arrived: NoPorts"
    data, said = capture.end()
    found = blocks(data)
    packets = sum(isinstance(block, Packet) for block in found)
    last = [block for block in found if isinstance(block, Statistics)][-1]
    assert last.dropped > 0
    assert last.accepted - last.dropped == packets
    assert f"{packets} packets captured, {last.dropped} lost: they were not read in time" in said


def test_ends(lab: Fabric) -> None:
    db = lab.address("db", "app")
    # The reader closes the pipe: with packets, and without any.
    for arguments in (("--filter", "udp port 9"), ("--filter", "udp port 10")):
        capture = Capture(lab, "web", "--network", "app", *arguments, "-w", "-")
        assert capture.process.stdout is not None
        capture.process.stdout.close()
        lab.in_guest("web", sys.executable, "-c", FLOOD, db, "0.1", "100")
        assert capture.process.wait(timeout=20) == 0
        assert capture.process.stderr is not None
        assert capture.process.stderr.read() == b""
    until(lambda: not workers(lab), "nothing is left of them")
    # The guest leaves.
    lab.run("network", "create", "third")
    lab.run("network", "connect", "third", "web")
    capture = Capture(lab, "web", "--network", "third", "-w", "-")
    lab.run("network", "disconnect", "third", "web")
    data, said = capture.end(None)
    assert said.endswith("; the guest has left the network\n")
    assert isinstance(blocks(data)[-1], Statistics)
    lab.run("network", "rm", "third")
    # The helper goes, and the bridge: what was written is whole, and it says why it ends.
    for victim in ("helper", "bridge"):
        capture = Capture(lab, "web", "--network", "app", "--filter", "icmp", "-w", "-")
        lab.in_guest("web", "ping", "-n", "-c1", db)
        os.kill(lab.processes()[victim]["pid"], signal.SIGKILL)
        data, err = capture.process.communicate(timeout=30)
        assert capture.process.returncode == 1
        assert err.startswith(b"taploom: ")
        assert len(err.splitlines()) == 1
        tcpdump(data)
        lab.until_converged()
        lab.until_answers("web", db)
    until(lambda: not workers(lab), "nothing is left of them")


def test_refusals(lab: Fabric) -> None:
    for arguments, reason in (
        (("web", "--filter", "tcp prot 80"), "filter 'tcp prot 80': can't parse filter expression"),
        (("web", "--filter", "inbound"), "cannot be in a filter: use --direction"),
        (("nobody",), "guest nobody not found"),
        (("web", "--network", "nowhere"), "network nowhere not found"),
        (("web", "--network", "bridge"), "is not connected to network bridge"),
        (("web", "-w", "/nowhere/x"), "cannot write /nowhere/x"),
        (("web", "--snaplen", "1"), "Invalid value for '--snaplen'"),
        (("web", "--json", "-w", "-"), "--json and --write exclude each other"),
    ):
        assert reason in lab.fails("capture", *arguments)
    assert not workers(lab)
