"""Traffic control: what shapes, delays, drops and steers. Rates are proved by counters and lower bounds of time."""

from __future__ import annotations

import json
import re
import socket
from typing import Any

from ..check import CheckError, check, expect, step
from ..netns import Namespace, linked
from ..traffic import PATIENCE, connected, ping, talk, transfer, udp

GROUP = "traffic control"
_SO_MAX_PACING_RATE = 47


def _qdiscs(namespace: Namespace, device: str = "eth0") -> dict[str, dict[str, int]]:
    """Statistics of a device's queueing disciplines by kind: packets, drops, overlimits, and what the kind counts.

    From the text: the JSON that tc prints of some kinds is none.
    """
    found = {}
    for block in namespace.line(f"tc -s qdisc show dev {device}").split("qdisc ")[1:]:
        sent = re.search(r"Sent \d+ bytes (\d+) pkt \(dropped (\d+), overlimits (\d+)", block)
        expect(sent, f"tc shows no statistics: {block}")
        assert sent is not None
        stats = dict(zip(("packets", "drops", "overlimits"), map(int, sent.groups()), strict=True))
        stats |= {name: int(number) for name, number in re.findall(r"(throttled) (\d+)", block)}
        found[block.split()[0]] = stats
    return found


def _flood(
    sender: Namespace, receiver: Namespace, address: str, *, count: int = 200, size: int = 1000, port: int = 7001
) -> int:
    """Sends datagrams as fast as it can; how many come."""
    step(f"{count} datagrams of {size} bytes from {sender.name} to {address}")
    with receiver:
        listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sender:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with listener, sock:
        listener.bind(("0.0.0.0", port))  # noqa: S104 - in a namespace of its own
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 21)
        listener.settimeout(0.4)
        for _ in range(count):
            sock.sendto(b"x" * size, (address, port))
        got = 0
        try:
            while True:
                listener.recv(size)
                got += 1
        except TimeoutError:
            return got


def _send(sender: Namespace, receiver: Namespace, address: str, port: int, size: int) -> float:
    """Passes bytes one way over TCP; the seconds until all were there."""
    with connected(sender, receiver, address, port) as (sock, accepted):
        return transfer(sock, accepted, size)


@check(
    "htb",
    GROUP,
    "two classes: 96 KiB through the one of 1 Mbit/s takes its time, the other does not; classes count",
)
def htb() -> str:
    a, b = linked()
    a.tc(
        "qdisc add dev eth0 root handle 1: htb default 20",
        "class add dev eth0 parent 1: classid 1:10 htb rate 1mbit burst 4k cburst 4k",
        "class add dev eth0 parent 1: classid 1:20 htb rate 1gbit",
        "filter add dev eth0 parent 1: protocol ip u32 match ip dport 7010 0xffff flowid 1:10",
    )
    slow = _send(a, b, "10.1.0.2", 7010, 98304)
    fast = _send(a, b, "10.1.0.2", 7011, 98304)
    classes = json.loads(a.run("tc", "-s", "-j", "class", "show", "dev", "eth0"))
    sent = {one["handle"]: one["stats"]["bytes"] for one in classes}
    expect(sent["1:10"] > 90000 and sent["1:20"] > 90000, f"the classes count {sent} bytes")
    expect(slow > 0.4, f"96 KiB passed 1 Mbit/s in {slow:.2f} s")
    expect(fast < slow, f"1 Gbit/s took {fast:.2f} s, 1 Mbit/s {slow:.2f} s")
    return f"{slow:.2f} s and {fast:.2f} s"


@check("tbf", GROUP, "1 Mbit/s: of 200 kB at once some passes and some is dropped (CNI bandwidth)")
def tbf() -> str:
    a, b = linked()
    a.tc("qdisc add dev eth0 root tbf rate 1mbit burst 8kb latency 50ms")
    got = _flood(a, b, "10.1.0.2")
    stats = _qdiscs(a)["tbf"]
    expect(0 < got < 200, f"{got} of 200 datagrams came")
    expect(
        stats["drops"] and stats["overlimits"], f"tbf counts {stats['drops']} drops, {stats['overlimits']} over limits"
    )
    return f"{got} of 200 came, {stats['drops']} drops"


@check("netem", GROUP, "a delay of 100 ms, every packet twice, every packet lost")
def netem() -> str:
    a, b = linked()
    udp(a, b, "10.1.0.2")
    a.tc("qdisc add dev eth0 root netem delay 100ms")
    took = ping(a, "10.1.0.2")
    expect(took >= 0.1, f"a ping took {took * 1000:.0f} ms with a delay of 100 ms")
    a.tc("qdisc replace dev eth0 root netem duplicate 100%")
    got = _flood(a, b, "10.1.0.2", count=20)
    expect(got == 40, f"{got} datagrams came of 20 sent twice")
    a.tc("qdisc replace dev eth0 root netem loss 100%")
    got = _flood(a, b, "10.1.0.2", count=20)
    expect(got == 0, f"{got} datagrams came where all are lost")
    drops = _qdiscs(a)["netem"]["drops"]
    expect(drops >= 20, f"netem counts {drops} drops")
    return f"ping {took * 1000:.0f} ms, {drops} drops"


@check("police", GROUP, "ingress policing at 100 kbit/s: the burst passes, the rest is dropped and counted")
def police() -> str:
    a, b = linked()
    b.tc(
        "qdisc add dev eth0 clsact",
        "filter add dev eth0 ingress matchall action police rate 100kbit burst 10k conform-exceed drop/continue",
    )
    got = _flood(a, b, "10.1.0.2")
    drops = _action(b, "ingress")["drops"]
    expect(0 < got < 200, f"{got} of 200 datagrams came")
    expect(drops, "the policer counts no drop")
    return f"{got} of 200 came, {drops} drops"


