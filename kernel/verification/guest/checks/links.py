"""Interfaces within one machine: veth, VLAN, bridges, TAP, dummy, IFB, IPVLAN, MACVLAN, netkit."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import struct
import threading

from ..check import CheckError, check, expect, step
from ..netns import Namespace, linked, veth
from ..traffic import PATIENCE, Sniffer, ping, talk, tcp, unreachable

GROUP = "interfaces"


@check("veth", GROUP, "a pair between two namespaces: ICMP, UDP, TCP, IPv4 and IPv6")
def veth_pair() -> str:
    a, b = linked()
    a.ip("address add fd00::1/64 dev eth0 nodad")
    b.ip("address add fd00::2/64 dev eth0 nodad")
    took = ping(a, "10.1.0.2")
    talk(a, b, "10.1.0.2")
    talk(a, b, "fd00::2")
    return f"ping {took * 1000:.2f} ms"


@check("vlan", GROUP, "802.1Q interfaces on a veth pair: tagged 10 on the wire, and 20 does not hear it")
def vlan() -> str:
    a, b = Namespace("a"), Namespace("b")
    veth(a, b)
    for namespace, host in ((a, 1), (b, 2)):
        for tag in (10, 20):
            namespace.ip(
                f"link add link eth0 name eth0.{tag} type vlan id {tag}",
                f"address add 10.{tag}.0.{host}/24 dev eth0.{tag}",
                f"link set eth0.{tag} up",
            )
    other = Sniffer(b, "eth0.20")
    wire = Sniffer(b, "eth0")
    talk(a, b, "10.10.0.2")
    expect(b.packets("eth0.10")[0], "eth0.10 counts nothing")
    expect(wire.frames(), "nothing was seen on eth0")
    heard = [frame for frame in other.frames() if b"\x0a\x0a\x00" in frame]
    expect(not heard, "traffic of VLAN 10 came out of eth0.20")
    talk(a, b, "10.20.0.2")
    return "ids 10 and 20"


def _bridged(count: int, options: str = "") -> tuple[Namespace, list[Namespace]]:
    switch = Namespace("switch")
    switch.ip(f"link add br0 type bridge {options}", "link set br0 up")
    hosts = []
    for number in range(1, count + 1):
        host = Namespace(f"h{number}")
        lines = [f"address add 10.1.0.{number}/24 dev eth0"], [f"link set p{number} master br0"]
        veth(host, switch, "eth0", f"p{number}", then_a=lines[0], then_b=lines[1])
        hosts.append(host)
    return switch, hosts


@check("bridge", GROUP, "three namespaces on a bridge; its forwarding table learns their MACs")
def bridge() -> str:
    switch, (one, two, three) = _bridged(3)
    talk(one, two, "10.1.0.2")
    talk(two, three, "10.1.0.3")
    known = switch.run("bridge", "fdb", "show", "br", "br0")
    for host in (one, two, three):
        expect(host.mac("eth0") in known, f"the MAC of {host.name} was not learnt")
    return "three MACs learnt"


@check("bridge-vlan-filtering", GROUP, "ports in VLAN 10 and 20 and a trunk: same VLAN speaks, others do not")
def bridge_vlan_filtering() -> str:
    switch, (one, two, three, trunk) = _bridged(4, "vlan_filtering 1 vlan_default_pvid 0")
    for port, vid in (("p1", "10"), ("p2", "10"), ("p3", "20")):
        switch.run("bridge", "vlan", "add", "dev", port, "vid", vid, "pvid", "untagged")
    for tag in ("10", "20"):
        switch.run("bridge", "vlan", "add", "dev", "p4", "vid", tag)
        trunk.ip(f"link add link eth0 name eth0.{tag} type vlan id {tag}", f"link set eth0.{tag} up")
    trunk.ip("address flush dev eth0", "address add 10.1.0.10/24 dev eth0.10")
    talk(one, two, "10.1.0.2")
    talk(one, trunk, "10.1.0.10")
    unreachable(one, "10.1.0.3")
    trunk.ip("address flush dev eth0.10", "address add 10.1.0.20/24 dev eth0.20")
    talk(three, trunk, "10.1.0.20")
    return "10 and 20 apart, trunk has both"


@check("tap", GROUP, "open a TAP with virtio_net_hdr and offloads; frames pass both ways; carrier off and on")
def tap() -> str:
    guest = Namespace("guest")
    with guest:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        flags = 0x0002 | 0x1000 | 0x4000  # IFF_TAP, IFF_NO_PI, IFF_VNET_HDR
        fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH14x", b"tap0", flags))  # TUNSETIFF
    fcntl.ioctl(fd, 0x400454D8, struct.pack("i", 12))  # TUNSETVNETHDRSZ
    fcntl.ioctl(fd, 0x400454D0, 7)  # TUNSETOFFLOAD: CSUM, TSO4, TSO6
    guest.ip("link set tap0 address 02:00:00:00:00:01 up", "address add 10.1.0.1/24 dev tap0")
    guest.ip("neighbour add 10.1.0.2 lladdr 02:00:00:00:00:02 dev tap0")

    def carrier(on: bool) -> None:
        fcntl.ioctl(fd, 0x400454E2, struct.pack("i", int(on)))  # TUNSETCARRIER
        state = guest.ip_json("link", "show", "dev", "tap0")[0]["flags"]
        expect(("NO-CARRIER" not in state) == on, f"the carrier is not {'on' if on else 'off'}: {' '.join(state)}")

    carrier(False)
    carrier(True)
    step("answer an echo request by hand")
    failures: list[str] = []

    def answer() -> None:
        while select.select([fd], [], [], PATIENCE)[0]:
            frame = os.read(fd, 65600)
            header, packet = frame[:12], bytearray(frame[12:])
            if packet[12:14] == b"\x08\x00" and packet[23] == 1 and packet[34] == 8:
                packet[0:6], packet[6:12] = packet[6:12], packet[0:6]
                packet[26:30], packet[30:34] = packet[30:34], packet[26:30]
                packet[34] = 0
                total = struct.unpack("!H", packet[36:38])[0] + 0x0800  # type 8 became 0
                packet[36:38] = struct.pack("!H", (total & 0xFFFF) + (total >> 16))
                os.write(fd, b"\0" * len(header) + packet)
                return
        failures.append("no echo request came out of the TAP")

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        took = ping(guest, "10.1.0.2")
    finally:
        thread.join()
    expect(not failures, "".join(failures))
    return f"ping answered in {took * 1000:.2f} ms"


@check(
    "dummy", GROUP, "an address on a dummy interface is reached through a route; what is routed out of it is counted"
)
def dummy() -> str:
    a, b = linked()
    b.ip(
        "link add d0 type dummy",
        "address add 192.0.2.1/32 dev d0",
        "link set d0 up",
        "route add 198.51.100.0/24 dev d0",
    )
    a.ip("route add 192.0.2.1/32 via 10.1.0.2")
    talk(a, b, "192.0.2.1")
    with contextlib.suppress(CheckError):
        ping(b, "198.51.100.1", timeout=0.05)
    expect(b.packets("d0")[1], "the dummy interface counts no packet sent")
    return "reached"


@check("ifb", GROUP, "ingress of a veth is redirected to an IFB (as CNI bandwidth does), counted there, and arrives")
def ifb() -> str:
    a, b = linked()
    b.ip("link add ifb0 type ifb", "link set ifb0 up")
    b.tc(
        "qdisc add dev eth0 handle ffff: ingress",
        "filter add dev eth0 parent ffff: protocol all u32 match u32 0 0 action mirred egress redirect dev ifb0",
    )
    talk(a, b, "10.1.0.2")
    received, _ = b.packets("ifb0")
    expect(received > 5, f"the IFB counts {received} packets")
    return f"{received} packets through ifb0"


def _children(kind: str, mode: str) -> tuple[Namespace, Namespace, Namespace]:
    """A host and two namespaces with an ipvlan or macvlan child each of the host's eth0."""
    host, outside = linked(("10.1.0.254/24", "10.1.0.253/24"))
    one, two = Namespace("one"), Namespace("two")
    for number, namespace in ((1, one), (2, two)):
        host.ip(f"link add link eth0 name c{number} netns {namespace.name} type {kind} mode {mode}")
        namespace.ip(f"link set c{number} name eth0", f"address add 10.1.0.{number}/24 dev eth0", "link set eth0 up")
    return outside, one, two


