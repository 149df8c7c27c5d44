"""Tunnels between hosts: VXLAN, GENEVE, GRE, IPIP, SIT and WireGuard, with the proof on the wire."""

from __future__ import annotations

from ..check import CheckError, check, expect, run
from ..netns import Namespace, linked
from ..traffic import Sniffer, ip_protocol, ipv4, talk, udp_port

GROUP = "tunnels"


def _over(device: str, a_line: str, b_line: str, proves: str, *, port: int = -1, protocol: int = -1) -> str:
    """Makes a tunnel device in two linked namespaces, passes traffic, and looks at the frames below it."""
    a, b = linked()
    for namespace, line, host in ((a, a_line, 1), (b, b_line, 2)):
        namespace.ip(
            f"link add {device} {line}",
            f"address add 172.16.0.{host}/24 dev {device}",
            f"link set {device} up",
        )
    return _prove(a, b, device, proves, port=port, protocol=protocol)


def _prove(a: Namespace, b: Namespace, device: str, proves: str, *, port: int = -1, protocol: int = -1) -> str:
    wire = Sniffer(b, "eth0")
    talk(a, b, "172.16.0.2")
    frames = ipv4(wire.frames())
    tunnelled = [frame for frame in frames if udp_port(frame) == port or ip_protocol(frame) == protocol]
    expect(tunnelled, f"no {proves} on the wire")
    expect(len(tunnelled) == len(frames), f"{len(frames) - len(tunnelled)} packets beside {proves} on the wire")
    expect(b.packets(device)[0], f"{device} counts nothing received")
    return f"{len(tunnelled)} packets of {proves}"


@check("vxlan", GROUP, "VNI 42 between two namespaces: UDP, TCP; only UDP port 4789 on the wire")
def vxlan() -> str:
    line = "type vxlan id 42 dstport 4789 local {} remote {} dev eth0"
    return _over("vx0", line.format("10.1.0.1", "10.1.0.2"), line.format("10.1.0.2", "10.1.0.1"), "UDP 4789", port=4789)


@check(
    "vxlan-external",
    GROUP,
    "one device for all tunnels, with keys by route (as Cilium and OVS use it) to a VNI of its own",
)
def vxlan_external() -> str:
    a, b = linked()
    a.ip(
        "link add vx0 type vxlan external dstport 4789",
        "link set vx0 address 02:00:00:00:01:01 up",
        "address add 172.16.0.1/32 dev vx0",
        "route add 172.16.0.2/32 encap ip id 77 dst 10.1.0.2 dev vx0",
        "neighbour add 172.16.0.2 lladdr 02:00:00:00:01:02 dev vx0",
    )
    b.ip(
        "link add vx0 type vxlan id 77 dstport 4789 local 10.1.0.2 remote 10.1.0.1 dev eth0",
        "link set vx0 address 02:00:00:00:01:02 up",
        "address add 172.16.0.2/24 dev vx0",
        "neighbour add 172.16.0.1 lladdr 02:00:00:00:01:01 dev vx0",
    )
    return _prove(a, b, "vx0", "UDP 4789", port=4789)


@check("geneve", GROUP, "VNI 42 between two namespaces: UDP, TCP; only UDP port 6081 on the wire")
def geneve() -> str:
    line = "type geneve id 42 remote {} dstport 6081"
    return _over("gv0", line.format("10.1.0.2"), line.format("10.1.0.1"), "UDP 6081", port=6081)


@check("gre", GROUP, "a GRE tunnel with a key; only IP protocol 47 on the wire")
def gre() -> str:
    line = "type gre local {} remote {} key 42"
    return _over("tun1", line.format("10.1.0.1", "10.1.0.2"), line.format("10.1.0.2", "10.1.0.1"), "GRE", protocol=47)


@check("gretap", GROUP, "Ethernet over GRE; only IP protocol 47 on the wire")
def gretap() -> str:
    line = "type gretap local {} remote {}"
    return _over("tap1", line.format("10.1.0.1", "10.1.0.2"), line.format("10.1.0.2", "10.1.0.1"), "GRE", protocol=47)


@check("ipip", GROUP, "IPv4 in IPv4 (Cilium, Calico); only IP protocol 4 on the wire")
def ipip() -> str:
    line = "type ipip local {} remote {}"
    return _over("tun1", line.format("10.1.0.1", "10.1.0.2"), line.format("10.1.0.2", "10.1.0.1"), "IPIP", protocol=4)


@check("wireguard", GROUP, "keys, a handshake, traffic; only UDP port 51820 on the wire, and never the text itself")
def wireguard() -> str:
    a, b = linked()
    keys = [run("wg", "genkey").strip() for _ in range(2)]
    public = [run("wg", "pubkey", stdin=key).strip() for key in keys]
    for number, namespace in enumerate((a, b)):
        namespace.ip("link add wg0 type wireguard")
        namespace.run(
            *("wg", "set", "wg0", "listen-port", "51820", "private-key", "/dev/stdin"),
            *("peer", public[1 - number], "allowed-ips", "172.16.0.0/24", "endpoint", f"10.1.0.{2 - number}:51820"),
            stdin=keys[number],
        )
        namespace.ip(f"address add 172.16.0.{number + 1}/24 dev wg0", "link set wg0 up")
    wire = Sniffer(b, "eth0")
    talk(a, b, "172.16.0.2")
    frames = ipv4(wire.frames())
    expect(all(udp_port(frame) == 51820 for frame in frames), "something beside WireGuard was on the wire")
    expect(not any(b"taploom" in frame for frame in frames), "the text was on the wire")
    handshake = b.run("wg", "show", "wg0", "latest-handshakes").split()[-1]
    if handshake == "0":
        raise CheckError("no handshake took place")
    return f"{len(frames)} packets"