def _action(namespace: Namespace, hook: str) -> dict[str, Any]:
    """Statistics of the first action of the first filter with one."""
    for one in json.loads(namespace.run("tc", "-s", "-j", "filter", "show", "dev", "eth0", hook)):
        for action in one.get("options", {}).get("actions", []):
            return dict(action["stats"])
    raise CheckError("no filter with an action is listed")


@check(
    "fq",
    GROUP,
    "pacing by SO_MAX_PACING_RATE: 128 KiB at 256 KiB/s take their time, fq counts throttled flows (Cilium's "
    "bandwidth manager)",
)
def fq() -> str:
    a, b = linked()
    a.tc("qdisc add dev eth0 root fq")
    with connected(a, b, "10.1.0.2") as (sock, accepted):
        sock.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, 256 << 10)
        took = transfer(sock, accepted, 128 << 10)
    throttled = _qdiscs(a)["fq"].get("throttled", 0)
    expect(took > 0.2, f"128 KiB at 256 KiB/s took {took:.2f} s")
    expect(throttled, "fq counts no throttled flow")
    return f"{took:.2f} s, {throttled} throttled"


@check("qdiscs", GROUP, "traffic through fq_codel, sfq, prio, cake, hfsc and pfifo as root; each counts it")
def qdiscs() -> str:
    a, b = linked()
    kinds = {"fq_codel": "", "sfq": "", "prio": "", "cake": "bandwidth 1gbit", "hfsc": "default 1", "pfifo": ""}
    failures = []
    for kind, options in kinds.items():
        try:
            a.tc(f"qdisc replace dev eth0 root handle 1: {kind} {options}")
            if kind == "hfsc":
                a.tc("class add dev eth0 parent 1: classid 1:1 hfsc ls rate 1gbit ul rate 1gbit")
            talk(a, b, "10.1.0.2")
            expect(_qdiscs(a)[kind]["packets"], f"{kind} counts nothing")
        except CheckError as error:
            failures.append(f"{kind}: {error}")
        a.run("tc", "qdisc", "replace", "dev", "eth0", "root", "pfifo_fast")
    expect(not failures, "; ".join(failures))
    return " ".join(kinds)


@check("tc-filters", GROUP, "flower, u32, fw, basic, matchall: each drops one UDP port and leaves another")
def tc_filters() -> str:
    a, b = linked()
    b.tc("qdisc add dev eth0 clsact")
    port = "ip_proto udp dst_port 7011"
    filters = {
        "flower": f"protocol ip flower {port} action drop",
        "u32": "protocol ip u32 match ip protocol 17 0xff match ip dport 7011 0xffff action drop",
        "basic": "protocol ip basic match u32( u32 0x00001b63 0x0000ffff at 20 ) action drop",
        "matchall": "protocol ip matchall action drop",
        "fw": "protocol ip handle 5 fw action drop",
    }
    for kind, rule in filters.items():
        if kind == "fw":
            b.tc(f"filter add dev eth0 ingress prio 1 protocol ip flower {port} action skbedit mark 5 continue")
            rule = f"prio 2 {rule}"  # noqa: PLW2901
        b.tc(f"filter add dev eth0 ingress {rule}")
        got = _flood(a, b, "10.1.0.2", count=5, port=7011)
        expect(got == 0, f"{kind}: {got} of 5 datagrams came that it drops")
        if kind != "matchall":
            udp(a, b, "10.1.0.2")
        b.tc("filter del dev eth0 ingress")
    return " ".join(filters)


@check(
    "tc-actions",
    GROUP,
    "pedit and csum rewrite a port, vlan tags and untags, mirred mirrors, ct commits, gact counts",
)
def tc_actions() -> str:
    a, b = linked()
    for namespace in (a, b):
        namespace.tc("qdisc add dev eth0 clsact")
    b.ip("link add d0 type dummy", "link set d0 up")
    a.tc("filter add dev eth0 egress protocol ip matchall action vlan push id 9")
    b.tc("filter add dev eth0 ingress protocol 802.1Q matchall action vlan pop pipe action mirred egress mirror dev d0")
    talk(a, b, "10.1.0.2")
    _, mirrored = b.packets("d0")
    expect(mirrored > 5, f"{mirrored} packets were mirrored")
    a.tc("filter del dev eth0 egress")
    b.tc("filter del dev eth0 ingress")
    b.tc(
        "filter add dev eth0 ingress protocol ip flower ip_proto udp dst_port 7055"
        " action pedit ex munge udp dport set 7001 pipe action csum ip and udp"
    )
    _rewritten_port(a, b)
    b.tc("filter del dev eth0 ingress")
    b.tc("filter add dev eth0 ingress protocol ip flower ip_proto tcp ct_state -trk action ct zone 3 commit")
    talk(a, b, "10.1.0.2")
    listed = b.run("conntrack", "-L", "-w", "3")
    expect("10.1.0.1" in listed, "act_ct tracked nothing")
    return f"{mirrored} packets mirrored"


def _rewritten_port(a: Namespace, b: Namespace) -> None:
    """A datagram sent to 7055 that a filter rewrites to 7001."""
    with b:
        listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with a:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with listener, sock:
        listener.bind(("0.0.0.0", 7001))  # noqa: S104 - in a namespace of its own
        listener.settimeout(PATIENCE)
        sock.sendto(b"taploom", ("10.1.0.2", 7055))
        try:
            listener.recv(100)
        except TimeoutError:
            raise CheckError("the datagram with the rewritten port did not come") from None