@check("macvlan", GROUP, "bridge mode: two children speak with one another and with the outside, by MACs of their own")
def macvlan() -> str:
    outside, one, two = _children("macvlan", "bridge")
    talk(one, two, "10.1.0.2")
    talk(one, outside, "10.1.0.253")
    macs = {namespace.mac("eth0") for namespace in (one, two)}
    expect(len(macs) == 2, "both children have one MAC")
    return "bridge mode"


@check(
    "macvlan-private", GROUP, "private mode: children reach the outside, not one another; macvtap gives a TAP device"
)
def macvlan_private() -> str:
    outside, one, _ = _children("macvlan", "private")
    talk(one, outside, "10.1.0.253")
    unreachable(one, "10.1.0.2")
    outside.ip("link add link eth0 name tap0 type macvtap mode bridge", "link set tap0 up")
    return "apart; macvtap made"


@check("ipvlan-l2", GROUP, "two children speak with one another and with the outside, with the parent's MAC")
def ipvlan_l2() -> str:
    outside, one, two = _children("ipvlan", "l2")
    talk(one, two, "10.1.0.2")
    talk(one, outside, "10.1.0.253")
    expect(one.mac("eth0") == two.mac("eth0"), "the children have MACs of their own")
    return "one MAC"


@check("ipvlan-l3", GROUP, "children in networks of their own are routed by the parent, without broadcast")
def ipvlan_l3() -> str:
    host, outside = linked(("10.1.0.254/24", "10.1.0.253/24"))
    outside.ip("route add 10.5.0.0/24 via 10.1.0.254", "route add 10.6.0.0/24 via 10.1.0.254")
    namespaces = []
    for number in (5, 6):
        namespace = Namespace(f"n{number}")
        host.ip(f"link add link eth0 name c{number} netns {namespace.name} type ipvlan mode l3")
        namespace.ip(
            f"link set c{number} name eth0",
            f"address add 10.{number}.0.1/24 dev eth0",
            "link set eth0 up",
            "route add default dev eth0",
        )
        namespaces.append(namespace)
    five, six = namespaces
    talk(five, six, "10.6.0.1")
    wire = Sniffer(outside, "eth0")
    tcp(five, outside, "10.1.0.253")
    arps = [frame for frame in wire.frames() if frame[12:14] == b"\x08\x06" and b"\x0a\x05\x00\x01" in frame]
    expect(not arps, "a child sent ARP in l3 mode")
    return "routed, no ARP"


@check("netkit", GROUP, "a netkit pair (Cilium's device for pods) in l2 mode between two namespaces")
def netkit() -> str:
    a, b = Namespace("a"), Namespace("b")
    a.ip("link add nk0 type netkit mode l2 forward peer forward name nk1", f"link set nk1 netns {b.name}")
    a.ip("address add 10.1.0.1/24 dev nk0", "link set nk0 up")
    b.ip("address add 10.1.0.2/24 dev nk1", "link set nk1 up")
    talk(a, b, "10.1.0.2")
    return "l2"


@check("vrf", GROUP, "two VRFs with the same address: each speaks in its own table (CNI vrf)")
def vrf() -> str:
    router, one, two = Namespace("router"), Namespace("one"), Namespace("two")
    for number, namespace in ((1, one), (2, two)):
        veth(namespace, router, "eth0", f"p{number}")
        namespace.ip("address add 10.1.0.2/24 dev eth0")
        router.ip(
            f"link add vrf{number} type vrf table {100 + number}",
            f"link set vrf{number} up",
            f"link set p{number} master vrf{number}",
            f"address add 10.1.0.1/24 dev p{number}",
        )
    for namespace in (one, two):
        ping(namespace, "10.1.0.1")
    counts = [router.packets(f"vrf{number}")[0] for number in (1, 2)]
    expect(all(counts), f"packets per VRF: {counts}")
    return "same address in both"


@check("bond", GROUP, "active-backup over two veth pairs: the active one goes down, traffic goes on")
def bond() -> str:
    a, b = Namespace("a"), Namespace("b")
    b.ip("link add br0 type bridge", "link set br0 up", "address add 10.1.0.2/24 dev br0")
    a.ip("link add bond0 type bond mode active-backup miimon 50")
    for device in ("e0", "e1"):
        veth(a, b, device)
        b.ip(f"link set {device} master br0")
        a.ip(f"link set {device} down", f"link set {device} master bond0")
    a.ip("address add 10.1.0.1/24 dev bond0", "link set bond0 up")
    talk(a, b, "10.1.0.2")
    b.ip("link set e0 down")
    talk(a, b, "10.1.0.2")
    return "failed over"
